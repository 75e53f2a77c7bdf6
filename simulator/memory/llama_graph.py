"""The buffer that llama.cpp computes in: what its graph holds at the widest moment of a step.

llama.cpp lays a whole graph out before it runs: tensors are float32, one is given back once all
that read it are done, and the next takes its place. So the buffer is that of the widest moment of
one layer, whatever the number of layers: the feed-forward block, or attention, or the logits. It
was derived from what llama.cpp itself reserves for shapes of many widths
(``benchmarks/llama_buffers.py``, which also holds it against logs of GPUs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvtune.profiles.shape import ModelShape

_FLOAT = 4
_MASK_STEP = 256  # cells of a cache come in multiples of it


@dataclass(frozen=True)
class GraphBuffer:
    """Bytes of the buffers of one context.

    Args:
        device: on the GPU.
        host: on the host, beside it: embeddings and masks that are copied over.
    """

    device: float
    host: float


def graph_buffer(
    shape: ModelShape,
    cells: int,
    ubatch: int,
    flash: bool,
    logit_rows: int,
    swa_cells: int | None = None,
) -> GraphBuffer:
    """The buffers of a model whose layers are all on one GPU.

    Args:
        shape: the model.
        cells: of the cache that a token may attend to.
        ubatch: tokens of a micro-batch.
        flash: whether attention keeps no scores.
        logit_rows: tokens of a micro-batch whose logits are computed.
        swa_cells: of the cache of layers with a window; None where no layer has one.
    """
    masks = ubatch * (2 if flash else _FLOAT) * (cells + (swa_cells or 0))
    row = _FLOAT * ubatch
    layer = row * _layer_floats(shape, flash)
    scores = 0 if flash else row * cells * shape.query_heads
    feed_forward = row * _feed_forward_floats(shape)
    logits = _FLOAT * logit_rows * (shape.vocab_size + shape.hidden_size)
    widest = max(feed_forward + masks, layer + scores + masks, logits)
    return GraphBuffer(widest, masks + 2 * row * shape.hidden_size)


def padded_cells(tokens: int) -> int:
    """Cells of a cache for so many tokens."""
    return math.ceil(tokens / _MASK_STEP) * _MASK_STEP


def _layer_floats(shape: ModelShape, flash: bool) -> float:
    """Of a token, while a layer attends: its residual and projections, twice with scores."""
    hidden, queries = shape.hidden_size, shape.query_heads * shape.head_dim
    keys = 2 * shape.kv_heads * shape.head_dim
    if flash:
        return 2 * hidden + queries + keys
    return (1 if queries == hidden else 2) * hidden + 2 * queries + keys


def _feed_forward_floats(shape: ModelShape) -> float:
    """Of a token: residual and its norm beside gate, up and their product.

    Of experts these are as many as a token visits; what they give is added once all are done, and
    is laid over gate and up only where it fits there.
    """
    hidden, experts = shape.hidden_size, shape.experts
    if experts is None:
        return 2 * hidden + 3 * shape.intermediate_size
    wide, given = experts.active * experts.intermediate_size, experts.active * hidden
    routed = 3 * wide + (given if given > 2 * wide else 0)
    shared = hidden if experts.shared_size else 0
    dense = 3 * shape.intermediate_size if experts.dense_layers else 0
    return 2 * hidden + max(routed + shared, dense)
