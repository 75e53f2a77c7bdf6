"""A decode step taken apart: what each kernel takes when it stands alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        """Their sum."""
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
