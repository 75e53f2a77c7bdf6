"""Decode steps and prefills put together from a card's measured kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtune.profiles.shape import ModelShape
from kvtune.simulator.kernels import FloatArray, Heads, Kernels

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
    """

    attention: FloatArray
    matrices: FloatArray
    rest: FloatArray
    between: FloatArray

    @property
    def total(self) -> FloatArray:
        """Their sum."""
        return np.asarray(self.attention + self.matrices + self.rest + self.between)


def covers(kernels: Kernels, shape: ModelShape) -> bool:
    """Whether the table can say anything of the shape: dense, with keys and values by the head."""
    plain = shape.latent is None and shape.experts is None
    return plain and all(kernels.has(op) for op in NEEDED)


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
    layers = shape.layers
    attention = layers * kernels.attention(heads_of(shape), batch, tokens)
    matrices = layers * _matrices(kernels, shape, batch) + kernels.linear(
        shape.vocab_size, shape.hidden_size, batch
    )
    rest = layers * _layer_rest(kernels, shape, batch) + _step_rest(kernels, shape, batch)
    return Parts(attention, matrices, rest, layers * _between_parts(kernels, batch))


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


def _between_parts(kernels: Kernels, batch: FloatArray) -> FloatArray:
    """Seconds a layer that whole layers took beyond the sum of their parts; may be negative."""
    if not kernels.has("decode_layers"):
        return np.zeros(np.shape(batch))
    found = []
    for row in sorted(kernels.rows("decode_layers"), key=lambda row: row.point.batch):
        point = row.point
        shape = _shape_of_layers(kernels, row.point.width_in, row.point.width_out)
        tokens = np.array(float(point.length))
        rows = np.array(float(point.batch))
        alone = (
            kernels.attention(heads_of(shape), rows, tokens)
            + _matrices(kernels, shape, rows)
            + _layer_rest(kernels, shape, rows)
        )
        found.append((float(point.batch), row.seconds - float(alone)))
    batches, extra = (np.array(column) for column in zip(*found, strict=True))
    return np.asarray(np.interp(batch, batches, extra))


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
