"""What fits: weights, overhead and prefill peak out of a memory limit, the rest for the cache.

The prefill peak assumes what kvtune's own runtime does: sequences are prefilled one at a time, and
each layer's cache is compressed right after that layer's attention over the prompt. So one layer's
keys and values are held uncompressed at a time, not all layers', beside the prompt's residual
stream and the activations of one chunk of it.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, exact
from kvtune.common.units import GB, GIB, MIB, format_bytes, format_tokens
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.measured import find_measured
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.weights import (
    WeightFormat,
    check_format,
    formats_by_width,
    weight_bytes,
)

PREFILL_CHUNK_TOKENS = 2048
USEFUL_CACHE_TOKENS = 1024  # a smaller bf16 cache a sequence is not worth a wider weight format


@dataclass(frozen=True)
class MemoryBudget:
    """Where a memory limit goes. Estimates are in bytes.

    Args:
        model: name of the shape.
        gpu: name of the card.
        device_bytes: memory that a process on the card can see.
        limit_bytes: what may be used of it in all.
        weight_format: chosen by the user or as the widest that fits.
        reason: one sentence on why this format.
        weights: all weights.
        overhead: context, graphs and workspaces, what the allocator loses.
        prefill: activations and one layer's uncompressed cache at their peak.
        cache: what is left; its low end is what is left if all the others are at their high ends.
        context_tokens: longest sequence that was asked for.
        batch: sequences at a time.
        full_cache_bytes: the whole batch's bf16 cache at that context.
        cache_tokens: tokens of bf16 cache that ``cache`` holds, over the batch.
    """

    model: str
    gpu: str
    device_bytes: int
    limit_bytes: int
    weight_format: WeightFormat
    reason: str
    weights: Estimate
    overhead: Estimate
    prefill: Estimate
    cache: Estimate
    context_tokens: int
    batch: int
    full_cache_bytes: int
    cache_tokens: int

    @property
    def cache_bytes(self) -> int:
        """Bytes for the whole batch's cache."""
        return int(self.cache.value)

    @property
    def cache_bytes_per_sequence(self) -> int:
        """Bytes for one sequence's cache."""
        return self.cache_bytes // self.batch

    @property
    def share_that_fits(self) -> float:
        """The cache that fits over the full bf16 cache; 1 where no compression is needed."""
        return min(1.0, self.cache_bytes / self.full_cache_bytes)

    def as_dict(self) -> dict[str, object]:
        """The form that goes into JSON."""
        parts = ("weights", "overhead", "prefill", "cache")
        plain = (
            "model", "gpu", "device_bytes", "limit_bytes", "weight_format", "reason",
            "context_tokens", "batch", "full_cache_bytes", "cache_tokens", "share_that_fits",
        )  # fmt: skip
        return {key: getattr(self, key) for key in plain} | {
            key: getattr(self, key).as_dict() for key in parts
        }


def memory_budget(
    shape: ModelShape,
    gpu: GpuProfile,
    limit_bytes: int | None = None,
    *,
    context_tokens: int,
    batch: int = 1,
    weights: str | None = None,
) -> MemoryBudget:
    """Split a memory limit (None: all that the card shows) into weights, overhead and cache.

    Args:
        shape: the model.
        gpu: the card.
        limit_bytes: the most that may be used, in bytes.
        context_tokens: longest sequence; the prefill peak is taken for a prompt of this length.
        batch: sequences at a time.
        weights: a format; None or ``auto`` for the widest that leaves a useful cache.

    Raises:
        KvtuneError: the limit is above what the card shows, the format is unknown, or nothing fits.
    """
    if context_tokens < 1 or batch < 1:
        raise KvtuneError("context and batch must be at least 1")
    limit = gpu.visible_bytes if limit_bytes is None else limit_bytes
    _check_limit(gpu, limit)
    if weights is None or weights == "auto":
        chosen, reason = _widest(shape, gpu, limit, context_tokens, batch)
    else:
        chosen, reason = check_format(weights), f"{weights} weights, as asked for"
        if required_bytes(shape, gpu, chosen, context_tokens, batch) > limit:
            raise _does_not_fit(shape, gpu, limit, (chosen,), context_tokens, batch)
    return _split(shape, gpu, limit, chosen, reason, context_tokens, batch)


def required_bytes(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    context_tokens: int,
    batch: int = 1,
) -> int:
    """The smallest limit that works: everything else, and a useful cache for each sequence."""
    useful = shape.kv_bytes(min(context_tokens, USEFUL_CACHE_TOKENS))
    peak = peak_memory(shape, gpu, weight_format, useful, context_tokens, batch)
    return math.ceil(peak.value)


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
    parts = _fixed_parts(shape, gpu, weight_format, context_tokens, batch, chunk_tokens)
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


