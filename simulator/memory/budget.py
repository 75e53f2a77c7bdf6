"""What fits: weights, overhead and prefill peak out of a memory limit, the rest for the cache."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from kvtune.common.errors import DoesNotFitError, KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import GB, GIB, format_bytes, format_tokens
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.peak import add, fixed_parts, peak_memory
from kvtune.simulator.memory.weights import (
    WeightFormat,
    check_format,
    format_name,
    formats_by_width,
    weight_bytes,
)

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
        cache_tokens: tokens of bf16 cache that ``cache`` holds, over the batch; None
            where sequences of any length fit.
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
    cache_tokens: int | None

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
        chosen = check_format(weights)
        reason = f"{format_name(shape, chosen)} weights, as asked for"
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


def _split(
    shape: ModelShape,
    gpu: GpuProfile,
    limit: int,
    weight_format: WeightFormat,
    reason: str,
    context_tokens: int,
    batch: int,
) -> MemoryBudget:
    parts = fixed_parts(shape, gpu, weight_format, context_tokens, batch)
    used = add(*parts)
    left, low, high = (max(0.0, limit - end) for end in (used.value, used.high, used.low))
    tokens = shape.tokens_that_fit(int(left) // batch)
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
        cache_tokens=None if tokens is None else batch * tokens,
    )


def _widest(
    shape: ModelShape, gpu: GpuProfile, limit: int, context_tokens: int, batch: int
) -> tuple[WeightFormat, str]:
    """The widest format that leaves a useful cache, and the sentence that says so."""
    formats = formats_by_width(shape, gpu)
    for index, weight_format in enumerate(formats):
        if required_bytes(shape, gpu, weight_format, context_tokens, batch) <= limit:
            return weight_format, _reason(shape, gpu, limit, formats[: index + 1])
    raise _does_not_fit(shape, gpu, limit, formats, context_tokens, batch)


def _reason(shape: ModelShape, gpu: GpuProfile, limit: int, tried: tuple[WeightFormat, ...]) -> str:
    chosen = tried[-1]
    if chosen == "stored":
        return f"{format_name(shape, chosen)} weights, as the checkpoint holds them"
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
) -> DoesNotFitError:
    """The error that says what is too large and what would fit."""
    needs = {
        weight_format: required_bytes(shape, gpu, weight_format, context_tokens, batch)
        for weight_format in dict.fromkeys((*tried, *formats_by_width(shape, gpu)))
    }
    least = min(tried, key=lambda name: needs[name])
    parts = fixed_parts(shape, gpu, least, context_tokens, batch)
    weights, overhead, prefill = (format_bytes(part.value) for part in parts)
    message = (
        f"{shape.name} does not fit in {_both(limit)} on {gpu.name}: {least} weights {weights}, "
        f"overhead {overhead}, prefill of {format_tokens(context_tokens)} {prefill}, "
        f"and a cache of {format_tokens(batch * min(context_tokens, USEFUL_CACHE_TOKENS))}"
    )
    smallest = min(needs, key=lambda name: needs[name])

    def longest(weight_format: WeightFormat) -> int:
        return _longest_context(shape, gpu, limit, weight_format, context_tokens, batch)

    whole = peak_memory(
        shape, gpu, smallest, shape.kv_bytes(context_tokens), context_tokens, batch
    ).value
    hint = _what_fits(gpu, limit, needs, least, longest, whole)
    most = _most_sequences(shape, gpu, limit, smallest, context_tokens)
    if 0 < most < batch:
        hint = f"--batch {most} is the most that fits at this context. {hint[0].upper()}{hint[1:]}"
    return DoesNotFitError(message, hint=hint)


def _most_sequences(
    shape: ModelShape, gpu: GpuProfile, limit: int, weight_format: WeightFormat, tokens: int
) -> int:
    """The largest batch that leaves each sequence a useful cache; 0 where not even one fits."""
    batches = range(1, limit // shape.kv_bytes(1))

    def too_large(batch: int) -> bool:
        return required_bytes(shape, gpu, weight_format, tokens, batch) > limit

    return bisect.bisect_left(batches, True, key=too_large)


def _longest_context(
    shape: ModelShape,
    gpu: GpuProfile,
    limit: int,
    weight_format: WeightFormat,
    tokens: int,
    batch: int,
) -> int:
    """The longest context below ``tokens``, in whole kilotokens, that fits; 0 where none does."""
    contexts = range(1024, tokens, 1024)

    def too_long(context: int) -> bool:
        return required_bytes(shape, gpu, weight_format, context, batch) > limit

    fitting = bisect.bisect_left(contexts, True, key=too_long)
    return contexts[fitting - 1] if fitting else 0


def _what_fits(
    gpu: GpuProfile,
    limit: int,
    needs: dict[WeightFormat, int],
    tried: WeightFormat,
    longest: Callable[[WeightFormat], int],
    whole: float,
) -> str:
    """What would fit; ``whole`` is what the narrowest weights need beside an uncompressed cache."""
    fitting = [name for name, need in needs.items() if need <= limit]
    if fitting:
        shorter = f", or --context {most} at most" if (most := longest(tried)) else ""
        return (
            f"{fitting[0]} weights fit in this limit; {tried} ones need "
            f"{_at_least(needs[tried])}{shorter}."
        )
    smallest = min(needs, key=lambda name: needs[name])
    most = longest(smallest)
    if needs[smallest] > gpu.visible_bytes:
        shorter = f"--context {most} is the most that fits; else a" if most else "A"
        where = " at this context" if most else ""
        return (
            f"no limit on this GPU is enough{where}: {smallest} weights need "
            f"{_at_least(needs[smallest])}, it shows {_both(gpu.visible_bytes)}. "
            f"{shorter} smaller model or a larger GPU is needed."
        )
    shorter = f"; in this one --context {most} is the most" if most else ""
    beside = ""
    if whole > needs[smallest]:
        beside = f" and a compressed cache; the whole cache needs {_at_least(whole)}"
    return (
        f"the smallest limit that works is {_at_least(needs[smallest])}, with {smallest} "
        f"weights{beside}{shorter}."
    )


def _both(size: float) -> str:
    return f"{size / GB:.2f} GB ({size / GIB:.2f} GiB)"


def _at_least(size: float) -> str:
    """Both units, rounded up, so that what is printed is enough when typed back."""
    decimal, binary = (math.ceil(100 * size / unit) / 100 for unit in (GB, GIB))
    return f"{decimal:.2f}GB ({binary:.2f}GiB)"
