"""A decode step taken apart: what each kernel takes when it stands alone, and what whole layers
and whole steps take beside their kernels, as a card was measured.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kvtune.profiles.kernel_table import Point
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.kernels import FloatArray, Heads, Kernels

SMALL_OPS = ("rms_norm", "rope", "gated", "residual", "argmax", "embedding")
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
        """The sum of all parts."""
        return np.asarray(self.attention + self.matrices + self.rest + self.beside)

    @property
    def beside(self) -> FloatArray:
        """What the parts alone do not say."""
        return np.asarray(self.between + self.ends)


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


def single_kernels(
    kernels: Kernels, shape: ModelShape, batch: FloatArray, tokens: FloatArray
) -> Parts:
    """One step of a batch whose sequences hold ``tokens`` each, as the sum of its kernels."""
    layers = shape.layers
    attention = layers * kernels.attention(heads_of(shape), batch, tokens)
    matrices = layers * matrix_products(kernels, shape, batch) + kernels.linear(
        shape.vocab_size, shape.hidden_size, batch
    )
    rest = layers * layer_rest(kernels, shape, batch) + step_rest(kernels, shape, batch)
    return Parts(attention, matrices, rest, np.zeros(()), np.zeros(()))


def matrix_products(kernels: Kernels, shape: ModelShape, tokens: FloatArray) -> FloatArray:
    """One layer's matrix products."""
    return np.asarray(sum(kernels.linear(*size, tokens) for size in layer_matrices(shape)))


def layer_rest(kernels: Kernels, shape: ModelShape, tokens: FloatArray) -> FloatArray:
    """Everything of a layer beside its matrices and its attention."""
    turned = (shape.query_heads + shape.kv_heads) * shape.head_dim
    return np.asarray(
        2 * kernels.plain("rms_norm", tokens * shape.hidden_size)
        + kernels.plain("rope", tokens * turned)
        + 2 * kernels.by_batch("append", tokens)
        + 2 * kernels.plain("residual", tokens * shape.hidden_size)
        + kernels.plain("gated", tokens * 2 * shape.intermediate_size)
    )


def step_rest(kernels: Kernels, shape: ModelShape, batch: FloatArray) -> FloatArray:
    """What stands before and after the layers."""
    return np.asarray(
        kernels.plain("embedding", batch * shape.hidden_size)
        + kernels.plain("rms_norm", batch * shape.hidden_size)
        + kernels.plain("argmax", batch * shape.vocab_size)
    )


# --- beside the kernels --------------------------------------------------------------------------


def decode_parts(
    kernels: Kernels, shape: ModelShape, batch: FloatArray, tokens: FloatArray
) -> Parts:
    """One step of a batch whose sequences hold ``tokens`` each, the new one among them."""
    parts_ = _known_parts(kernels, shape, batch, tokens)
    return replace(parts_, ends=_beyond_layers(kernels)(shape, batch, tokens))


def _known_parts(
    kernels: Kernels, shape: ModelShape, batch: FloatArray, tokens: FloatArray
) -> Parts:
    alone = single_kernels(kernels, shape, batch, tokens)
    return replace(alone, between=shape.layers * _between_parts(kernels, shape, batch))


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
            + matrix_products(kernels, shape, rows)
            + layer_rest(kernels, shape, rows)
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
