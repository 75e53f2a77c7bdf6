"""Decode steps and prefills put together from a card's measured kernels."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.common.estimate import Tier
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.kernel_table import Point
from kvtune.profiles.shape import ModelShape
from kvtune.simulator import latency_priors as priors
from kvtune.simulator import latency_terms as parts
from kvtune.simulator.kernels import FloatArray, Heads, Kernels
from kvtune.simulator.transfer import Tables
from kvtune.simulator.weights import WeightFormat, bits_per_weight

SMALL_OPS = ("rms_norm", "rope", "gated", "residual", "argmax", "embedding")
TIERS: tuple[Tier, ...] = ("measured", "interpolated", "fitted", "transferred", "datasheet")
HALF_WIDTH = np.array([0.03, 0.05, 0.12, 0.15, 0.30])
"""Half of the 10-90 % interval of an answer of each tier, as a share of it."""
NEEDED = (*SMALL_OPS, "append", "attention_decode", "linear")


@dataclass(frozen=True)
class Parts:
    """Seconds of a whole step by part.

    Args:
        attention: reading the cache.
        matrices: linear layers, the output matrix among them.
        rest: norms, rotary, activation, residuals, appending, sampling.
        between: what whole layers take beside their parts when these stand alone.
        ends: what steps one after another take beside all of these.
    """

    attention: FloatArray
    matrices: FloatArray
    rest: FloatArray
    between: FloatArray
    ends: FloatArray

    @property
    def total(self) -> FloatArray:
        """Their sum."""
        return np.asarray(self.attention + self.matrices + self.rest + self.beside)

    @property
    def beside(self) -> FloatArray:
        """What the parts alone do not say."""
        return np.asarray(self.between + self.ends)


class Answer(NamedTuple):
    """Seconds with the ends of their intervals, and the index of each one's tier in ``TIERS``."""

    value: FloatArray
    low: FloatArray
    high: FloatArray
    tiers: npt.NDArray[np.intp]


def covers(kernels: Kernels, shape: ModelShape) -> bool:
    """Whether the table can say anything of the shape: dense, with keys and values by the head."""
    plain = shape.latent is None and shape.experts is None
    return plain and all(kernels.has(op) for op in NEEDED)


def prefill_covers(kernels: Kernels, shape: ModelShape) -> bool:
    """The same for a prefill."""
    return covers(kernels, shape) and kernels.has("attention_prefill")


def heads_of(shape: ModelShape) -> Heads:
    """Query heads, KV heads, head width."""
    return shape.query_heads, shape.kv_heads, shape.head_dim


