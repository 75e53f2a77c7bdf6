"""Evicting while tokens are generated: what a method adds to its choice at the prompt's end.

Life of a method while decoding, one layer at a time: ``statistics`` says what is known of every
prompt token when the prompt is complete; the driver keeps the tokens that ``keep`` names. Each
generated token then enters a free slot with ``fresh`` statistics, made of its key and value,
attends to all that is live, itself included, and ``observe`` is given that row of attention.
``drops`` says how many entries must leave now, ``leaving`` which. The prompt's scores are the
``worth`` of the same statistics, so the two halves of a method cannot drift apart.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.policies.method import ScoredMethod
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

FREE = -1
"""The position of a slot that holds no token."""


@dataclass
class DecodeState:
    """What is remembered of the entries of one layer's cache, for several budgets at once.

    Slots are in no order; a token keeps its slot until it leaves.

    Args:
        positions: each slot's token, counted from the sequence's start, ``[B, H, n]`` int64;
            ``FREE`` where a slot is empty.
        prompt_tokens: P.
        statistics: the method's own, by name, ``[B, H, n, ...]``; of empty slots undefined.
        layer: which layer this is.
        heads: which of the layer's KV heads these are, ``[H]`` int64.
        generated: tokens that have entered since the prompt.
        pinned: how many tokens at the sequence's start and at its end never leave, ``[B, H, 1]``
            int64 each; none where not given.
        newest: position of the newest token, ``[B, H, 1]`` int64, where the driver counts on the
            device; ``now`` is meant where not given.
    """

    positions: Tensor
    prompt_tokens: int
    statistics: dict[str, Tensor]
    layer: int
    heads: Tensor
    generated: int = 0
    pinned: tuple[Tensor, Tensor] | None = None
    newest: Tensor | None = None

    @property
    def live(self) -> Tensor:
        """Slots that hold a token, ``[B, H, n]`` bool."""
        return self.positions != FREE

    @property
    def now(self) -> int:
        """Position of the newest token."""
        return self.prompt_tokens + self.generated - 1

    @property
    def protected(self) -> Tensor | None:
        """Slots whose token never leaves, ``[B, H, n]`` bool; None where no token is pinned.

        Those that hold no token are among them.
        """
        if self.pinned is None:
            return None
        first, last = self.pinned
        now = self.now if self.newest is None else self.newest
        return (self.positions < first) | (self.positions > now - last)


@dataclass(frozen=True)
class DecodeMethod(ScoredMethod):
    """A scored method that goes on evicting while tokens are generated."""

    @abstractmethod
    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """What is known of every prompt token when the prompt is complete, ``[H, P, ...]``."""

    @abstractmethod
    def worth(self, state: DecodeState) -> Tensor:
        """How much each entry is worth, ``[B, H, n]`` float32, finite where live."""

    def fresh(
        self, state: DecodeState, keys: Tensor, values: Tensor
    ) -> Mapping[str, float | Tensor]:
        """What a statistic starts from when a token enters; zero unless named. Changes nothing.

        Args:
            state: the newest token has its slot.
            keys: of the newest token after RoPE, ``[B, H, D]``.
            values: likewise.

        Returns:
            a number for all heads, or a tensor ``[B, H, ...]``.
        """
        return {}

    def enter(self, state: DecodeState, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write what ``fresh`` says into a slot of each head. Changes the state's statistics.

        Args:
            state: the newest token has its slot.
            slot: of each head, ``[B, H, 1]`` int64.
            keys: of the newest token after RoPE, ``[B, H, D]``.
            values: likewise.
        """
        fresh = self.fresh(state, keys, values)
        for name, statistic in state.statistics.items():
            shape = (*slot.shape, *statistic.shape[3:])
            at = slot.reshape(*slot.shape, *(1,) * (statistic.dim() - 3)).expand(shape)
            start = fresh.get(name, 0)
            if isinstance(start, float | int):
                statistic.scatter_(2, at, start)
            else:
                statistic.scatter_(2, at, start.unsqueeze(2).expand(shape).to(statistic.dtype))

    def observe(self, state: DecodeState, attention: Tensor) -> None:
        """Take note of the newest token's attention. Changes the state's statistics only.

        Args:
            state: the newest token has entered.
            attention: over all that is live, ``[B, H, G, n]`` float32; zero at empty slots.
        """

    def drops(
        self, sizes: NDArray[np.int64], budgets: NDArray[np.int64], generated: int
    ) -> NDArray[np.int64]:
        """How many entries leave each head now, ``[B, H]``; runs without torch.

        Args:
            sizes: entries held, the newest included.
            budgets: entries that may stay.
            generated: tokens that have entered since the prompt.
        """
        return (sizes - budgets).clip(0)

    def most(self, held: int, budget: int) -> int:
        """Most entries of a head at any time, the newest included.

        Args:
            held: when the prompt is complete.
            budget: entries that may stay.
        """
        return max(held, budget) + 1

    @property
    def trims_prompt(self) -> bool:
        """Whether the prompt is trimmed as soon as it is complete."""
        return True

    @property
    def entry_bits(self) -> int:
        """Bits of statistics that a runtime holds beside each entry of a KV head."""
        return 0

    @property
    def reads_step_number(self) -> bool:
        """Whether ``state.now`` or ``state.generated`` is read, which only the host counts.

        In ``fresh``, ``observe``, ``worth`` or ``shift``; no graph can replay such a step.
        """
        return False

    def shift(self, state: DecodeState) -> Tensor | None:
        """Positions by which each key appears later than its own, ``[B, H, n]``; None for none."""
        return None

    def check_heads(self, budgets: NDArray[np.int64]) -> None:
        """Refuse budgets ``[B, H]`` of one layer that the method cannot tell apart."""

    def scores(self, signals: Signals) -> Tensor:
        """The worth of every prompt token when the prompt is complete."""
        return self.worth(self.open(signals))[0]

    def open(self, signals: Signals) -> DecodeState:
        """The state when the prompt is complete and nothing has left, ``[1, H, P, ...]``."""
        import torch

        heads, tokens, _ = signals.keys.shape
        device = signals.keys.device
        positions = torch.arange(tokens, device=device).expand(1, heads, -1)
        return opened(self, signals, positions, torch.arange(heads, device=device))

    def pin(self, budgets: NDArray[np.int64], device: str | torch.device) -> tuple[Tensor, Tensor]:
        """How many first and last tokens never leave under each budget, ``[B, H, 1]`` each."""
        import torch

        def bounds(budget: int) -> tuple[int, int]:
            first, last = self.protected(budget)
            first = min(first, budget)
            return first, min(last, budget - first)

        both = torch.tensor([[bounds(int(b)) for b in row] for row in budgets], device=device)
        return both[..., :1], both[..., 1:]

    def leaving(self, state: DecodeState, drops: Tensor, most: int | None = None) -> Tensor:
        """Which entries leave, ``[B, H, n]`` bool: the least worth, of equals the older.

        Args:
            state: is not changed.
            drops: how many of each head's live entries, ``[B, H]`` int64.
            most: the largest of them, where the caller has it on the host: mostly one entry leaves,
                and so many need not be sorted.
        """
        import torch

        worth, protected = self.worth(state), state.protected
        if protected is not None:
            worth = worth.masked_fill(protected, torch.inf)
        never = torch.iinfo(torch.int64).max
        keys = _order(worth, state.positions).masked_fill(~state.live, never)
        beyond = torch.full_like(keys[..., :1], never)  # where all that is live leaves
        few = keys.shape[-1] if most is None else min(most + 1, keys.shape[-1])
        least = keys.topk(few, largest=False).values
        ascending = torch.cat((least, beyond), -1)
        return keys < ascending.gather(-1, drops[..., None])

    def leaving_one(self, state: DecodeState) -> Tensor:
        """The slot of the entry that ``leaving`` names where one leaves each head, ``[B, H, 1]``.

        As nearly always while tokens are generated; no entries are sorted for it.
        """
        import torch

        live, kept = state.live, state.protected
        worth = self.worth(state).float().masked_fill(~live if kept is None else kept, torch.inf)
        least = live & (worth == worth.amin(-1, keepdim=True))
        never = torch.iinfo(torch.int64).max
        return torch.where(least, state.positions, never).argmin(-1, keepdim=True)


