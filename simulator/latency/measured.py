"""Decode steps and prefills put together from a card's measured kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.common.estimate import Tier
from kvtune.policies.format import find_format
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import priors
from kvtune.simulator.latency import terms as parts
from kvtune.simulator.latency.beyond import decode_parts
from kvtune.simulator.latency.kernels import FloatArray, Kernels
from kvtune.simulator.latency.parts import heads_of, layer_matrices, layer_rest, matrix_products
from kvtune.simulator.latency.transfer import Tables
from kvtune.simulator.memory.weights import WeightFormat, bits_per_weight, kernel_format

TIERS: tuple[Tier, ...] = ("measured", "interpolated", "fitted", "transferred", "datasheet")
HALF_WIDTH = np.array([0.03, 0.05, 0.12, 0.15, 0.30])
"""Half of the 10-90 % interval of an answer of each tier, as a share of it."""


class Answer(NamedTuple):
    """Seconds with the ends of their intervals, and the index of each one's tier in ``TIERS``."""

    value: FloatArray
    low: FloatArray
    high: FloatArray
    tiers: npt.NDArray[np.intp]


def measured_steps(
    tables: Tables,
    gpu: GpuProfile,
    shape: ModelShape,
    weight_format: WeightFormat,
    batch: FloatArray,
    cache: Mapping[str, FloatArray],
) -> Answer:
    """Decode steps through a graph, from measured kernels.

    Other formats than bf16 are read by the paged kernel where it was measured for that very format,
    else taken as so many bf16 bytes as take as long by the priors; weights of fewer bits likewise.
    Both make the answer a fitted one at best.

    Args:
        tables: kernel times of the card.
        gpu: the card.
        shape: a shape that they cover.
        weight_format: of the matrices.
        batch: sequences.
        cache: bytes a sequence over all layers by format, of the same shape as ``batch``.
    """
    plain = not any(np.any(size > 0) for name, size in cache.items() if name != "bf16")
    ends = []
    for end in ("value", "low", "high"):
        whole = decode_parts(tables.kernels, shape, batch, _as_bf16_tokens(shape, cache, end))
        matrices = matrices_in_format(whole.matrices, shape, gpu, weight_format, batch, end)
        attention = None if plain else paged_attention(tables.kernels, shape, batch, cache)
        if attention is None:
            attention = whole.attention
        ends.append(attention + matrices + whole.rest + whole.beside)
    value, low, high = ends
    narrow = weight_format != "bf16" or not plain
    tiers = _tiers(tables, shape, batch, cache, narrow)
    return answer_of_tier(value, low, high, tiers)


def measured_prefills(
    tables: Tables, shape: ModelShape, prompt: FloatArray, batch: FloatArray
) -> Answer:
    """Prefills in bf16 from measured kernels, one prompt after another's attention."""
    kernels, layers = tables.kernels, shape.layers
    tokens = prompt * batch
    known = kernels.heads()
    scale = shape.query_heads * shape.head_dim / (known[0] * known[2])
    attention = kernels.by_length("attention_prefill", "bf16", prompt) * batch * scale
    attention = attention * parts.pairs(shape, prompt) / (layers * prompt * (prompt + 1) / 2)
    value = layers * (attention + matrix_products(kernels, shape, tokens))
    value = value + layers * layer_rest(kernels, shape, np.minimum(tokens, _MOST_ROWS)) * (
        np.maximum(tokens, _MOST_ROWS) / _MOST_ROWS
    )
    value = value + kernels.linear(shape.vocab_size, shape.hidden_size, batch)
    tier = TIERS.index("fitted" if tables.tier == "measured" else tables.tier)
    tiers = np.full(np.shape(value), tier, dtype=np.intp)
    return answer_of_tier(value, value, value, tiers)


def _as_bf16_tokens(shape: ModelShape, cache: Mapping[str, FloatArray], end: str) -> FloatArray:
    """So many bf16 tokens as take as long to read, by the priors of narrow formats."""
    sizes = [size / priors.cache_factor(name, _WORSE[end]) for name, size in cache.items()]
    return np.asarray(np.sum(sizes, axis=0) / shape.kv_bytes_per_token())


