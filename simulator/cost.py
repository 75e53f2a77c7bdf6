"""What one policy takes and how fast it runs: memory and latency models put together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, exact
from kvtune.policies.format import Format
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.compression import compression
from kvtune.simulator.latency import decode_step, prefill
from kvtune.simulator.memory import MemoryBudget, peak_memory


@dataclass(frozen=True)
class Cost:
    """A policy on one card, for the sequences of a budget.

    Args:
        prompt_bytes: of one compressed prompt, scales and lengths included.
        sequence_bytes: with the generated tokens, which stay in 16 bits.
        share: of the bf16 bytes of the same prompt.
        sequences_that_fit: at once in what the budget leaves for the cache.
        memory: peak of everything together, bytes.
        latency: of one decode step of all sequences, seconds.
        prefill: of one prompt, seconds.
        compression: of one prompt, beside its prefill, seconds.
        tokens_per_second: decoded by all sequences together.
    """

    prompt_bytes: int
    sequence_bytes: int
    share: float
    sequences_that_fit: int
    memory: Estimate
    latency: Estimate
    prefill: Estimate
    compression: Estimate
    tokens_per_second: Estimate


def full_cost(shape: ModelShape, gpu: GpuProfile, budget: MemoryBudget, generated: int) -> Cost:
    """The same for the uncompressed bf16 cache, of any shape."""
    by_bits = Counter({16.0: shape.kv_bytes(budget.context_tokens)})
    return _cost(shape, gpu, budget, generated, by_bits, None)


def policy_cost(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, budget: MemoryBudget, generated: int
) -> Cost:
    """Memory and time of a policy under a budget, for its context and batch.

    Args:
        policy: for the shape's layers and KV heads.
        shape: the model.
        gpu: the card.
        budget: says context, batch, weight format and room for the cache.
        generated: tokens that each sequence has generated, the most it will hold.

    Raises:
        KvtuneError: another shape's policy, or layers whose cache is no full cache of heads.
    """
    policy.check_fits(shape.layers, shape.kv_heads)
    if shape.latent is not None or any(shape.windows):
        raise KvtuneError(
            f"{shape.name} has sliding-window or latent layers; policies for those cannot be "
            "costed yet"
        )
    by_bits = cache_bytes_by_bits(policy, shape, budget.context_tokens)
    return _cost(shape, gpu, budget, generated, by_bits, policy)


def _cost(
    shape: ModelShape,
    gpu: GpuProfile,
    budget: MemoryBudget,
    generated: int,
    prompt: Counter[float],
    policy: Policy | None,
) -> Cost:
    tokens, batch, weights = budget.context_tokens, budget.batch, budget.weight_format
    full = shape.kv_bytes(tokens)
    lengths = footprint_of_lengths(shape.layers, shape.kv_heads) if policy else 0
    held = prompt + Counter({16.0: shape.kv_bytes(tokens + generated) - full})
    prompt_bytes, sequence_bytes = sum(prompt.values()) + lengths, sum(held.values()) + lengths
    step = decode_step(shape, gpu, weights, batch, dict(held))
    first = prefill(shape, gpu, weights, tokens)
    return Cost(
        prompt_bytes=prompt_bytes,
        sequence_bytes=sequence_bytes,
        share=prompt_bytes / full,
        sequences_that_fit=budget.cache_bytes // sequence_bytes,
        memory=peak_memory(shape, gpu, weights, sequence_bytes, tokens, batch),
        latency=step,
        prefill=first,
        compression=compression(policy, shape, gpu, tokens, first) if policy else exact(0, "s"),
        tokens_per_second=per_second(step, batch),
    )


def cache_bytes_by_bits(policy: Policy, shape: ModelShape, prompt_tokens: int) -> Counter[float]:
    """Bytes of one compressed prompt by bits an element, without the heads' lengths."""
    found: Counter[float] = Counter()
    budgets = policy.budgets(prompt_tokens).flat
    for option, tokens in zip(policy.options(), budgets, strict=True):
        for form, role in ((option.keys, "keys"), (option.values, "values")):
            found[bits(form)] += form.footprint(int(tokens), shape.head_dim, role)  # type: ignore[arg-type]
    return found


def bits(form: Format) -> float:
    """Payload bits of an element."""
    return float(getattr(form, "bits", 8 if form.name == "fp8" else 16))


def per_second(step: Estimate, sequences: int) -> Estimate:
    """Tokens a second from the time of a step; the slow end of one is the low end of the other."""
    value, low, high = (sequences / end for end in (step.value, step.high, step.low))
    return Estimate(value, low, high, "tokens/s", step.tier)
