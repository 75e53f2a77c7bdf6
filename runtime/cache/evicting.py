"""Evicting from pages while tokens are generated: a method's statistics beside a layer's rows.

The steps are ``policies/decode_driver.py``'s. Here places are dense, place n of the statistics is
place n of the row's growing segment, and what is last moves to where something has left. Only
counts are known to the host: nobody waits for the device. Heads that store fewer than 16 bits are
those of ``coded_evicting.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.common.errors import KvtuneError
from kvtune.policies.decode import FREE, DecodeMethod, DecodeState, opened
from kvtune.policies.decode_driver import DecodeDriver
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.option import Option
from kvtune.policies.pages import PageLayout
from kvtune.policies.placement import evicts_coded, pages_of
from kvtune.policies.policy import Policy
from kvtune.policies.room import Room, goes_on_evicting
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.backend import AttentionSeen, Moves
from kvtune.runtime.cache.leaving import leave
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.segments import GROWN, Ints, Leaving
from kvtune.runtime.cache.watching import columns_of, weights_at


def check_evicting(policy: Policy, head_dim: int) -> None:
    """Refuse heads that would have to evict from pages whose tokens share scales.

    Raises:
        KvtuneError: names the option.
    """
    for option in dict.fromkeys(filter(goes_on_evicting, policy.options())):
        if {option.keys, option.values} != {Bf16()} and not evicts_coded(option, head_dim):
            raise KvtuneError(
                f"{option.label!r} would evict from quantised pages, whose tokens share scales",
                hint="where a method evicts while generating, use bf16 or integers by token, as "
                "int4 with keys_by: token or rotated_int4; or leave out evicts=True.",
            )


@dataclass(frozen=True)
class Opening:
    """One sequence's heads under one method, when its prompt is stored.

    Args:
        method: evicts.
        sequence: its place in the batch.
        heads: KV heads of the layer.
        rooms: one a head.
        state: ``[1, heads, n, ...]``, what is kept of the prompt; places in order of position.
        layout: of the pages that it lies in.
    """

    method: DecodeMethod
    sequence: int
    heads: tuple[int, ...]
    rooms: tuple[Room, ...]
    state: DecodeState
    layout: PageLayout


def openings(
    options: Sequence[Option],
    rooms: Sequence[Room | None],
    sequence: int,
    kept: Sequence[Tensor],
    signals: Signals,
) -> list[Opening]:
    """What one sequence's heads of a layer start from, head by head that goes on evicting.

    Args:
        options: of the layer's heads.
        rooms: theirs; None where a head only grows.
        sequence: its place in the batch.
        kept: tokens of each head, ascending.
        signals: of the layer.
    """
    together: dict[tuple[DecodeMethod, PageLayout], list[int]] = {}
    for head, (option, room) in enumerate(zip(options, rooms, strict=True)):
        if room is not None and isinstance(option.method, DecodeMethod):
            layout = pages_of(option, signals.keys.shape[-1])
            together.setdefault((option.method, layout), []).append(head)
    found = []
    for (method, layout), heads in together.items():
        state = _opened(method, heads, [kept[head] for head in heads], signals)
        theirs = tuple(room for head in heads if (room := rooms[head]) is not None)
        found.append(Opening(method, sequence, tuple(heads), theirs, state, layout))
    return found


def _opened(
    method: DecodeMethod, heads: list[int], kept: list[Tensor], signals: Signals
) -> DecodeState:
    positions = pad_sequence(kept, batch_first=True, padding_value=FREE)[None]
    state = opened(method, signals, positions, torch.tensor(heads, device=positions.device))
    if signals.rope is not None and method.shift(state) is not None:
        raise KvtuneError(
            f"{method.label} turns keys at every step; a page holds them as they came",
            hint="keep positions, which differs in the sinks' distance alone.",
        )
    return state


class Evictor:
    """Some heads of one layer under one method, of sequences whose prompts are equally long."""

    def __init__(self, found: Sequence[Opening], heads: int, window: int = 0) -> None:
        """Take over prompts.

        Args:
            found: of one method, the same heads and the same prompt length.
            heads: KV heads of the layer.
            window: places of the statistics beyond those of entries in the first segment.
        """
        first = found[0]
        self.method = first.method
        budgets = np.array([[room.budget for room in each.rooms] for each in found])
        sizes = np.array([[room.prompt for room in each.rooms] for each in found])
        rows = [[each.sequence * heads + head for head in each.heads] for each in found]
        self.rows: Ints = np.array(rows)
        places = max(room.most for each in found for room in each.rooms) + window
        device = first.state.positions.device
        states = [each.state for each in found]
        statistics = {
            name: _joined([state.statistics[name] for state in states], places, 0)
            for name in first.state.statistics
        }
        state = DecodeState(
            _joined([state.positions for state in states], places, FREE),
            first.state.prompt_tokens, statistics, first.state.layer, first.state.heads,
        )  # fmt: skip
        self.driver = DecodeDriver(self.method, budgets, sizes, state)
        self.held = state.live.sum(-1, keepdim=True)
        self._rows = torch.as_tensor(self.rows, device=device)
        self._row_numbers = self._rows.flatten().int()
        self._seen_by: object = None  # the layer's tables that the columns are of
        self._columns: Tensor

    @cached_property
    def watches(self) -> bool:
        """Whether the method looks at attention."""
        return type(self.method).observe is not DecodeMethod.observe

    def enter(self, layer: PagedLayer, keys: Tensor, values: Tensor) -> None:
        """Note the newest token of every row of the layer, ``[rows, D]`` after RoPE."""
        self.driver.prepare()
        self.driver.enter(self.held, keys[self._rows], values[self._rows])
        self.held += 1

    def observe(self, layer: PagedLayer, seen: AttentionSeen) -> None:
        """Pass on what the newest token attended to."""
        if self._seen_by is not layer.paged:  # tables were laid out anew
            self._seen_by, self._columns = layer.paged, self._columns_of(layer)
        live = self.driver.state.live
        self.driver.observe(weights_at(self._columns, self._rows, live, seen))

    def _columns_of(self, layer: PagedLayer) -> Tensor:
        """Where attention to each place is seen, ``[B, H, n]``."""
        return columns_of(layer, GROWN, self._rows, self.driver.state.positions.shape[-1])

    def evict(self, layer: PagedLayer) -> None:
        """Let go of what must leave now, in the layer's pages too.

        Mostly one entry of each head leaves: that takes fewer operations.
        """
        drops = self.driver.drops
        if (drops == 1).all():
            self._let_one_go(layer, self.method.leaving_one(self.driver.state))
        elif drops.any():
            self._let_go(layer, self.driver.leaving(), int(drops.max()))
        self.driver.count()

    def _let_one_go(self, layer: PagedLayer, gone: Tensor) -> None:
        """The entry at a place ``[B, H, 1]`` of each head leaves."""
        last = self.held - 1
        self._fill(gone, last)
        self.held -= 1
        moves = Moves(self._row_numbers, last.view(-1, 1).int(), gone.view(-1, 1).int())
        left = torch.ones_like(self._row_numbers)
        leave(layer, Leaving(self.rows.ravel(), moves, self.driver.drops.ravel(), left))

    def _fill(self, gone: Tensor, last: Tensor) -> None:
        """What is remembered of a segment's last entry moves to where one has left."""
        state = self.driver.state
        for each in (state.positions, *state.statistics.values()):
            put_at(each, gone, at(each, last))
        state.positions.scatter_(-1, last, FREE)

    def _let_go(self, layer: PagedLayer, leaving: Tensor, most: int) -> None:
        """Entries leave, ``[B, H, n]``, of any head so many at most."""
        left = self.driver.sent_drops()[..., None]
        moves = self._leave(slice(None), leaving, self.held, left, most)
        drops = self.driver.drops.ravel()
        leave(layer, Leaving(self.rows.ravel(), moves, drops, left.flatten().int()))

    def _leave(
        self, places: slice, leaving: Tensor, held: Tensor, left: Tensor, most: int
    ) -> Moves:
        """Entries of one segment are no longer remembered; what moves where they were.

        Args:
            places: of the segment's entries among those of the statistics.
            leaving: which leave, ``[B, H, places]``.
            held: entries of the segment, ``[B, H, 1]``; is counted down.
            left: how many leave, likewise.
            most: of them, of any head.
        """
        sources, targets = moves_within(leaving, held, left, most)
        state = self.driver.state
        held -= left
        for each in (state.positions, *state.statistics.values()):
            mine = each[:, :, places]
            put_at(mine, targets, at(mine, sources))
        place = torch.arange(leaving.shape[-1], device=left.device)
        state.positions[:, :, places].masked_fill_(place >= held, FREE)
        by_row = -1, sources.shape[-1]
        return Moves(
            self._row_numbers,
            sources.reshape(by_row).int(),
            targets.reshape(by_row).int(),
        )

    def forget(self, rows: range) -> bool:
        """Evict no more from rows whose sequence has ended; whether others are left."""
        stays = ~np.isin(self.rows[:, 0], rows)
        at = torch.from_numpy(stays).to(self._rows.device)
        self.driver.forget(stays)
        self.rows, self._rows, self.held = self.rows[stays], self._rows[at], self.held[at]
        self._row_numbers, self._seen_by = self._rows.flatten().int(), None
        return bool(stays.any())

    def kept(self) -> dict[int, list[int]]:
        """Positions that each row holds, ascending."""
        held = (head for sequence in self.driver.kept() for head in sequence)
        return dict(zip(self.rows.ravel().tolist(), held, strict=True))


