"""Decode steps of kvtune's own runtime: fused modules around attention over pages.

A step is its matrices, its attention over pages and a rest. Whole steps were measured of a few
models (op ``runtime_step``); what they say of the rest, and of attention with narrower heads than
the pages were measured with, holds for models between them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.models import model_of_size
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.kernels import FloatArray, Kernels
from kvtune.simulator.latency_measured import (
    TIERS,
    Answer,
    answer_of_tier,
    matrices_in_format,
    paged_attention,
)
from kvtune.simulator.latency_parts import matrix_products
from kvtune.simulator.transfer import Tables
from kvtune.simulator.weights import WeightFormat


class Learned(NamedTuple):
    """What one model's steps say.

    Args:
        shape: the model.
        factor: its attention over that of the pages' heads, for the same bytes.
        batches: ascending.
        rest_s: seconds a layer beside matrices and attention, at each batch.
    """

    shape: ModelShape
    factor: float
    batches: FloatArray
    rest_s: FloatArray


def runtime_steps(
    tables: Tables,
    gpu: GpuProfile,
    shape: ModelShape,
    weight_format: WeightFormat,
    batch: FloatArray,
    cache: Mapping[float, FloatArray],
) -> Answer | None:
    """Steps of the runtime; None where pages of these formats or its steps were not measured.

    Args:
        tables: kernel times of the card.
        gpu: the card.
        shape: a shape that they cover.
        weight_format: of the matrices.
        batch: sequences.
        cache: bytes a sequence over all layers by bits a number, of the same shape as ``batch``.
    """
    attention = paged_attention(tables.kernels, shape, batch, cache)
    known = _learned(tables.kernels)
    if attention is None or not known:
        return None
    at = np.log([each.shape.hidden_size for each in known])
    wide = np.log(shape.hidden_size)
    factor = np.interp(wide, at, [each.factor for each in known])
    rests = np.stack([np.interp(batch, each.batches, each.rest_s) for each in known])
    rest = shape.layers * _between(wide, at, rests)
    read = _matrices(tables.kernels, shape, batch)
    value, low, high = (
        factor * attention + rest + matrices_in_format(read, shape, gpu, weight_format, batch, end)
        for end in ("value", "low", "high")
    )
    tiers = _tiers(tables, known, shape, weight_format, batch, cache)
    return answer_of_tier(value, low, high, tiers)


def _matrices(kernels: Kernels, shape: ModelShape, batch: FloatArray) -> FloatArray:
    head = kernels.linear(shape.vocab_size, shape.hidden_size, batch)
    return np.asarray(shape.layers * matrix_products(kernels, shape, batch) + head)


def _between(wanted: float, at: FloatArray, values: FloatArray) -> FloatArray:
    """``values [models, ...]`` between their places; beyond the ends as at the nearest."""
    place = np.interp(wanted, at, np.arange(len(at)))
    below = int(place)
    share = place - below
    above = min(below + 1, len(at) - 1)
    return np.asarray(values[below] * (1 - share) + values[above] * share)


def _tiers(
    tables: Tables,
    known: tuple[Learned, ...],
    shape: ModelShape,
    weight_format: WeightFormat,
    batch: FloatArray,
    cache: Mapping[float, FloatArray],
) -> np.ndarray:
    """Interpolated for an uncompressed cache of a measured model, within its batches."""
    name = "fitted" if tables.tier == "measured" else tables.tier
    found = np.full(np.shape(batch), TIERS.index(name))
    same = [each for each in known if _same_size(each.shape, shape)]
    narrow = weight_format != "bf16" or any(np.any(s > 0) for b, s in cache.items() if b != 16)
    if tables.tier == "measured" and same and not narrow:
        found[np.asarray(batch) <= same[0].batches[-1]] = TIERS.index("interpolated")
    return found


def _same_size(first: ModelShape, second: ModelShape) -> bool:
    one, other = (
        (s.layers, s.hidden_size, s.intermediate_size, s.kv_heads, s.head_dim, s.vocab_size)
        for s in (first, second)
    )
    return one == other


@functools.lru_cache(maxsize=32)
def _learned(kernels: Kernels) -> tuple[Learned, ...]:
    """Of each measured model, the narrowest first."""
    if not (kernels.has("runtime_step") and kernels.has_paged("bf16")):
        return ()
    by_model: dict[tuple[int, int, int], list[KernelRow]] = defaultdict(list)
    for row in kernels.rows("runtime_step"):
        by_model[row.point.rows, row.point.width_in, row.point.width_out].append(row)
    shapes = {size: model_of_size(*size) for size in by_model}
    found = [_learn(kernels, shape, by_model[size]) for size, shape in shapes.items() if shape]
    return tuple(sorted(found, key=lambda each: each.shape.hidden_size))


def _learn(kernels: Kernels, shape: ModelShape, rows: list[KernelRow]) -> Learned:
    """Least squares over all its steps: a factor for attention, and a rest at each batch."""
    batch = np.array([float(row.point.batch) for row in rows])
    cache = np.array([float(shape.kv_bytes(row.point.length)) for row in rows])
    attention = paged_attention(kernels, shape, batch, {16.0: cache})
    beside = np.array([row.seconds for row in rows]) - _matrices(kernels, shape, batch)
    batches = np.unique(batch)
    rests = [np.asarray(shape.layers * (batch == one)) for one in batches]
    design = np.column_stack([np.asarray(attention), *rests])
    solved = np.linalg.lstsq(design / beside[:, None], np.ones(len(rows)), rcond=None)[0]
    return Learned(shape, float(solved[0]), batches, np.asarray(solved[1:], dtype=np.float64))
