"""Peak device memory: weights, what a process takes beside tensors, prefill, and the caches.

The prefill peak is that of kvtune's own runtime (``runtime/admission.py``): prompts are read one at
a time, short ones together as many as make a chunk, and each layer's cache is compressed right
after that layer's attention over the prompt. So one layer's keys and values are held uncompressed
at a time, not all layers', beside the prompt's residual stream; feed-forward parts work on a chunk.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Literal

from kvtune.common.estimate import Estimate, exact
from kvtune.common.units import MIB
from kvtune.policies.paging import PREFILL_CHUNK_TOKENS
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.measured import find_measured
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.weights import WeightFormat, weight_bytes

End = Literal["value", "low", "high"]
"""Of an estimate."""

USEFUL_CACHE_TOKENS = 1024  # a smaller bf16 cache a sequence is not worth wider weights

_WINDOW_QUERIES = 32
"""Last queries of a prompt whose attention methods look at: SnapKV's window."""

_MAPPED = 32 * MIB
"""Beyond what is in use torch's allocator maps up to a piece of 20 MiB in each of its pools: those
of large and of small tensors, and a captured graph's own."""

_UNUSED_SHARE = 0.15
"""Beyond that it maps so much more of what prefill works with, between tensors of many sizes. Both
fitted on eight runs of three shapes on an H200 (``benchmarks/mem_promise.py``), which needed 0 to
0.15 of it; no run checks them yet."""


def peak_memory(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    cache_bytes_per_sequence: float,
    context_tokens: int,
    batch: int = 1,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Estimate:
    """Peak device memory of a run whose caches take so many bytes a sequence, in bytes."""
    parts = fixed_parts(shape, gpu, weight_format, context_tokens, batch, chunk_tokens)
    return add(*parts, exact(cache_bytes_per_sequence * batch, "B"))


def required_bytes(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    context_tokens: int,
    batch: int = 1,
) -> int:
    """The smallest limit that works: everything else, and a useful cache for each sequence."""
    useful = shape.kv_bytes(min(context_tokens, USEFUL_CACHE_TOKENS))
    return math.ceil(peak_memory(shape, gpu, weight_format, useful, context_tokens, batch).value)


def most_at_once(each: float, room: Callable[[int], float]) -> int:
    """As many sequences of so many bytes each as fit; 0 where not even one does.

    Args:
        each: bytes of one sequence.
        room: bytes for so many sequences, which do not grow with their number.
    """
    most = max(int(room(1) // each), 0)
    if most * each <= room(most):  # what the runtime works with seldom grows so far
        return most
    return bisect.bisect_left(range(1, most + 1), True, key=lambda n: n * each > room(n))


def overhead_bytes(shape: ModelShape, gpu: GpuProfile, weight_format: WeightFormat) -> Estimate:
    """Context, graphs and workspaces, and what the allocator cannot use, in bytes.

    Calibrated where the card was measured: its context, what the libraries take beside the
    allocator, and its workspaces after a graph's replay. Else assumed; published engine figures:
    0.13 GiB outside the allocator on one GPU, graphs within 0.4 GiB (llm-d-benchmark, empirical
    vLLM memory results).
    """
    graphs = 32 * MIB + shape.layers * MIB
    loaded = weight_bytes(shape, weight_format).value
    measured = process_bytes(gpu)
    if measured is not None:
        lost = 0.005 * loaded
        return Estimate(
            measured + lost + _MAPPED,
            0.9 * measured,
            1.1 * measured + 2 * graphs + 3 * lost,
            "B",
            "fitted",
        )
    context = gpu.context_bytes
    return Estimate(
        context + graphs + 0.01 * loaded,
        0.75 * context + 0.5 * graphs,
        1.2 * context + 2.5 * graphs + 0.03 * loaded,
        "B",
        "assumed",
    )


def process_bytes(gpu: GpuProfile) -> int | None:
    """Context, libraries and workspaces of a process that decodes; None where never measured."""
    profile = find_measured(gpu.slug)
    if profile is None:
        return None
    parts = [profile.bytes_of(name) for name in ("context", "libraries", "workspace")]
    return None if parts[0] is None else sum(part or 0 for part in parts)


def prefill_peak_bytes(
    shape: ModelShape,
    context_tokens: int,
    batch: int = 1,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Estimate:
    """What the runtime works with at its peak, in bytes: reading prompts, or one decode step.

    Prompts are read one at a time, short ones together. A layer's attention holds two copies of the
    residual stream, the joined projections, what of them is rotated, its output, and what methods
    and the copies for pages take (column sums, or a window's attention in 32 bits); its
    feed-forward part holds four copies of the stream and a chunk's activations. The larger of both
    counts, or a step of the whole batch where that is larger still.
    The low end leaves out what methods take, and the high end has as much again.
    """
    tokens = max(context_tokens, min(batch * context_tokens, chunk_tokens))
    stream = 2 * tokens * shape.hidden_size
    layer_cache = 2 * tokens * shape.elements_per_token_layer
    queries = 2 * tokens * shape.query_heads * shape.head_dim
    held = 2 * stream + 3 * queries + 1.5 * layer_cache
    window = 4 * _WINDOW_QUERIES * tokens * shape.query_heads
    asked = max(queries + 0.5 * layer_cache, 1.5 * layer_cache + window, 3 * window)
    feeding = 4 * stream + min(tokens, chunk_tokens) * _feed_forward_bytes(shape)
    logits = 2 * shape.vocab_size
    step = batch * (_step_bytes(shape) + logits)
    value, low, high = (
        (1 + _UNUSED_SHARE) * max(held + share * asked, feeding, step) for share in (1.0, 0.0, 2.0)
    )
    return Estimate(value, 0.9 * low, 1.1 * high, "B", "assumed")


def _feed_forward_bytes(shape: ModelShape) -> int:
    """Bytes a token of a layer's feed-forward part: gate and up, their product, what comes out."""
    return 2 * (3 * _wide(shape) + shape.hidden_size)


def _step_bytes(shape: ModelShape) -> int:
    """Bytes a sequence of a decode step: a layer's activations, and what attention leaves in parts
    of 32 bits of its two segments."""
    attended = 8 * shape.query_heads * shape.head_dim
    return 2 * (3 * shape.hidden_size + 3 * _wide(shape)) + attended


def _wide(shape: ModelShape) -> int:
    """Channels of the widest feed-forward part that a token goes through."""
    if shape.experts is None:
        return shape.intermediate_size
    routed = shape.experts.active * shape.experts.intermediate_size + shape.experts.shared_size
    return max(routed, shape.intermediate_size if shape.experts.dense_layers else 0)


def fixed_parts(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    context_tokens: int,
    batch: int,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> tuple[Estimate, Estimate, Estimate]:
    """Weights, overhead, prefill."""
    return (
        weight_bytes(shape, weight_format),
        overhead_bytes(shape, gpu, weight_format),
        prefill_peak_bytes(shape, context_tokens, batch, chunk_tokens),
    )


def add(*parts: Estimate) -> Estimate:
    """A sum of bytes; ends are added to ends: what errs together (one allocator) errs one way."""
    value, low, high = (
        sum(getattr(part, end) for part in parts) for end in ("value", "low", "high")
    )
    return Estimate(value, low, high, "B", "assumed")
