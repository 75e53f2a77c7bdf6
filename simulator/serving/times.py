"""How long an engine's steps take: the latency model on a grid, read between its points.

A step of decoding is looked up by sequences and by the mean lengths of what they hold. A step that
also reads prompts is one pass over all its new tokens, with each chunk's attention to the tokens
before it and with what decoding takes longer for its caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from kvtune.common.estimate import Tier
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.cost import cache_bytes_by_format
from kvtune.simulator.latency.compression import compression
from kvtune.simulator.latency.measured import TIERS
from kvtune.simulator.latency.overheads import transfer
from kvtune.simulator.latency.steps import Times, decode_steps, prefill, prefills
from kvtune.simulator.memory.weights import WeightFormat

End = Literal["value", "low", "high"]
PROMPTS, GENERATED, PASSES, COMPRESSIONS = 17, 9, 1025, 33  # points of the grids


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


@dataclass(frozen=True)
class Load:
    """What the grids must cover.

    Args:
        sequences: the most at once.
        prompts: shortest and longest prompt, tokens.
        output_tokens: of the longest answer.
        step_tokens: the most new tokens of a step.
        block_bytes: of one block of cache.
    """

    sequences: int
    prompts: tuple[int, int]
    output_tokens: int
    step_tokens: int
    block_bytes: int


def step_times(
    shape: ModelShape,
    gpu: GpuProfile,
    weights: WeightFormat,
    policy: Policy | None,
    load: Load,
) -> dict[End, StepTimes]:
    """The likely times and both ends of their intervals.

    Args:
        shape: the model.
        gpu: the card.
        weights: format of the matrices.
        policy: for the shape; None for the uncompressed cache.
        load: what may occur.
    """
    prompts = np.linspace(*load.prompts, PROMPTS if load.prompts[1] > load.prompts[0] else 1)
    generated = np.linspace(0, load.output_tokens, GENERATED)
    longest = max(load.prompts[1] + load.output_tokens, load.step_tokens + load.sequences)
    tokens = np.linspace(1, max(longest, 2), PASSES)
    decode = _decoding(shape, gpu, weights, policy, load, prompts, generated)
    empty = decode_steps(shape, gpu, weights, np.arange(1, load.sequences + 1), 0.0, "runtime")
    passes = prefills(shape, gpu, weights, tokens, execution="runtime")
    squeezed = _compressing(shape, gpu, weights, policy, load.prompts)
    copy = transfer(gpu, load.block_bytes * np.array([0.0, 1024.0]), "device_to_host")
    parts = (decode, empty, passes, squeezed, copy)
    tier = TIERS[max(TIERS.index(part.tier) for part in parts[:4])]

    def at_end(end: End) -> StepTimes:
        table, nothing, whole, after, copied = (getattr(part, f"{end}_s") for part in parts)
        return StepTimes(
            prompts=Curve(*load.prompts, prompts),
            generated=Curve(0, load.output_tokens, generated),
            decode=[table[0].tolist(), *table.tolist()],
            empty=[0.0, *nothing.tolist()],
            whole_pass=Curve(1, tokens[-1], whole),
            compute=Curve(0, tokens[-1], _compute_bound(tokens, whole)),
            compressing=Curve(*load.prompts, after),
            copy_s=(float(copied[0]), float(copied[1] - copied[0]) / 1024),
            tier=tier,
        )

    return {end: at_end(end) for end in ("value", "low", "high")}


def _decoding(
    shape: ModelShape,
    gpu: GpuProfile,
    weights: WeightFormat,
    policy: Policy | None,
    load: Load,
    prompts: NDArray[np.float64],
    generated: NDArray[np.float64],
) -> Times:
    """Decode steps, ``[sequences, prompts, generated]``."""
    grown = np.array(
        [[shape.kv_bytes(int(p + g)) - shape.kv_bytes(int(p)) for g in generated] for p in prompts]
    )
    stored: list[dict[str, float]] = [
        {"bf16": shape.kv_bytes(int(p))}
        if policy is None
        else dict(cache_bytes_by_format(policy, shape, int(p)))
        for p in prompts
    ]
    by_format = {
        name: np.array([each.get(name, 0.0) for each in stored])[:, None] + grown * (name == "bf16")
        for name in dict.fromkeys(["bf16", *(name for each in stored for name in each)])
    }
    batch = np.arange(1, load.sequences + 1)[:, None, None]
    return decode_steps(shape, gpu, weights, batch, by_format, "runtime")


def _compressing(
    shape: ModelShape,
    gpu: GpuProfile,
    weights: WeightFormat,
    policy: Policy | None,
    prompts: tuple[int, int],
) -> Times:
    """Compressing a prompt, at evenly spaced lengths."""
    if policy is None:
        nothing = np.zeros(2)
        return Times(nothing, nothing, nothing, TIERS[0])
    lengths = np.linspace(*prompts, COMPRESSIONS).astype(int).tolist()
    found = [
        compression(policy, shape, gpu, length, prefill(shape, gpu, weights, length, 1, "runtime"))
        for length in lengths
    ]
    value, low, high = (
        np.array([getattr(each, end) for each in found]) for end in ("value", "low", "high")
    )
    known = [each.tier for each in found if each.tier in TIERS]
    return Times(value, low, high, max(known, key=TIERS.index, default=TIERS[0]))


def _compute_bound(
    tokens: NDArray[np.float64], seconds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Seconds of passes as if the shortest were as efficient as the best, from 0 tokens on."""
    best = int(np.argmin(seconds / tokens))
    line = tokens * seconds[best] / tokens[best]
    bound = np.where(np.arange(len(tokens)) < best, line, seconds)
    even = np.linspace(0, tokens[-1], len(tokens))
    return np.asarray(np.interp(even, [0, *tokens], [0, *bound]))
