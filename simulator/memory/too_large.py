"""What is said of a memory limit that is too small, or more than there is."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtune.common.errors import DoesNotFitError, KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import GB, GIB, format_bytes, format_tokens
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.weights import WeightFormat, formats_by_width


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


@dataclass(frozen=True)
class TooLarge:
    """A model that a limit does not hold, and what else it would.

    Args:
        shape: the model.
        gpu: the card.
        limit: in bytes.
        context: prompt tokens of a sequence that were asked for.
        batch: sequences at once, likewise.
        required: the smallest limit that works for a format of the weights, a context and a batch.
    """

    shape: ModelShape
    gpu: GpuProfile
    limit: int
    context: int
    batch: int
    required: Callable[[WeightFormat, int, int], int]

    def error(
        self,
        tried: Sequence[WeightFormat],
        parts: Callable[[WeightFormat], Sequence[Estimate]],
        cached_tokens: int,
    ) -> DoesNotFitError:
        """The error that says what is too large and what would fit.

        Args:
            tried: formats of the weights.
            parts: weights, overhead and prefill with one of them.
            cached_tokens: of the least cache that is useful, of all sequences.
        """
        known = dict.fromkeys((*tried, *formats_by_width(self.shape, self.gpu)))
        needs = {name: self.required(name, self.context, self.batch) for name in known}
        least = min(tried, key=lambda name: needs[name])
        weights, overhead, prefill = (format_bytes(part.value) for part in parts(least))
        message = (
            f"{self.shape.name} does not fit in {_both(self.limit)} on {self.gpu.name}: {least} "
            f"weights {weights}, overhead {overhead}, prefill of {format_tokens(self.context)} "
            f"{prefill}, and a cache of {format_tokens(cached_tokens)}"
        )
        smallest = min(needs, key=lambda name: needs[name])
        cache = self.batch * self.shape.kv_bytes(self.context)
        whole = sum(part.value for part in parts(smallest)) + cache
        hint = _what_fits(self.gpu, self.limit, needs, least, self._longest_context, whole)
        most = self._most_sequences(smallest)
        if 0 < most < self.batch:
            first = f"--batch {most} is the most that fits at this context. "
            hint = f"{first}{hint[0].upper()}{hint[1:]}"
        return DoesNotFitError(message, hint=hint)

    def _most_sequences(self, weight_format: WeightFormat) -> int:
        """The largest batch that leaves each sequence a useful cache; 0 where not one fits."""
        batches = range(1, self.batch + 1)
        return bisect.bisect_left(
            batches, True, key=lambda n: self.required(weight_format, self.context, n) > self.limit
        )

    def _longest_context(self, weight_format: WeightFormat) -> int:
        """The longest that fits, in whole kilotokens below what was asked for; 0 if none does."""
        contexts = range(1024, self.context, 1024)
        fitting = bisect.bisect_left(
            contexts,
            True,
            key=lambda tokens: self.required(weight_format, tokens, self.batch) > self.limit,
        )
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
            f"{fitting[0]} weights fit in this limit; all of that with {tried} ones needs "
            f"{_at_least(needs[tried])}{shorter}."
        )
    smallest = min(needs, key=lambda name: needs[name])
    most = longest(smallest)
    if needs[smallest] > gpu.visible_bytes:
        shorter = f"--context {most} is the most that fits; else a" if most else "A"
        where = " at this context" if most else ""
        return (
            f"no limit on this GPU is enough{where}: all of that with {smallest} weights needs "
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
