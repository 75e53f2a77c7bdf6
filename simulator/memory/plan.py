"""Where a memory limit goes, and how many sequences it holds: made once, asked by everything."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial

from kvtune.common.errors import DoesNotFitError, KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import format_bytes
from kvtune.policies.paging import PREFILL_CHUNK_TOKENS, Growth, sequence_bytes, waiting_bytes
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.peak import (
    USEFUL_CACHE_TOKENS,
    End,
    fixed_parts,
    most_at_once,
    overhead_bytes,
    prefill_peak_bytes,
    required_bytes,
)
from kvtune.simulator.memory.policy_bytes import statistics_bytes
from kvtune.simulator.memory.too_large import TooLarge, check_limit
from kvtune.simulator.memory.weights import (
    WeightFormat,
    check_format,
    format_name,
    formats_by_width,
    weight_bytes,
)


@dataclass(frozen=True)
class MemoryPlan:
    """What a memory limit is spent on. Estimates are in bytes.

    The search, ``estimate``, ``export``, ``serve-sim`` and the explorer all count sequences by it:
    each takes what the paged runtime hands out by its end, and what the runtime works with, which
    grows with their number, comes off the limit before.

    Args:
        shape: the model, or one GPU's share of it.
        gpu: the card.
        limit_bytes: what may be used of the card in all.
        weight_format: chosen by the user or as the widest that fits.
        reason: one sentence on why this format.
        context_tokens: prompt tokens of a sequence.
        generated_tokens: tokens that each sequence generates.
        batch: sequences at once.
        chunk_tokens: of prompts that are read at once.
    """

    shape: ModelShape
    gpu: GpuProfile
    limit_bytes: int
    weight_format: WeightFormat
    reason: str
    context_tokens: int
    generated_tokens: int = 0
    batch: int = 1
    chunk_tokens: int = PREFILL_CHUNK_TOKENS

    def at(self, batch: int) -> MemoryPlan:
        """The same for so many sequences."""
        return replace(self, batch=batch)

    # --- where the limit goes -------------------------------------------------------------------

    @cached_property
    def weights(self) -> Estimate:
        """All weights."""
        return weight_bytes(self.shape, self.weight_format)

    @cached_property
    def overhead(self) -> Estimate:
        """Context, graphs and workspaces, and what the allocator loses."""
        return overhead_bytes(self.shape, self.gpu, self.weight_format)

    @cached_property
    def prefill(self) -> Estimate:
        """Activations and one layer's uncompressed cache at their peak."""
        return self._working(self.batch)

    @cached_property
    def cache(self) -> Estimate:
        """What is left; its low end is what is left if all the others are at their high ends."""
        used = (self.weights, self.overhead, self.prefill)
        value, low, high = (
            max(0.0, self.limit_bytes - sum(getattr(part, end) for part in used))
            for end in ("value", "high", "low")
        )
        return Estimate(value, low, high, "B", "assumed")

    @property
    def cache_bytes(self) -> int:
        """Bytes for the whole batch's cache."""
        return int(self.cache.value)

    @property
    def full_cache_bytes(self) -> int:
        """The whole batch's bf16 cache of prompts."""
        return self.batch * self.shape.kv_bytes(self.context_tokens)

    @property
    def cache_tokens(self) -> int | None:
        """Tokens of bf16 cache that fit, over the batch; None where any number does."""
        tokens = self.shape.tokens_that_fit(self.cache_bytes)
        if tokens is not None and self.shape.kv_bytes(tokens) == tokens * self.shape.kv_bytes(1):
            return tokens  # whoever's they are; windows and states are each sequence's own
        each = self.shape.tokens_that_fit(self.cache_bytes // self.batch)
        return None if each is None else self.batch * each

    @property
    def share_that_fits(self) -> float:
        """The cache that fits over the full bf16 cache; 1 where no compression is needed."""
        return min(1.0, self.cache_bytes / self.full_cache_bytes)

    # --- how many sequences fit -----------------------------------------------------------------

    def sequence_bytes(self, policy: Policy | None, evicts: bool = False) -> int:
        """Device memory of one sequence by its end: pages of its prompt and of its answer.

        Args:
            policy: None for the uncompressed bf16 cache, without pages.
            evicts: whether methods that can go on evicting do; what they remember is counted too.
        """
        tokens, new = self.context_tokens, self.generated_tokens
        if policy is None:
            return self.shape.kv_bytes(tokens + new)
        noted = statistics_bytes(policy, tokens, new) if evicts else 0
        return noted + sequence_bytes(policy, tokens, self.shape.head_dim, Growth(new, evicts))

    def waiting(self, policy: Policy | None) -> int:
        """Bytes beside all caches while a policy waits for the end of one prompt."""
        if policy is None or not policy.waits:
            return 0
        return waiting_bytes(self.shape.kv_bytes(self.context_tokens), self.shape.layers)

    def room(self, batch: int, end: End = "value") -> int:
        """Bytes that the caches of so many sequences may take, by one end of the other parts."""
        working: float = getattr(self._working(batch), end)
        return self.beside_working(end) - math.ceil(working)

    def beside_working(self, end: End = "value") -> int:
        """Bytes for the caches and what the runtime works with."""
        weights, overhead = getattr(self.weights, end), getattr(self.overhead, end)
        return int(self.limit_bytes - weights - overhead)

    def most(self, policy: Policy | None, evicts: bool = False) -> Estimate:
        """Sequences of a policy that fit at once; 0 where not even one does."""
        return self.most_of(self.sequence_bytes(policy, evicts), self.waiting(policy))

    def most_of(self, each: float, waiting: int = 0) -> Estimate:
        """The same of sequences that take so many bytes each, with ``waiting`` beside them."""

        value, low, high = (self.count(each, waiting, end) for end in ("value", "high", "low"))
        return Estimate(value, low, high, "sequences", "assumed")

    def count(self, each: float, waiting: int = 0, end: End = "value") -> int:
        """The same by one end of the other parts."""
        return most_at_once(each, lambda batch: self.room(batch, end) - waiting)

    def _working(self, batch: int) -> Estimate:
        return prefill_peak_bytes(self.shape, self.context_tokens, batch, self.chunk_tokens)

    # --- in files -------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, object]:
        """The form that goes into JSON."""
        parts = ("weights", "overhead", "prefill", "cache")
        plain = (
            "limit_bytes", "weight_format", "reason", "context_tokens", "batch",
            "full_cache_bytes", "cache_tokens", "share_that_fits",
        )  # fmt: skip
        named = {"model": self.shape.name, "gpu": self.gpu.name}
        return (
            named
            | {"device_bytes": self.gpu.visible_bytes}
            | {key: getattr(self, key) for key in plain}
            | {key: getattr(self, key).as_dict() for key in parts}
        )


def memory_plan(
    shape: ModelShape,
    gpu: GpuProfile,
    limit_bytes: int | None = None,
    *,
    context_tokens: int,
    generated_tokens: int = 0,
    batch: int = 1,
    weights: str | None = None,
) -> MemoryPlan:
    """Split a memory limit (None: all that the card shows) into weights, overhead and cache.

    Args:
        shape: the model.
        gpu: the card.
        limit_bytes: the most that may be used, in bytes.
        context_tokens: longest prompt; the prefill peak is taken for one of this length.
        generated_tokens: that each sequence has room for beside its prompt.
        batch: sequences at a time.
        weights: a format; None or ``auto`` for the widest that leaves a useful cache.

    Raises:
        KvtuneError: the limit is above what the card shows, the format is unknown, or nothing fits.
    """
    if context_tokens < 1 or batch < 1:
        raise KvtuneError("context and batch must be at least 1")
    limit = gpu.visible_bytes if limit_bytes is None else limit_bytes
    check_limit(gpu, limit)
    if weights is None or weights == "auto":
        chosen, reason = _widest(shape, gpu, limit, context_tokens, batch)
    else:
        chosen = check_format(weights)
        reason = f"{format_name(shape, chosen)} weights, as asked for"
        if required_bytes(shape, gpu, chosen, context_tokens, batch) > limit:
            raise _too_large(shape, gpu, limit, (chosen,), context_tokens, batch)
    return MemoryPlan(shape, gpu, limit, chosen, reason, context_tokens, generated_tokens, batch)


def _widest(
    shape: ModelShape, gpu: GpuProfile, limit: int, context_tokens: int, batch: int
) -> tuple[WeightFormat, str]:
    """The widest format that leaves a useful cache, and the sentence that says so."""
    formats = formats_by_width(shape, gpu)
    for index, weight_format in enumerate(formats):
        if required_bytes(shape, gpu, weight_format, context_tokens, batch) <= limit:
            return weight_format, _reason(shape, gpu, limit, formats[: index + 1])
    raise _too_large(shape, gpu, limit, formats, context_tokens, batch)


def _too_large(
    shape: ModelShape,
    gpu: GpuProfile,
    limit: int,
    tried: tuple[WeightFormat, ...],
    context: int,
    batch: int,
) -> DoesNotFitError:
    found = TooLarge(
        shape, gpu, limit, context, batch, lambda *asked: required_bytes(shape, gpu, *asked)
    )
    cached_tokens = batch * min(context, USEFUL_CACHE_TOKENS)
    parts = partial(fixed_parts, shape, gpu, context_tokens=context, batch=batch)
    return found.error(tried, parts, cached_tokens)


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