def alike(found: Sequence[Opening]) -> list[list[Opening]]:
    """Those of one method, layout, heads and prompt length, which step together."""
    groups: dict[tuple[DecodeMethod, PageLayout, tuple[int, ...], int], list[Opening]] = {}
    for each in found:
        key = each.method, each.layout, each.heads, each.state.prompt_tokens
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def moves_within(leaving: Tensor, held: Tensor, left: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Places ``[B, H, most]`` that are read, and written; both the last one where none is.

    Args:
        leaving: which entries leave, ``[B, H, n]``.
        held: entries, ``[B, H, 1]``.
        left: how many leave, likewise.
        most: of them, of any head.
    """
    stay = held - left
    last = leaving.shape[-1] - 1
    place = torch.arange(last + 1, device=leaving.device)
    late = (place >= stay) & (place < held) & ~leaving
    holes = (place < stay) & leaving
    none = place.new_tensor(last)
    sources, targets = (place.where(x, none).sort(-1).values for x in (late, holes))
    return sources[..., :most], targets[..., :most]


def _joined(tensors: Sequence[Tensor], places: int, empty: int) -> Tensor:
    """``[B, H, places, ...]`` of ``[1, H, n, ...]`` each, ``empty`` behind."""
    one = tensors[0]
    shape = (len(tensors), one.shape[1], places, *one.shape[3:])
    wide = one.new_full(shape, empty)
    for row, tensor in enumerate(tensors):
        wide[row, :, : tensor.shape[2]] = tensor[0]
    return wide


def at(tensor: Tensor, places: Tensor) -> Tensor:
    """``[B, H, m, ...]`` of ``[B, H, n, ...]`` at ``[B, H, m]``."""
    return tensor.gather(2, _wide(places, tensor))


def put_at(tensor: Tensor, places: Tensor, value: Tensor) -> None:
    """Write ``[B, H, m, ...]`` at ``[B, H, m]``."""
    tensor.scatter_(2, _wide(places, tensor), value)


def _wide(places: Tensor, tensor: Tensor) -> Tensor:
    wide = places.reshape(*places.shape, *(1,) * (tensor.dim() - 3))
    return wide.expand(*places.shape, *tensor.shape[3:])
