"""Seconds of an engine's steps, read from grids between their points.

A step of decoding is looked up by sequences and by the mean lengths of what they hold. A step that
also reads prompts is one pass over all its new tokens, with each chunk's attention to the tokens
before it and with what decoding takes longer for its caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvtune.common.estimate import Tier

End = Literal["value", "low", "high"]


class Chunk(NamedTuple):
    """Tokens of one prompt that a step reads.

    Args:
        start: tokens of it that are already held.
        tokens: that are read now.
    """

    start: int
    tokens: int


class Curve:
    """A function of one number, piecewise linear between evenly spaced points."""

    def __init__(self, first: float, last: float, values: npt.ArrayLike) -> None:
        self.values: list[float] = np.asarray(values, float).tolist()
        self.first = first
        self.scale = (len(self.values) - 1) / (last - first) if last > first else 0.0
        self.last_cell = max(len(self.values) - 2, 0)

    def place(self, x: float) -> tuple[int, float]:
        """The cell that ``x`` lies in and its share of the way through; ends hold beyond them."""
        at = (x - self.first) * self.scale
        if at <= 0:
            return 0, 0.0
        cell = int(at)
        return (cell, at - cell) if cell <= self.last_cell else (self.last_cell, 1.0)

    def at(self, x: float) -> float:
        """The value at ``x``."""
        cell, share = self.place(x)
        low = self.values[cell]
        return low + share * (self.values[cell + 1] - low) if share else low


class EngineTimes(Protocol):
    """What an engine asks of the times of its steps, in seconds; lengths are means."""

    @property
    def tier(self) -> Tier:
        """The tier of the least certain time."""

    @property
    def compressing(self) -> Curve:
        """What compressing a prompt takes beside reading it, by its tokens."""

    def decoding(self, sequences: int, prompt: float, generated: float) -> float:
        """Seconds of one decode step."""

    def mixed(
        self, sequences: int, prompt: float, generated: float, chunks: Iterable[Chunk]
    ) -> float:
        """Seconds of a step that reads chunks of prompts beside decoding."""

    def copying(self, blocks: int) -> float:
        """Seconds of a copy of so many blocks between host and device."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of an engine's steps.

    Args:
        prompts: places on the axis of prompt lengths.
        generated: places on the axis of generated lengths.
        decode: seconds of a decode step, by sequences, prompt and generated place; row 0 is of no
            sequence.
        empty: seconds of a decode step over empty caches, by sequences.
        whole_pass: seconds of reading so many tokens as one prompt.
        compute: the same without what short passes take longer.
        compressing: seconds that compressing a prompt takes beside reading it, by its tokens.
        copy_s: seconds of one copy between host and device and of each block in it.
        tier: of the least certain time.
        tiers: of each part of a step, by what it does.
    """

    prompts: Curve
    generated: Curve
    decode: list[list[list[float]]]
    empty: list[float]
    whole_pass: Curve
    compute: Curve
    compressing: Curve
    copy_s: tuple[float, float] = (0.0, 0.0)
    tier: Tier = "assumed"
    tiers: dict[str, Tier] = field(default_factory=dict)

    def decoding(self, sequences: int, prompt: float, generated: float) -> float:
        """Seconds of one decode step.

        Args:
            sequences: that get a token.
            prompt: mean tokens of their prompts.
            generated: mean tokens of their answers that are held.
        """
        rows = self.decode[sequences]
        p, along = self.prompts.place(prompt)
        g, across = self.generated.place(generated)
        left, right = rows[p], rows[p + 1] if along else rows[p]
        first = left[g] + along * (right[g] - left[g])
        if not across:
            return first
        last = left[g + 1] + along * (right[g + 1] - left[g + 1])
        return first + across * (last - first)

    def mixed(
        self, sequences: int, prompt: float, generated: float, chunks: Iterable[Chunk]
    ) -> float:
        """Seconds of a step that reads chunks of prompts beside decoding."""
        compute = self.compute.at
        new, seconds = float(sequences), compute(sequences)
        for start, tokens in chunks:
            new += tokens
            seconds += compute(start + tokens) - compute(start)
        seconds += self.whole_pass.at(new) - compute(new)
        if sequences:
            seconds += self.decoding(sequences, prompt, generated) - self.empty[sequences]
        return seconds

    def copying(self, blocks: int) -> float:
        """Seconds of a copy of so many blocks between host and device."""
        return self.copy_s[0] + self.copy_s[1] * blocks