def layer_matrices(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """Columns out and in of a layer's four matrix products."""
    width, queries = shape.hidden_size, shape.query_heads * shape.head_dim
    return (
        (queries + 2 * shape.kv_heads * shape.head_dim, width),
        (width, queries),
        (2 * shape.intermediate_size, width),
        (width, shape.intermediate_size),
    )


def decode_parts(
    kernels: Kernels, shape: ModelShape, batch: FloatArray, tokens: FloatArray
) -> Parts:
    """One step of a batch whose sequences hold ``tokens`` each, the new one among them."""
    parts_ = _known_parts(kernels, shape, batch, tokens)
    return replace(parts_, ends=_beyond_layers(kernels)(shape, batch, tokens))


def _known_parts(
    kernels: Kernels, shape: ModelShape, batch: FloatArray, tokens: FloatArray
) -> Parts:
    layers = shape.layers
    attention = layers * kernels.attention(heads_of(shape), batch, tokens)
    matrices = layers * _matrices(kernels, shape, batch) + kernels.linear(
        shape.vocab_size, shape.hidden_size, batch
    )
    rest = layers * _layer_rest(kernels, shape, batch) + _step_rest(kernels, shape, batch)
    between = layers * _between_parts(kernels, shape, batch)
    return Parts(attention, matrices, rest, between, np.zeros(()))


def _matrices(kernels: Kernels, shape: ModelShape, tokens: FloatArray) -> FloatArray:
    return np.asarray(sum(kernels.linear(*size, tokens) for size in layer_matrices(shape)))


def _layer_rest(kernels: Kernels, shape: ModelShape, tokens: FloatArray) -> FloatArray:
    """Everything of a layer beside its matrices and its attention."""
    turned = (shape.query_heads + shape.kv_heads) * shape.head_dim
    return np.asarray(
        2 * kernels.plain("rms_norm", tokens * shape.hidden_size)
        + kernels.plain("rope", tokens * turned)
        + 2 * kernels.by_batch("append", tokens)
        + 2 * kernels.plain("residual", tokens * shape.hidden_size)
        + kernels.plain("gated", tokens * 2 * shape.intermediate_size)
    )


def _step_rest(kernels: Kernels, shape: ModelShape, batch: FloatArray) -> FloatArray:
    """What stands before and after the layers."""
    return np.asarray(
        kernels.plain("embedding", batch * shape.hidden_size)
        + kernels.plain("rms_norm", batch * shape.hidden_size)
        + kernels.plain("argmax", batch * shape.vocab_size)
    )


def _between_parts(kernels: Kernels, shape: ModelShape, batch: FloatArray) -> FloatArray:
    """Seconds a layer that whole layers took beyond the sum of their parts; may be negative.

    It grows with the memory that the layers are spread over: parts are measured on a few hundred
    megabytes, and pages that were not met lately have to be looked up. Between the measured
    depths by the weights' bytes; beyond them as at the nearest.
    """
    by_bytes = _beyond_parts(kernels)
    sizes = np.array(sorted(by_bytes))
    at = [np.interp(batch, *by_bytes[size]) for size in sizes]
    weights = 2.0 * shape.active_parameters
    above = int(np.clip(np.searchsorted(sizes, weights), 0, len(sizes) - 1))
    below = max(0, above - 1)
    if above == below or weights >= sizes[above]:
        return np.asarray(at[above])
    share = max(0.0, (weights - sizes[below]) / (sizes[above] - sizes[below]))
    return np.asarray(at[below] * (1 - share) + at[above] * share)


@functools.lru_cache(maxsize=32)
def _beyond_parts(kernels: Kernels) -> dict[float, tuple[FloatArray, FloatArray]]:
    """By bytes of all weights: batches, and at each the seconds of a layer less its parts'."""
    if not kernels.has("decode_layers"):
        return {1.0: (np.ones(1), np.zeros(1))}
    found: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for row in sorted(kernels.rows("decode_layers"), key=lambda row: row.point.batch):
        point = row.point
        shape = _shape_of_layers(kernels, point.width_in, point.width_out)
        tokens, rows = np.array(float(point.length)), np.array(float(point.batch))
        alone = (
            kernels.attention(heads_of(shape), rows, tokens)
            + _matrices(kernels, shape, rows)
            + _layer_rest(kernels, shape, rows)
        )
        matrices = sum(out * wide for out, wide in layer_matrices(shape))
        found[2.0 * point.rows * matrices].append((float(point.batch), row.seconds - float(alone)))
    return {size: (np.array(rows).T[0], np.array(rows).T[1]) for size, rows in found.items()}


class Beyond(NamedTuple):
    """What whole steps take beside all that is known of them, by batch.

    Args:
        batches: ascending.
        constant_s: of a step of the deepest model that was measured, seconds.
        slope_s: a layer and cached token of a sequence beyond ``tokens``, seconds.
        tokens: that the constant was measured at.
    """

    batches: FloatArray
    constant_s: FloatArray
    slope_s: FloatArray
    tokens: float

    def __call__(self, shape: ModelShape, batch: FloatArray, tokens: FloatArray) -> FloatArray:
        """Seconds of a step."""
        constant = np.interp(batch, self.batches, self.constant_s)
        slope = np.interp(batch, self.batches, self.slope_s)
        return np.asarray(constant + shape.layers * slope * np.maximum(0.0, tokens - self.tokens))


@functools.lru_cache(maxsize=32)
def _beyond_layers(kernels: Kernels) -> Beyond:
    """Of steps that follow one another without a rest, less all that is known of them.

    On an H100 a deep model's step takes a quarter of a millisecond more than its layers, output
    matrix and sampling do by themselves; with much cache the power limit slows it down further.
    """
    if not (kernels.has("decode_step") and kernels.has("decode_layers")):
        return Beyond(np.ones(1), np.zeros(1), np.zeros(1), 0.0)
    beyond = {}
    for row in kernels.rows("decode_step"):
        point = row.point
        batch, tokens = np.array(float(point.batch)), np.array(float(point.length))
        known = _known_parts(kernels, _shape_of_step(kernels, point), batch, tokens)
        beyond[point.rows, point.batch, point.length] = row.seconds - float(known.total)
    depths, _, lengths = (sorted(set(keys)) for keys in zip(*beyond, strict=True))
    deep, shallow, short = depths[-1], depths[0], lengths[0]
    batches = sorted(batch for depth, batch, length in beyond if (depth, length) == (deep, short))

    def slope(batch: int) -> float:
        """Zero where no longer cache was measured."""
        ends = [(n, s) for (depth, b, n), s in beyond.items() if (depth, b) == (shallow, batch)]
        (first, low), (last, high) = min(ends), max(ends)
        return float(max(0.0, high - low) / (shallow * max(last - first, 1)))

    return Beyond(
        np.array(batches, dtype=np.float64),
        np.array([beyond[deep, batch, short] for batch in batches]),
        np.array([slope(batch) for batch in batches]),
        float(short),
    )


def _shape_of_step(kernels: Kernels, point: Point) -> ModelShape:
    """The shallow model of a measured step; its output matrix is the tallest that was measured."""
    layers = _shape_of_layers(kernels, point.width_in, point.width_out)
    vocabulary = max(row.point.width_out for row in kernels.rows("linear"))
    return replace(layers, layers=point.rows, vocab_size=vocabulary, windows=(None,) * point.rows)


def _shape_of_layers(kernels: Kernels, hidden: int, intermediate: int) -> ModelShape:
    point = kernels.rows("decode_layers")[0].point
    return ModelShape(
        name="measured layers",
        layers=1,
        query_heads=point.query_heads,
        kv_heads=point.kv_heads,
        head_dim=point.head_dim,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=1,
        max_context=point.length,
        tied_embeddings=True,
        windows=(None,),
    )


# --- answers ---------------------------------------------------------------------------------


def measured_steps(
    tables: Tables,
    gpu: GpuProfile,
    shape: ModelShape,
    weight_format: WeightFormat,
    batch: FloatArray,
    cache: Mapping[float, FloatArray],
) -> Answer:
    """Decode steps through a graph, from measured kernels.

    Caches of fewer bits are read by the paged kernel where it was measured, else taken as so many
    bf16 bytes as take as long by the priors; weights of fewer bits likewise. Both make the answer
    a fitted one at best.

    Args:
        tables: kernel times of the card.
        gpu: the card.
        shape: a shape that they cover.
        weight_format: of the matrices.
        batch: sequences.
        cache: bytes a sequence over all layers by bits a number, of the same shape as ``batch``.
    """
    ends = []
    for end in ("value", "low", "high"):
        whole = decode_parts(tables.kernels, shape, batch, _as_bf16_tokens(shape, cache, end))
        matrices = _in_format(whole.matrices, shape, gpu, weight_format, batch, end)
        attention = _paged_attention(tables.kernels, shape, batch, cache)
        if attention is None:
            attention = whole.attention
        ends.append(attention + matrices + whole.rest + whole.beside)
    value, low, high = ends
    narrow = weight_format != "bf16" or any(
        bits != 16 and np.any(size > 0) for bits, size in cache.items()
    )
    tiers = _tiers(tables, shape, batch, cache, narrow)
    return _answer(value, low, high, tiers)


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
    value = layers * (attention + _matrices(kernels, shape, tokens))
    value = value + layers * _layer_rest(kernels, shape, np.minimum(tokens, _MOST_ROWS)) * (
        np.maximum(tokens, _MOST_ROWS) / _MOST_ROWS
    )
    value = value + kernels.linear(shape.vocab_size, shape.hidden_size, batch)
    tier = TIERS.index("fitted" if tables.tier == "measured" else tables.tier)
    tiers = np.full(np.shape(value), tier, dtype=np.intp)
    return _answer(value, value, value, tiers)


def _as_bf16_tokens(shape: ModelShape, cache: Mapping[float, FloatArray], end: str) -> FloatArray:
    """So many bf16 tokens as take as long to read, by the priors of narrow formats."""
    sizes = [size / priors.cache_factor(bits, _WORSE[end]) for bits, size in cache.items()]
    return np.asarray(np.sum(sizes, axis=0) / shape.kv_bytes_per_token())


def _paged_attention(
    kernels: Kernels, shape: ModelShape, batch: FloatArray, cache: Mapping[float, FloatArray]
) -> FloatArray | None:
    """Attention over pages of several formats; None for a plain bf16 cache, or one not measured.

    Each format's part takes its share of the time that all bytes would take in that format.
    """
    used = {bits: size for bits, size in cache.items() if np.any(size > 0)}
    names = {bits: _FORMAT_OF_BITS.get(bits, "") for bits in used}
    if set(used) <= {16.0} or not all(kernels.has_paged(name) for name in names.values()):
        return None
    # In numbers held, not bytes: a sequence's tokens are the sum over its formats.
    numbers = {bits: size * 8 / bits for bits, size in used.items()}
    total = np.maximum(np.sum(list(numbers.values()), axis=0), 1.0)
    parts_s = [
        numbers[bits] / total
        * kernels.paged(names[bits], batch, total * bits / 8 / shape.layers)
        for bits in used
    ]  # fmt: skip
    return np.asarray(shape.layers * np.sum(parts_s, axis=0))


_FORMAT_OF_BITS = {16.0: "bf16", 8.0: "int8", 4.0: "int4", 2.0: "int2"}
_WORSE = {"value": "value", "low": "high", "high": "low"}  # a low efficiency makes a high time
_MOST_ROWS = 8192.0  # element-wise ops were measured up to here


def _answer(
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


def _in_format(
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
    factor = getattr(priors.WEIGHT_FORMAT_FACTOR[weight_format], _WORSE[end])
    head = 2.0 * shape.vocab_size * shape.hidden_size
    wide = parts.weight_bytes_read(shape, "bf16", tokens)
    matrices_share = 1 - head / wide
    narrow = bits_per_weight(shape, weight_format) / 16 / factor
    read = bf16_s * (1 - matrices_share + matrices_share * narrow)
    flops = 2.0 * shape.active_parameters * tokens
    efficiency = getattr(priors.GEMM_EFFICIENCY, _WORSE[end])
    compute = flops / (efficiency * parts.matrix_rate(gpu, weight_format))
    return np.asarray(np.maximum(np.minimum(read, bf16_s), compute))


def _tiers(
    tables: Tables,
    shape: ModelShape,
    batch: FloatArray,
    cache: Mapping[float, FloatArray],
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
