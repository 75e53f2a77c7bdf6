"""What a limit must hold at least, and what to say of one that does not."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

from kvtune.common.errors import DoesNotFitError, KvtuneError
from kvtune.common.units import GB, GIB, format_bytes, format_tokens
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.peak import add, fixed_parts, most_at_once, peak_memory
from kvtune.simulator.memory.weights import WeightFormat, formats_by_width

USEFUL_CACHE_TOKENS = 1024  # a smaller bf16 cache a sequence is not worth a wider weight format


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


def check_limit(gpu: GpuProfile, limit: int) -> None:
    """Refuse a limit that no card of this kind has."""
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


def does_not_fit(
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

    hint = _what_fits(gpu, limit, needs, least, longest)
    most = _most_sequences(shape, gpu, limit, smallest, context_tokens)
    if 0 < most < batch:
        hint = f"--batch {most} is the most that fits at this context. {hint[0].upper()}{hint[1:]}"
    return DoesNotFitError(message, hint=hint)


def _most_sequences(
    shape: ModelShape, gpu: GpuProfile, limit: int, weight_format: WeightFormat, tokens: int
) -> int:
    """The largest batch that leaves each sequence a useful cache; 0 where not even one fits."""
    useful = shape.kv_bytes(min(tokens, USEFUL_CACHE_TOKENS))

    def room(batch: int) -> float:
        return limit - add(*fixed_parts(shape, gpu, weight_format, tokens, batch)).value

    return most_at_once(useful, room)


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
) -> str:
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
    return (
        f"the smallest limit that works is {_at_least(needs[smallest])}, with {smallest} "
        f"weights{shorter}."
    )


def _both(size: float) -> str:
    return f"{size / GB:.2f} GB ({size / GIB:.2f} GiB)"


def _at_least(size: float) -> str:
    """Both units, rounded up, so that what is printed is enough when typed back."""
    decimal, binary = (math.ceil(100 * size / unit) / 100 for unit in (GB, GIB))
    return f"{decimal:.2f}GB ({binary:.2f}GiB)"