def _fixed_parts(
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


def _split(
    shape: ModelShape,
    gpu: GpuProfile,
    limit: int,
    weight_format: WeightFormat,
    reason: str,
    context_tokens: int,
    batch: int,
) -> MemoryBudget:
    parts = _fixed_parts(shape, gpu, weight_format, context_tokens, batch)
    used = add(*parts)
    left, low, high = (max(0.0, limit - end) for end in (used.value, used.high, used.low))
    return MemoryBudget(
        model=shape.name,
        gpu=gpu.name,
        device_bytes=gpu.visible_bytes,
        limit_bytes=limit,
        weight_format=weight_format,
        reason=reason,
        weights=parts[0],
        overhead=parts[1],
        prefill=parts[2],
        cache=Estimate(left, low, high, "B", "assumed"),
        context_tokens=context_tokens,
        batch=batch,
        full_cache_bytes=batch * shape.kv_bytes(context_tokens),
        cache_tokens=batch * shape.tokens_that_fit(int(left) // batch),
    )


def _widest(
    shape: ModelShape, gpu: GpuProfile, limit: int, context_tokens: int, batch: int
) -> tuple[WeightFormat, str]:
    """The widest format that leaves a useful cache, and the sentence that says so."""
    formats = formats_by_width(gpu)
    for index, weight_format in enumerate(formats):
        if required_bytes(shape, gpu, weight_format, context_tokens, batch) <= limit:
            return weight_format, _reason(shape, gpu, limit, formats[: index + 1])
    raise _does_not_fit(shape, gpu, limit, formats, context_tokens, batch)


def _reason(shape: ModelShape, gpu: GpuProfile, limit: int, tried: tuple[WeightFormat, ...]) -> str:
    chosen = tried[-1]
    if len(tried) == 1:
        return f"{chosen} weights, the widest format, leave room for the cache"
    wider = tried[-2] if chosen == "int4" else "bf16"
    size = format_bytes(weight_bytes(shape, wider).value)
    suits = "" if chosen == "int4" or not gpu.fp8 else f", and {gpu.name} computes in fp8"
    return (
        f"{chosen} weights, the widest that leave room for a cache: {wider} ones take {size} "
        f"of {format_bytes(limit)}{suits}"
    )


def _check_limit(gpu: GpuProfile, limit: int) -> None:
    if limit <= 0:
        raise KvtuneError("the memory limit must be above zero")
    if limit > gpu.visible_bytes:
        most = gpu.visible_bytes
        raise KvtuneError(
            f"{_both(limit)} is more than the {_both(most)} that {gpu.name} shows to a program "
            f"(its box says {gpu.memory_nominal.value:g} GiB)",
            hint=f"use at most {math.floor(100 * most / GIB) / 100:.2f}GiB "
            f"({math.floor(100 * most / GB) / 100:.2f}GB), or leave the limit out.",
        )


def _does_not_fit(
    shape: ModelShape,
    gpu: GpuProfile,
    limit: int,
    tried: tuple[WeightFormat, ...],
    context_tokens: int,
    batch: int,
) -> KvtuneError:
    """The error that says what is too large and what would fit."""
    needs = {
        weight_format: required_bytes(shape, gpu, weight_format, context_tokens, batch)
        for weight_format in formats_by_width(gpu)
    }
    least = min(tried, key=lambda name: needs[name])
    parts = _fixed_parts(shape, gpu, least, context_tokens, batch)
    weights, overhead, prefill = (format_bytes(part.value) for part in parts)
    message = (
        f"{shape.name} does not fit in {_both(limit)} on {gpu.name}: {least} weights {weights}, "
        f"overhead {overhead}, prefill of {format_tokens(context_tokens)} {prefill}, "
        f"and a cache of {format_tokens(batch * min(context_tokens, USEFUL_CACHE_TOKENS))}"
    )
    return KvtuneError(message, hint=_what_fits(shape, gpu, limit, needs, least))


def _what_fits(
    shape: ModelShape,
    gpu: GpuProfile,
    limit: int,
    needs: dict[WeightFormat, int],
    tried: WeightFormat,
) -> str:
    fitting = [name for name, need in needs.items() if need <= limit]
    if fitting:
        return (
            f"{fitting[0]} weights fit in this limit; {tried} ones need {_at_least(needs[tried])}."
        )
    smallest = min(needs, key=lambda name: needs[name])
    if needs[smallest] > gpu.visible_bytes:
        return (
            f"no limit on this GPU is enough at this context: {smallest} weights need "
            f"{_at_least(needs[smallest])}, it shows {_both(gpu.visible_bytes)}. "
            "A shorter context, a smaller model or a larger GPU is needed."
        )
    return (
        f"the smallest limit that works is {_at_least(needs[smallest])}, with {smallest} weights."
    )


def _both(size: float) -> str:
    return f"{size / GB:.2f} GB ({size / GIB:.2f} GiB)"


def _at_least(size: float) -> str:
    """Both units, rounded up, so that what is printed is enough when typed back."""
    decimal, binary = (math.ceil(100 * size / unit) / 100 for unit in (GB, GIB))
    return f"{decimal:.2f}GB ({binary:.2f}GiB)"