def opened(
    method: DecodeMethod | None, signals: Signals, positions: Tensor, heads: Tensor
) -> DecodeState:
    """What is remembered of the prompt tokens that some heads hold.

    Args:
        method: whose statistics are kept of them; None for a cache that only grows.
        signals: of the whole layer.
        positions: of the held tokens, ``[B, H, n]`` int64; ``FREE`` where a slot is empty.
        heads: which of the layer's KV heads these are, ``[H]`` int64.
    """
    known = {} if method is None else method.statistics(signals)
    at = heads[None, :, None], positions.clamp_min(0)
    statistics = {name: each[at] for name, each in known.items()}
    return DecodeState(positions, signals.prompt_tokens, statistics, signals.layer, heads)


def _order(worth: Tensor, positions: Tensor) -> Tensor:
    """One integer an entry that sorts by worth, then by position: exact, and without ties."""
    import torch

    bits = (worth.float() + 0.0).contiguous().view(torch.int32)  # + 0.0 makes -0.0 plain zero
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ascending.long() << 32) | positions.clamp_min(0)


def refuse_unequal(name: str, budgets: NDArray[np.int64]) -> None:
    """Refuse one layer's budgets ``[B, H]`` where heads that share a choice differ."""
    if budgets.size and (budgets != budgets[:, :1]).any():
        raise KvtuneError(
            f"{name} keeps the same tokens in all heads of a layer, whose budgets differ",
            hint="give the heads of a layer equal budgets, or let each head choose alone.",
        )
