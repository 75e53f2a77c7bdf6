"""A cache of slots: one layer's entries under a method, while tokens are generated.

An entry keeps its slot until it leaves, and the next token takes a free one: nothing is moved.
``policies/apply.py`` says what a prompt leaves here, and ``policies/decode_driver.py`` what enters
and leaves later; replay and live generation step this same object. Several policies that share a
method, and all their heads, step together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.rotary import turn
from kvtune.policies.decode import FREE, DecodeMethod, DecodeState, opened
from kvtune.policies.decode_driver import DecodeDriver
from kvtune.policies.format import Format, Role
from kvtune.policies.signals import Signals
from kvtune.policies.slot_bytes import EXACT, ROLES, Forms, held_bytes
from kvtune.policies.slot_prompt import Prompt, numbers_of

_BLOCK = 256  # slots that are added where all are taken


class SlotCache:
    """Entries of some heads of one layer, for several policies that share a method.

    Life: built when the prompt is complete; ``step`` once a generated token. ``check_integrity``
    holds the books against the slots.
    """

    def __init__(
        self,
        method: DecodeMethod | None,
        prompt: Prompt,
        signals: Signals,
        budgets: NDArray[np.int64],
        room: int,
        heads: Sequence[int] | None = None,
        forms: Forms = EXACT,
        residual: int = 0,
    ) -> None:
        """Take over a prompt.

        Args:
            method: evicts; None for a cache that only grows.
            prompt: of these heads.
            signals: of the whole layer.
            budgets: entries that may stay, ``[B, H]``; not read without a method.
            room: tokens that will be generated at most.
            heads: which of the layer's KV heads these are; all unless given.
            forms: how generated keys and values are stored, as the prompt's are already; every
                token apart, so that each can leave alone.
            residual: newest generated tokens that stay in 16 bits, up to twice as many.
        """
        self.method, self.budgets = method, budgets
        self.forms, self.residual = forms, residual
        self.scale, self.rope = signals.scale, signals.rope
        self.trimmed = signals.prompt_tokens - prompt.sizes
        self.peak = prompt.sizes.copy()
        self.evicted = np.zeros_like(prompt.sizes)
        self.entry_steps = np.zeros_like(prompt.sizes)  # summed over steps: mean occupancy
        self.most = self._most(prompt.sizes, room)
        self.grew = True  # whether the last token made a head hold more than ever before
        slots = min(int(self.most.max(initial=1)), prompt.keys.shape[2] + _BLOCK)
        self.keys, self.values = (_widened(x, slots) for x in (prompt.keys, prompt.values))
        state = self._open(prompt, signals, numbers_of(heads, signals), slots)
        self.driver = DecodeDriver(method, budgets, prompt.sizes.copy(), state)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Entries of each head, ``[B, H]``."""
        return self.driver.sizes

    @property
    def state(self) -> DecodeState:
        """What is remembered of them."""
        return self.driver.state

    def _most(self, sizes: NDArray[np.int64], room: int) -> NDArray[np.int64]:
        """Entries of each head that are ever held at once, ``[B, H]``."""
        grown = sizes + room
        if self.method is None:
            return grown
        pairs = zip(sizes.flat, self.budgets.flat, strict=True)
        most = [self.method.most(int(held), int(budget)) for held, budget in pairs]
        bounded: NDArray[np.int64] = np.minimum(grown, np.array(most).reshape(grown.shape))
        return bounded

    def bytes_of(self, entries: NDArray[Any]) -> NDArray[np.float64]:
        """Bytes of so many entries of each head, statistics included; at most, with a residual."""
        bits = 0 if self.method is None else self.method.entry_bits
        return held_bytes(entries, self.forms, self.residual, bits, self.keys.shape[-1])

    def _open(self, prompt: Prompt, signals: Signals, heads: list[int], slots: int) -> DecodeState:
        device = prompt.keys.device
        place = torch.arange(slots, device=device)
        real = place < torch.from_numpy(prompt.sizes).to(device)[..., None]
        positions = _widened(prompt.positions, slots).masked_fill(~real, FREE)
        return opened(self.method, signals, positions, torch.tensor(heads, device=device))

    def step(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention output of the next token; changes the cache.

        The token enters first and sees itself, so that it sees one entry more than the budget;
        what must leave does so afterwards.

        Args:
            queries: ``[B, H, G, D]`` float32.
            keys: ``[B, H, D]``.
            values: ``[B, H, D]``.

        Returns:
            Output ``[B, H, G, D]`` float32.
        """
        self.prepare()
        output = self.attend(queries, keys, values)
        self.count()
        return output

    def prepare(self) -> None:
        """What the host does before a step: make room, and say how many entries will leave."""
        if self.sizes.max(initial=0) == self.keys.shape[2]:
            self._add_slots()
        self.driver.prepare()
        self._store_oldest()

    @property
    def pattern(self) -> tuple[int, bool, bytes]:
        """Steps of the same pattern are the same operations on the same memory of the device."""
        return self.keys.shape[2], self._has_empty, self.driver.drops.tobytes()

    @property
    def _has_empty(self) -> bool:
        """Whether a slot is empty while the coming token attends."""
        return bool(self.sizes.min(initial=0) + 1 < self.keys.shape[2])

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the device does in a step; the arguments are those of ``step``.

        It follows from what ``prepare`` has left and never waits for the device, and all that
        outlives it stays where it lies, so that a CUDA graph of it can be replayed.
        """
        self._enter(keys, values)
        attention = self._attention(queries)
        output = attention @ self.values
        self.driver.observe(attention)
        if self.method is not None:
            self._evict(self.method)
        return output

    def count(self) -> None:
        """What the host notes after a step."""
        held = self.sizes + 1
        self.grew = bool((held > self.peak).any())
        if self.grew:
            self.peak = np.maximum(self.peak, held)
        self.evicted += self.driver.drops
        self.driver.count()
        self.entry_steps += self.sizes

    def _enter(self, keys: Tensor, values: Tensor) -> None:
        slot = self.state.positions.argmin(-1, keepdim=True)  # the first free one
        for held, new, form, role in zip(
            (self.keys, self.values), (keys, values), self.forms, ROLES, strict=True
        ):
            _put(held, slot, self._as_held(new[:, :, None], form, role))
        self.driver.enter(slot, keys, values)

    def _as_held(self, new: Tensor, form: Format, role: Role) -> Tensor:
        """A token as it is held when it enters: in 16 bits if there is a residual window."""
        if self.residual or self.forms == EXACT:
            return new
        one = torch.ones(new.shape[:2], dtype=torch.int64, device=new.device)
        return form.roundtrip(new, one, role)

    def _add_slots(self) -> None:
        """A block more of each head: every step reads all slots, so that few of them are empty."""
        state, slots = self.state, self.keys.shape[2] + _BLOCK
        self.keys, self.values = (_widened(x, slots) for x in (self.keys, self.values))
        state.positions = _widened(state.positions, slots, FREE)
        state.statistics = {name: _widened(x, slots) for name, x in state.statistics.items()}

    def _store_oldest(self) -> None:
        """Store the generated tokens that lie behind the residual window, a window's at a time."""
        state, stride = self.state, self.residual
        if self.forms == EXACT or not stride or state.generated % stride:
            return
        last = state.now - self.residual
        first = max(last - stride + 1, state.prompt_tokens)
        old = (state.positions >= first) & (state.positions <= last)
        chosen = old.float().topk(min(stride, old.shape[-1]), sorted=False)  # these, and others
        counts = torch.full(old.shape[:2], chosen.indices.shape[-1], device=old.device)
        for tensor, form, role in zip((self.keys, self.values), self.forms, ROLES, strict=True):
            at = chosen.indices[..., None].expand(-1, -1, -1, tensor.shape[-1])
            exact = tensor.gather(2, at)
            stored = form.roundtrip(exact, counts, role)
            tensor.scatter_(2, at, torch.where(chosen.values[..., None] > 0, stored, exact))

    def _attention(self, queries: Tensor) -> Tensor:
        """Probabilities over all slots ``[B, H, G, n]``, zero at empty ones."""
        keys = self.keys
        shift = None if self.method is None else self.method.shift(self.state)
        if shift is not None and self.rope is not None:
            keys = turn(keys, shift, self.rope)
        logits = (queries * self.scale) @ keys.transpose(-1, -2)
        if self._has_empty:
            logits.masked_fill_(self.state.positions[:, :, None] == FREE, -torch.inf)
        return logits.softmax(-1)

    def _evict(self, method: DecodeMethod) -> None:
        drops, positions = self.driver.drops, self.state.positions
        most = int(drops.max(initial=0))
        if not most:
            return
        if most > 1:
            positions.masked_fill_(self.driver.leaving(), FREE)
            return
        slot = method.leaving_one(self.state)
        if drops.all():
            positions.scatter_(-1, slot, FREE)
            return
        leaves = self.driver.sent_drops()[..., None] > 0
        stays = positions.gather(-1, slot)
        positions.scatter_(-1, slot, stays.masked_fill(leaves, FREE))

    def kept(self) -> list[list[list[int]]]:
        """Positions that each head holds, ascending, ``[B][H]``."""
        return self.driver.kept()

    def check_integrity(self) -> None:
        """Hold the books against the slots.

        Raises:
            KvtuneError: a head holds more or fewer tokens than were counted, or one twice.
        """
        ordered = self.state.positions.sort(-1).values
        held = (ordered != FREE).sum(-1)
        again = ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] != FREE)).sum(-1)
        counted = torch.from_numpy(self.sizes).to(held.device)
        for wrong in ((held != counted) | (again > 0)).nonzero().tolist():
            row, head = wrong
            raise KvtuneError(
                f"a head holds {held[row, head] - again[row, head]} tokens, "
                f"{counted[row, head]} were counted"
            )


