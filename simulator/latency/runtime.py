"""Decode steps of kvtune's own runtime: fused modules around attention over pages.

A step is its matrices, its attention over pages and a rest. Whole steps were measured of a few
models (op ``runtime_step``); what they say of the rest, and of attention with narrower heads than
the pages were measured with, holds for models between them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import HALF_WIDTH, TIERS, Answer, answer_of_tier
from kvtune.simulator.latency.kernels import FloatArray, Kernels
from kvtune.simulator.latency.learned import by_model, by_width
from kvtune.simulator.latency.pages import in_16_bits, narrow_pages, paged_attention
from kvtune.simulator.latency.parts import layer_rest, matrix_products, step_rest
from kvtune.simulator.latency.terms import matrices_in_format
from kvtune.simulator.latency.transfer import Tables
from kvtune.simulator.memory.weights import WeightFormat


class Learned(NamedTuple):
    """What one model's steps say.

    Args:
        shape: the model.
        factor: its attention over that of the pages' heads, for the same bytes.
        batches: ascending.
        rest_s: seconds a layer beside matrices and attention, at each batch.
        misfit: the largest relative error of what is learned over the steps it was learned from.
    """

    shape: ModelShape
    factor: float
    batches: FloatArray
    rest_s: FloatArray
    misfit: float


def runtime_steps(
    tables: Tables,
    gpu: GpuProfile,
    shape: ModelShape,
    weight_format: WeightFormat,
    batch: FloatArray,
    cache: Mapping[str, FloatArray],
) -> Answer | None:
    """Steps of the runtime; None where no pages, or none of its steps, were measured.

    Args:
        tables: kernel times of the card.
        gpu: the card.
        shape: a shape that they cover.
        weight_format: of the matrices.
        batch: sequences.
        cache: bytes a sequence over all layers by format, of the same shape as ``batch``.
    """
    known = learned_steps(tables.whole)
    if not tables.kernels.paged_formats or not known:
        return None
    floor = paged_attention(tables.kernels, shape, batch, {})
    factor = by_width(shape, known, [np.asarray(each.factor) for each in known])
    read, rest = _matrices(tables.kernels, shape, batch), _rest(tables.kernels, known, shape, batch)
    value, low, high = (
        factor * (floor + _beyond(floor, tables.kernels, shape, batch, cache, end))
        + rest
        + matrices_in_format(read, shape, gpu, weight_format, batch, end)
        for end in ("value", "low", "high")
    )
    tiers = _tiers(tables, known, shape, weight_format, batch, cache)
    return answer_of_tier(value, low, high, tiers)


def _beyond(
    floor: FloatArray,
    kernels: Kernels,
    shape: ModelShape,
    batch: FloatArray,
    cache: Mapping[str, FloatArray],
    end: str,
) -> FloatArray:
    """What attention takes longer than over nothing."""
    whole = paged_attention(kernels, shape, batch, cache, end)
    return np.asarray((whole - floor) * narrow_pages(kernels, shape, cache, end))


def _rest(
    kernels: Kernels, known: Sequence[Learned], shape: ModelShape, batch: FloatArray
) -> FloatArray:
    """What a step takes beside matrices and attention, seconds."""
    rests = [np.interp(batch, each.batches, each.rest_s) for each in known]
    last = min(each.batches[-1] for each in known)
    beyond = _rest_beyond(kernels, shape, batch, last)
    return np.asarray(shape.layers * by_width(shape, known, rests) + beyond)


def _rest_beyond(kernels: Kernels, shape: ModelShape, batch: FloatArray, last: float) -> FloatArray:
    """What plain modules take longer than at the last batch that was learned from, seconds."""
    beyond = (
        shape.layers * layer_rest(kernels, shape, rows) + step_rest(kernels, shape, rows)
        for rows in (np.maximum(batch, last), np.full(np.shape(batch), last))
    )
    return np.asarray(next(beyond) - next(beyond))


def _matrices(kernels: Kernels, shape: ModelShape, batch: FloatArray) -> FloatArray:
    head = kernels.linear(shape.vocab_size, shape.hidden_size, batch)
    return np.asarray(shape.layers * matrix_products(kernels, shape, batch) + head)


def _tiers(
    tables: Tables,
    known: tuple[Learned, ...],
    shape: ModelShape,
    weight_format: WeightFormat,
    batch: FloatArray,
    cache: Mapping[str, FloatArray],
) -> np.ndarray:
    """Interpolated for an uncompressed cache of a measured model, where its own steps fit."""
    name = "fitted" if tables.tier == "measured" else tables.tier
    found = np.full(np.shape(batch), TIERS.index(name))
    same = [each for each in known if _same_size(each.shape, shape)]
    wide = in_16_bits(batch, cache) & (weight_format == "bf16")
    between = TIERS.index("interpolated")
    fits = [each for each in same if each.misfit <= HALF_WIDTH[between]]
    if tables.tier == "measured" and fits:
        found[wide & (np.asarray(batch) <= fits[0].batches[-1])] = between
    return found


def _same_size(first: ModelShape, second: ModelShape) -> bool:
    one, other = (
        (s.layers, s.hidden_size, s.intermediate_size, s.kv_heads, s.head_dim, s.vocab_size)
        for s in (first, second)
    )
    return one == other


@functools.lru_cache(maxsize=32)
def learned_steps(kernels: Kernels) -> tuple[Learned, ...]:
    """Of each measured model, the narrowest first."""
    if "bf16" not in kernels.paged_formats:
        return ()
    return tuple(_learn(kernels, shape, rows) for shape, rows in by_model(kernels, "runtime_step"))


def _learn(kernels: Kernels, shape: ModelShape, rows: list[KernelRow]) -> Learned:
    """Least squares over all its steps: a factor for attention, and a rest at each batch.

    Batches of one length each say nothing of attention; it is then taken as the pages have it. As
    many steps as unknowns are met whatever they are, and say nothing of the fit.
    """
    batch = np.array([float(row.point.batch) for row in rows])
    cache = np.array([float(shape.kv_bytes(row.point.length)) for row in rows])
    attention = paged_attention(kernels, shape, batch, {"bf16": cache})
    seconds = np.array([row.seconds for row in rows])
    beside = seconds - _matrices(kernels, shape, batch)
    batches = np.unique(batch)
    rests = [np.asarray(shape.layers * (batch == one)) for one in batches]
    design = np.column_stack([np.asarray(attention), *rests])
    two_lengths = any(len(np.unique(cache[batch == one])) > 1 for one in batches)
    given = 0 if two_lengths else 1  # columns of the design whose factor, 1, is not looked for
    right = beside - design[:, :given].sum(1)
    solved = np.linalg.lstsq(design[:, given:] / seconds[:, None], right / seconds, rcond=None)[0]
    factor, *rest = [1.0] * given + solved.tolist()
    misfit = np.max(np.abs(design @ np.array([factor, *rest]) - beside) / seconds)
    if len(rows) <= len(solved):
        misfit = np.inf
    return Learned(shape, factor, batches, np.array(rest), float(misfit))
