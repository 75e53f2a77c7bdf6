"""What one policy takes and how fast it runs: memory and latency models put together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, exact
from kvtune.policies.host_pages import host_sequence_bytes
from kvtune.policies.option import Option
from kvtune.policies.placement import evicts_coded
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.policies.room import Room
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import least_certain
from kvtune.simulator.latency.compression import compression
from kvtune.simulator.latency.host import host_step
from kvtune.simulator.latency.read_back import read_back_step, reads_back
from kvtune.simulator.latency.steps import decode_step, prefill
from kvtune.simulator.memory.peak import add, peak_memory
from kvtune.simulator.memory.plan import MemoryPlan
from kvtune.simulator.memory.policy_bytes import (
    bytes_of,
    bytes_read_by_format,
    cache_bytes_by_format,
    statistics_bytes,
)


@dataclass(frozen=True)
class PartRead:
    """How long it takes to read a prompt that is read in part, or in chunks.

    Args:
        tokens: that are read, behind a prefix whose keys and values are held.
        seconds: of one prompt.
    """

    tokens: int
    seconds: Estimate


@dataclass(frozen=True)
class Cost:
    """A policy on one card, for the sequences of a budget.

    Args:
        prompt_bytes: of one compressed prompt as formats count them, scales and lengths included.
        sequence_bytes: that the runtime's allocator hands out for one sequence: pages of its prompt
            and of its generated tokens, which stay in 16 bits, and tables; of heads that go on
            evicting, with the most that they ever hold, and their statistics.
        statistics_bytes: the part of those that methods remember of entries while they evict.
        share: of the bf16 bytes of the same prompt.
        sequences_that_fit: at once in what the budget leaves for the cache.
        most_at_once: the same, between those that fit at both ends of what is left.
        memory: peak of everything together, bytes; where a policy waits for a prompt's end, with
            that prompt's uncompressed cache.
        latency: of one decode step of all sequences, seconds.
        prefill: of one prompt, or of what stands behind its prefix, seconds.
        compression: of one prompt, beside its prefill, seconds.
        tokens_per_second: decoded by all sequences together.
        host_bytes: pinned memory of the host that one sequence's prompt takes there.
        moved_bytes: that a decode step brings over from there for each sequence.
        front: of a first token beside its prefill, where a serving stack's is known: its server,
            tokeniser and the steps that are planned ahead, seconds.
    """

    prompt_bytes: int
    sequence_bytes: int
    statistics_bytes: int
    share: float
    sequences_that_fit: int
    most_at_once: Estimate
    memory: Estimate
    latency: Estimate
    prefill: Estimate
    compression: Estimate
    tokens_per_second: Estimate
    host_bytes: int = 0
    moved_bytes: int = 0
    front: Estimate = field(default_factory=lambda: exact(0, "s"))

    @property
    def first_token(self) -> Estimate:
        """Seconds until a prompt that waits for no other has its first token."""
        read = one_after_the_other(self.prefill, self.compression)
        return one_after_the_other(read, self.front)


def full_cost(budget: MemoryPlan, part: PartRead | None = None, element_bytes: int = 2) -> Cost:
    """The same for the whole cache in bf16, or in fp8 (``element_bytes`` 1), of any shape."""
    tokens, name = budget.context_tokens, "bf16" if element_bytes == 2 else "fp8"
    ends = tokens, tokens + budget.generated_tokens
    prompt, held = (Counter({name: budget.shape.kv_bytes(end, element_bytes)}) for end in ends)
    return _cost(budget, _Held(prompt, held, held), held[name], None, part)


def policy_cost(
    policy: Policy,
    budget: MemoryPlan,
    *,
    evicts: bool = False,
    part: PartRead | None = None,
    each_bytes: int | None = None,
) -> Cost:
    """Memory and time of a policy under a budget, for its context and batch.

    Args:
        policy: for the shape's layers and KV heads.
        budget: says model, card, weight format, context, batch, and the most that each sequence
            generates.
        evicts: whether methods that can go on evicting while tokens are generated do; the time
            that they take for it at each step is not counted.
        part: of a prompt that is read; None for all of it at once.
        each_bytes: that a serving stack holds of one sequence; None for kvtune's own pages.

    Raises:
        KvtuneError: another shape's policy, or layers whose cache is no full cache of heads.
    """
    shape, tokens, generated = budget.shape, budget.context_tokens, budget.generated_tokens
    policy.check_fits(shape.layers, shape.kv_heads)
    if not shape.keeps_all(tokens + generated):
        raise KvtuneError(
            f"{shape.name} has sliding-window, latent, recurrent or unequal layers; "
            "policies for those cannot be costed yet"
        )
    prompt = cache_bytes_by_format(policy, shape, tokens)
    if evicts:
        held = _while_evicting(policy, shape, tokens, generated)
    else:
        grown = shape.kv_bytes(tokens + generated) - shape.kv_bytes(tokens)
        new = Counter({"bf16": grown})
        read = bytes_read_by_format(policy, shape, tokens)
        held = _Held(prompt, prompt + new, read + new)
    size = budget.sequence_bytes(policy, evicts) if each_bytes is None else each_bytes
    return _cost(budget, held, size, policy, part)


@dataclass(frozen=True)
class _Held:
    """Bytes of one sequence by the name of their format, without the heads' lengths.

    ``most`` is what is held at the end, and ``read`` what a decode step reads then.
    """

    prompt: Counter[str]
    most: Counter[str]
    read: Counter[str]
    statistics: int = 0


def _while_evicting(policy: Policy, shape: ModelShape, prompt_tokens: int, generated: int) -> _Held:
    """Heads that go on evicting hold no more than they may, and statistics beside each entry."""
    prompt, most = Counter[str](), Counter[str]()
    budgets = policy.budgets(prompt_tokens).flat
    for option, planned in zip(policy.options(), budgets, strict=True):
        room = Room.of(option, int(planned), prompt_tokens)
        opened = room.prompt if room else int(planned)
        ends = min(opened + generated, room.most) if room else opened + generated
        prompt += bytes_of(option, opened, prompt_tokens, shape.head_dim)
        stored = ends if room and evicts_coded(option, shape.head_dim) else min(opened, ends)
        most += bytes_of(option, stored, max(prompt_tokens, stored), shape.head_dim)
        grown = max(ends - stored, 0)
        most["bf16"] += Option().footprint(grown, grown, shape.head_dim)
    return _Held(prompt, most, most, statistics_bytes(policy, prompt_tokens, generated))


def _cost(
    budget: MemoryPlan, held: _Held, size: int, policy: Policy | None, part: PartRead | None
) -> Cost:
    shape, gpu, weights = budget.shape, budget.gpu, budget.weight_format
    tokens, batch = budget.context_tokens, budget.batch
    beside = footprint_of_lengths(shape.layers, shape.kv_heads) if policy else 0
    prompt_bytes = sum(held.prompt.values()) + beside
    waiting = budget.waiting(policy)
    read = dict(held.read) or {"bf16": 0}  # nothing where all lies on the host
    step = decode_step(shape, gpu, weights, batch, read, "runtime")
    on_host = policy if policy and policy.uses_host else None
    if on_host:
        step = _with(step, host_step(on_host, shape, gpu, batch, tokens))
    if policy and reads_back(policy, shape.head_dim):
        step = _with(step, read_back_step(policy, shape, gpu, batch, tokens))
    first = part.seconds if part else prefill(shape, gpu, weights, tokens, execution="runtime")
    peak = peak_memory(shape, gpu, weights, size, tokens, batch)
    most = budget.most_of(size, waiting)
    return Cost(
        prompt_bytes=prompt_bytes,
        sequence_bytes=size,
        statistics_bytes=held.statistics,
        share=prompt_bytes / shape.kv_bytes(tokens),
        sequences_that_fit=int(most.value),
        most_at_once=most,
        memory=add(peak, exact(waiting, "B")),
        latency=step,
        prefill=first,
        compression=_compressing(policy, shape, gpu, tokens, first, part),
        tokens_per_second=per_second(step, batch),
        host_bytes=host_sequence_bytes(on_host, tokens, shape.head_dim) if on_host else 0,
        moved_bytes=on_host.moved_bytes(tokens, shape.head_dim) if on_host else 0,
    )


def _compressing(
    policy: Policy | None,
    shape: ModelShape,
    gpu: GpuProfile,
    tokens: int,
    first: Estimate,
    part: PartRead | None,
) -> Estimate:
    """Seconds to compress one prompt; at least for what was read, at most for its prefix too."""
    if policy is None:
        return exact(0, "s")
    whole = compression(policy, shape, gpu, tokens, first)
    if part is None or part.tokens == tokens:
        return whole
    new = compression(policy, shape, gpu, part.tokens, first)
    return Estimate(whole.value, min(new.low, whole.low), whole.high, "s", whole.tier)


def _with(step: Estimate, added: Estimate) -> Estimate:
    """A step with what the host adds, or reading back, at the tier of the least certain."""
    value, low, high = (
        getattr(step, end) + getattr(added, end) for end in ("value", "low", "high")
    )
    return Estimate(value, low, high, "s", least_certain(step.tier, added.tier))


def per_second(step: Estimate, sequences: int) -> Estimate:
    """Tokens a second from the time of a step; the slow end of one is the low end of the other."""
    value, low, high = (sequences / end for end in (step.value, step.high, step.low))
    return Estimate(value, low, high, "tokens/s", step.tier)


def one_after_the_other(first: Estimate, then: Estimate) -> Estimate:
    """Both times together, no surer than the second where it takes any."""
    value, low, high = (getattr(first, e) + getattr(then, e) for e in ("value", "low", "high"))
    return Estimate(value, low, high, first.unit, then.tier if then.value else first.tier)