def paged_attention(
    kernels: Kernels, shape: ModelShape, batch: FloatArray, cache: Mapping[str, FloatArray]
) -> FloatArray | None:
    """Attention of all layers over pages of several formats; None where one was not measured.

    Each format's part takes its share of the time that all bytes would take in that format.

    Args:
        kernels: of the card.
        shape: the model.
        batch: sequences.
        cache: bytes a sequence over all layers by format, of the same shape as ``batch``.
    """
    used = {name: size for name, size in cache.items() if np.any(size > 0)}
    if not used:  # the kernel runs over an empty cache too
        used = {"bf16": np.zeros(np.shape(batch))}
    if not all(kernels.has_paged(name) for name in used):
        return None
    # In numbers held, not bytes: a sequence's tokens are the sum over its formats. Above zero, so
    # that an empty cache takes what the kernel does for nothing.
    bits = {name: find_format(name).bits for name in used}
    numbers = {name: np.maximum(size * 8 / bits[name], 1e-9) for name, size in used.items()}
    total = np.sum(list(numbers.values()), axis=0)
    parts_s = [
        numbers[name] / total
        * kernels.paged(name, batch, total * bits[name] / 8 / shape.layers)
        for name in used
    ]  # fmt: skip
    return np.asarray(shape.layers * np.sum(parts_s, axis=0))


_WORSE = {"value": "value", "low": "high", "high": "low"}  # a low efficiency makes a high time
_MOST_ROWS = 8192.0  # element-wise ops were measured up to here


def answer_of_tier(
    value: FloatArray, low: FloatArray, high: FloatArray, tiers: npt.NDArray[np.intp]
) -> Answer:
    """Adds each tier's own width to what the priors left open, in squares."""
    width = HALF_WIDTH[tiers] * value
    return Answer(
        value,
        np.maximum(0.0, value - np.hypot(value - low, width)),
        value + np.hypot(high - value, width),
        tiers,
    )


def matrices_in_format(
    bf16_s: FloatArray,
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    tokens: FloatArray,
    end: str,
) -> FloatArray:
    """Seconds of all matrices in a narrower format, from those in bf16."""
    if weight_format == "bf16":
        return bf16_s
    factor = getattr(priors.WEIGHT_FORMAT_FACTOR[kernel_format(shape, weight_format)], _WORSE[end])
    head = 2.0 * shape.vocab_size * shape.hidden_size
    wide = parts.weight_bytes_read(shape, "bf16", tokens)
    matrices_share = 1 - head / wide
    narrow = bits_per_weight(shape, weight_format) / 16 / factor
    read = bf16_s * (1 - matrices_share + matrices_share * narrow)
    flops = 2.0 * shape.active_parameters * tokens
    matrices = kernel_format(shape, weight_format)
    efficiency = getattr(parts.matrix_efficiency(gpu, matrices), _WORSE[end])
    compute = flops / (efficiency * parts.matrix_rate(gpu, matrices))
    return np.asarray(np.maximum(np.minimum(read, bf16_s), compute))


def _tiers(
    tables: Tables,
    shape: ModelShape,
    batch: FloatArray,
    cache: Mapping[str, FloatArray],
    narrow: bool,
) -> npt.NDArray[np.intp]:
    """The tier of each step: its own point, between points, beyond them, or another card's."""
    kernels = tables.kernels
    sizes = (*layer_matrices(shape), (shape.vocab_size, shape.hidden_size))
    known = kernels.has_heads(heads_of(shape)) and all(kernels.has_linear(*s) for s in sizes)
    if tables.tier != "measured":
        found = np.full(np.shape(batch), TIERS.index(tables.tier))
    elif narrow or not known or any(shape.windows):
        found = np.full(np.shape(batch), TIERS.index("fitted"))
    else:
        tokens = np.sum(list(cache.values()), axis=0) / shape.kv_bytes_per_token()
        points = kernels.attention_points(heads_of(shape))
        batches = np.array(sorted({b for b, _ in points}), dtype=np.float64)
        keys = {float(b) * 2**32 + n for b, n in points}
        exact = np.isin(batch * 2**32 + tokens, np.array(sorted(keys)))
        lengths = np.array(sorted({n for _, n in points}), dtype=np.float64)
        # The largest caches of each batch bound the grid; beyond them a line goes on.
        longest = np.array([max(n for b, n in points if b == one) for one in batches])
        inside = (
            (batch <= batches[-1])
            & (tokens >= lengths[0])
            & (tokens <= np.interp(batch, batches, longest))
        )
        found = np.where(exact, 0, np.where(inside, 1, 2))
    return np.asarray(found, dtype=np.intp)
