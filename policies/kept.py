"""What the heads of a layer keep of its prompt: the parts that their methods choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtune.policies.option import Option
from kvtune.policies.parts import HeadPart, Part
from kvtune.policies.signals import Signals

Rows = Sequence[Sequence[Option]]
"""Options of each policy's heads, ``[B][H]``."""

Budgets = Sequence[Sequence[int]]
"""Tokens of each policy's heads, ``[B][H]``."""


@dataclass(frozen=True)
class Kept:
    """What heads store of a layer's prompt, before any format.

    Args:
        parts: of every row, counted through ``[B, H]``.
        numbers: which of the layer's KV heads the H are.
    """

    parts: list[list[HeadPart]]
    numbers: tuple[int, ...]

    @property
    def heads(self) -> int:
        """How many KV heads these are, H."""
        return len(self.numbers)

    @property
    def sizes(self) -> list[int]:
        """Entries of each row, all parts together."""
        return [sum(len(part.tokens) for part in row) for row in self.parts]

    @property
    def tokens(self) -> list[Tensor]:
        """Token indices of each row, one part behind the other; ``VIRTUAL`` where it is none."""
        return [
            row[0].tokens if len(row) == 1 else torch.cat([part.tokens for part in row])
            for row in self.parts
        ]


def ask(
    rows: Rows,
    budgets: Budgets,
    signals: Signals,
    *,
    heads: Sequence[int] | None = None,
    goes_on: bool = False,
) -> Kept:
    """Ask each head's method; heads and policies that share a choice ask once.

    Args:
        rows: options ``[B][H]``.
        budgets: ``[B][H]``.
        signals: of the whole layer.
        heads: which of the layer's KV heads these are; all unless given.
        goes_on: whether these heads evict on while tokens are generated. They then hold tokens as
            they are: what a merge makes of those that left is for a prompt that is trimmed once.
    """
    wanted = [
        (option.method, budget)
        for options, planned in zip(rows, budgets, strict=True)
        for option, budget in zip(options, planned, strict=True)
    ]
    chosen: dict[object, list[Part]] = {
        (method, budget): [Part(method.keep(signals, budget))]
        if goes_on
        else method.parts(signals, budget)
        for method, budget in dict.fromkeys(wanted)
    }
    numbers = tuple(range(len(rows[0])) if heads is None else heads)
    parts = [
        [part.of_head(numbers[at % len(numbers)]) for part in chosen[choice]]
        for at, choice in enumerate(wanted)
    ]
    return Kept(parts, numbers)
