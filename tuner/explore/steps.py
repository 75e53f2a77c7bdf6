"""Decode steps of many plans at once: kernels, the host's part, reading back; and pages that land.

Which heads share a layer decides about the host, so that this needs every plan's heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtune.common.estimate import Tier
from kvtune.policies.host_pages import arriving_pages
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import share_of_slab
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import TIERS, Times
from kvtune.simulator.latency.host import HostWork, head_work, host_seconds
from kvtune.simulator.latency.read_back import read_back_step, reads_back
from kvtune.simulator.latency.steps import decode_steps
from kvtune.simulator.memory.weights import WeightFormat
from kvtune.tuner.explore.plans import Floats, Integers

Heads = NDArray[np.integer]
RANKS: tuple[Tier, ...] = (*TIERS, "assumed")


class Taken(NamedTuple):
    """Seconds of a step, value, low and high, ``[n, 3]``, and their ranks in ``RANKS``, ``[n]``."""

    seconds: Floats
    ranks: NDArray[np.intp]


def kernels(
    shape: ModelShape, gpu: GpuProfile, weights: WeightFormat, read: Mapping[str, Floats],
    sequences: Integers,
) -> Taken:  # fmt: skip
    """What kernels take of a step of all sequences that read so many bytes, by format."""
    times = decode_steps(shape, gpu, weights, sequences, read, "runtime")
    alike = np.full(len(sequences), RANKS.index(times.tier))
    return Taken(_ends(times), alike if times.tiers is None else times.tiers)


def together(parts: Sequence[Taken]) -> tuple[Floats, NDArray[np.str_]]:
    """Value, low and high of whole steps, ``[n, 3]``, and the tier of each, ``[n]``."""
    seconds = np.sum([part.seconds for part in parts], axis=0)
    return seconds, np.array(RANKS)[np.max([part.ranks for part in parts], axis=0)]


def _ends(times: Times) -> Floats:
    return np.stack([times.value_s, times.low_s, times.high_s], axis=-1)


def landing(
    shape: ModelShape, options: Sequence[Option], heads: Heads | None, contexts: Integers
) -> Floats:
    """Bytes where pages from the host land, the largest layer's of each size, ``[n]``."""
    found = np.zeros(len(contexts))
    for rows, layers, context in _on_host(shape, options, heads, contexts):
        pages = [
            arriving_pages(o, o.budget.resolve(context), context, shape.head_dim) for o in options
        ]
        for layout in {layout for each in pages for layout in each}:
            counts = np.array([each[layout] for each in pages])
            found[rows] += share_of_slab(layout) * counts[layers].sum(2).max(1)
    return found.round()


def from_host(
    shape: ModelShape, gpu: GpuProfile, options: Sequence[Option], heads: Heads | None,
    contexts: Integers, sequences: Integers,
) -> Taken:  # fmt: skip
    """What heads on the host take of a step of all sequences."""
    found = Taken(np.zeros((len(contexts), 3)), np.zeros(len(contexts), np.intp))
    away: NDArray[np.bool_] = np.array([option.on_host for option in options], bool)
    for rows, layers, context in _on_host(shape, options, heads, contexts):
        each = [head_work(o, o.budget.resolve(context), context, shape) for o in options]
        work = np.take(np.array(each, np.float64), layers, axis=0).sum(axis=2)
        # Of layers without such heads nothing counts.
        using = np.isin(layers, np.flatnonzero(away)).any(axis=2, keepdims=True)
        searched = np.any(work[..., HostWork._fields.index("compared")] > 0, axis=1)
        for alike in (searched, ~searched):  # the tier of a search is another
            chosen = rows[alike]
            times = host_seconds(work[alike], gpu, sequences[chosen, None])
            found.seconds[chosen] = (_ends(times) * np.compress(alike, using, axis=0)).sum(1)
            found.ranks[chosen] = RANKS.index(times.tier)
    return found


def _on_host(
    shape: ModelShape, options: Sequence[Option], heads: Heads | None, contexts: Integers
) -> Iterator[tuple[NDArray[np.intp], Heads, int]]:
    """Rows of plans with heads on the host, those heads ``[rows, L, H]``, and their context."""
    away: NDArray[np.bool_] = np.array([option.on_host for option in options], bool)
    if heads is None or not away.any():
        return
    uses = np.any(np.take(away, heads), axis=1)
    for context in np.unique(contexts[uses]).tolist():
        rows = np.flatnonzero(uses & (contexts == context))
        yield rows, heads[rows].reshape(-1, shape.layers, shape.kv_heads), context


def reading_back(
    shape: ModelShape, gpu: GpuProfile, given: Sequence[Policy], counts: Floats,
    contexts: Integers, sequences: Integers,
) -> Taken:  # fmt: skip
    """What formats that no kernel reads take of a step of all sequences."""
    found = Taken(np.zeros((len(contexts), 3)), np.zeros(len(contexts), np.intp))
    lacking = np.array([reads_back(policy, shape.head_dim) for policy in given], bool)
    rows = counts[:, lacking].sum(1) > 0
    for context in np.unique(contexts[rows]).tolist():
        alike = rows & (contexts == context)
        each = [read_back_step(policy, shape, gpu, 1, context) for policy in given]
        ends = np.array([(one.value, one.low, one.high) for one in each])
        found.seconds[alike] = sequences[alike, None] * (counts[alike] @ ends)
    found.ranks[rows] = RANKS.index("assumed")
    return found
