"""Peak device memory: weights, what a process takes beside tensors, prefill, and the caches.

The prefill peak assumes what kvtune's own runtime does: sequences are prefilled one at a time, and
each layer's cache is compressed right after that layer's attention over the prompt. So one layer's
keys and values are held uncompressed at a time, not all layers', beside the prompt's residual
stream and the activations of one chunk of it.
"""

from __future__ import annotations

import bisect

from kvtune.common.estimate import Estimate, exact
from kvtune.common.units import MIB
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.measured import find_measured
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.weights import WeightFormat, weight_bytes

PREFILL_CHUNK_TOKENS = 2048


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


def waiting_bytes(shape: ModelShape, context_tokens: int) -> int:
    """What is held beside all else while a policy waits for the end of one prompt.

    Its uncompressed cache but for one layer's, which is part of every prefill.
    """
    return shape.kv_bytes(context_tokens) * (shape.layers - 1) // shape.layers


def largest_batch(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    cache_bytes_per_sequence: float,
    context_tokens: int,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Estimate:
    """Sequences at once that fit on a card; 0 where not even one does.

    Args:
        shape: the model.
        gpu: the card, all of whose memory may be used.
        weight_format: of the matrices.
        cache_bytes_per_sequence: of the longest that a sequence gets.
        context_tokens: of each prompt; prompts are read one after another.
        chunk_tokens: of a prompt that are read at once.
    """
    most = int(gpu.visible_bytes // cache_bytes_per_sequence)

    def fitting(end: str) -> int:
        def is_full(batch: int) -> bool:
            peak = peak_memory(
                shape, gpu, weight_format, cache_bytes_per_sequence, context_tokens, batch,
                chunk_tokens,
            )  # fmt: skip
            return bool(getattr(peak, end) > gpu.visible_bytes)

        return bisect.bisect_left(range(1, most + 1), True, key=is_full)

    value, low, high = (float(fitting(end)) for end in ("value", "high", "low"))
    return Estimate(value, low, high, "sequences", "assumed")


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
            measured + lost, 0.9 * measured, 1.1 * measured + 2 * graphs + 3 * lost, "B", "fitted"
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
    """Activations and one layer's uncompressed keys and values at their peak, in bytes.

    One prompt of ``context_tokens`` at a time. The middle value keeps two copies of the residual
    stream [tokens, hidden], the low end one, the high end four; a decode step's activations for
    the batch count where they are larger.
    """
    stream = 2 * context_tokens * shape.hidden_size
    layer_cache = 2 * context_tokens * shape.elements_per_token_layer
    chunk = min(context_tokens, chunk_tokens)
    work = chunk * _activation_bytes(shape) + 6 * shape.vocab_size
    decode = batch * (_activation_bytes(shape) + 6 * shape.vocab_size)
    middle, low, high = (
        float(max(copies * stream + layer_cache + factor * work, decode))
        for copies, factor in ((2, 1.0), (1, 0.7), (4, 2.0))
    )
    return Estimate(middle, low, high, "B", "assumed")


def _activation_bytes(shape: ModelShape) -> int:
    """Bytes a token of one layer's widest moment: projections and feed-forward, in bf16."""
    query = 2 * shape.query_heads * shape.head_dim
    wide = shape.intermediate_size
    if shape.experts is not None:
        routed = shape.experts.active * shape.experts.intermediate_size + shape.experts.shared_size
        wide = max(routed, wide if shape.experts.dense_layers else 0)
    return 2 * (2 * shape.hidden_size + max(query, 3 * wide))


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