def joined(caches: Sequence[SlotCache]) -> SlotCache:
    """Caches of equally long prompts as one: their first rows, then their second ones...

    Args:
        caches: of the same heads of one layer, under one method, which have not stepped.
    """
    if len(caches) == 1:
        return caches[0]
    found, slots = copy.copy(caches[0]), max(cache.keys.shape[2] for cache in caches)

    def counts_of(name: str) -> NDArray[np.int64]:
        rows = np.stack([getattr(cache, name) for cache in caches], 1)
        return rows.reshape(-1, rows.shape[-1])

    for name in ("budgets", "trimmed", "peak", "evicted", "entry_steps", "most"):
        setattr(found, name, counts_of(name))

    def rows_of(each: Iterable[Tensor], behind: int = 0) -> Tensor:
        return torch.stack([_widened(x, slots, behind) for x in each], 1).flatten(0, 1)

    states = [cache.state for cache in caches]
    found.keys = rows_of(cache.keys for cache in caches)
    found.values = rows_of(cache.values for cache in caches)
    positions = rows_of((state.positions for state in states), FREE)
    statistics = {
        name: rows_of(state.statistics[name] for state in states) for name in states[0].statistics
    }
    state = replace(states[0], positions=positions, statistics=statistics)
    found.driver = DecodeDriver(found.method, found.budgets, counts_of("sizes"), state)
    return found


def _widened(tensor: Tensor, slots: int, behind: int = 0) -> Tensor:
    """``[B, H, slots, ...]`` with the tensor at the front, one number behind; a copy."""
    wide = tensor.new_full((*tensor.shape[:2], slots, *tensor.shape[3:]), behind)
    wide[:, :, : tensor.shape[2]] = tensor
    return wide


def _put(tensor: Tensor, slot: Tensor, value: Tensor) -> None:
    """Write ``[B, H, 1, ...]`` into one slot of each head of ``[B, H, n, ...]``."""
    at = slot.reshape(*slot.shape, *(1,) * (tensor.dim() - 3)).expand_as(value)
    tensor.scatter_(2, at, value.to(tensor.dtype))
