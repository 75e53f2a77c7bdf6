"""What the simulator says of runs in the paged runtime, before they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvtune.common.estimate import Estimate, exact
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.runtime.largest import Largest, page_bytes
from kvtune.runtime.timing import NEW_TOKENS, STEPS, STRETCHES, Decoding, Timing
from kvtune.simulator.compression import compression
from kvtune.simulator.cost import cache_bytes_by_format, per_second
from kvtune.simulator.latency import decode_step, prefill
from kvtune.simulator.peak import add, largest_batch, overhead_bytes, prefill_peak_bytes
from kvtune.simulator.weights import weight_bytes

Pair = tuple[Estimate, float]
"""A predicted figure, and what was measured."""

KEPT_OF_PREFILL = (0.65, 0.4, 0.9)
"""What torch's allocator keeps beside its tensors, by the activations of all prompts read at once.

0.53 to 0.79 on an H100: SmolLM2, 16 x 8k tokens (``validate-h100.txt``), and Llama-8B's shape,
2 x 8k (``decode-step-h100.json``), of the plan and uncompressed.
"""


@dataclass(frozen=True)
class Expected:
    """What the simulator says of one policy on the card, for the batch that was timed.

    Args:
        prefill: of the whole batch, compression included, seconds.
        step: one decode step, seconds.
        tokens_per_second: of all sequences together.
        peak_bytes: of tensors: weights, pages, and activations of all prompts read at once.
        device_bytes: those, what the process takes beside them, and what the allocator keeps.
    """

    prefill: Estimate
    step: Estimate
    tokens_per_second: Estimate
    peak_bytes: Estimate
    device_bytes: Estimate

    def pairs(self, measured: Timing) -> Iterator[Pair]:
        """Each figure with its measurement, where there is one."""
        for name in ("prefill", "step", "tokens_per_second"):
            yield getattr(self, name), getattr(measured, name).value
        yield self.peak_bytes, measured.peak_bytes
        if measured.device_bytes is not None:
            yield self.device_bytes, measured.device_bytes


@dataclass(frozen=True)
class ExpectedLargest:
    """The largest batch of one policy on the card, as the simulator says.

    Args:
        batch: sequences.
        tokens_per_second: of so many sequences together; its ends are those of the batch's ends.
    """

    batch: Estimate
    tokens_per_second: Estimate

    def pairs(self, measured: Largest[Decoding]) -> Iterator[Pair]:
        """Each figure with its measurement, where there is one."""
        yield self.batch, measured.batch
        if measured.found:
            yield self.tokens_per_second, measured.found.tokens_per_second.value


@dataclass(frozen=True)
class Card:
    """A card with a model in bf16 on it.

    Args:
        shape: the model.
        gpu: the card.
        tokens: of each prompt.
    """

    shape: ModelShape
    gpu: GpuProfile
    tokens: int

    def expect(self, policy: Policy, batch: int) -> Expected:
        """Of a batch whose prompts are read at once, in the middle of the timed steps."""
        step = self._step(policy, batch, STEPS * (1 + STRETCHES // 2))
        read = prefill(self.shape, self.gpu, "bf16", self.tokens, batch, "runtime")
        compressed = compression(policy, self.shape, self.gpu, self.tokens, read, batch)
        tensors, activations = self._tensors(policy, batch), self._activations(batch)
        value, low, high = (share * activations.value for share in KEPT_OF_PREFILL)
        kept = Estimate(value, low, high, "B", "fitted")
        return Expected(
            prefill=_one_after_the_other(read, compressed),
            step=step,
            tokens_per_second=per_second(step, batch),
            peak_bytes=tensors,
            device_bytes=add(tensors, overhead_bytes(self.shape, self.gpu, "bf16"), kept),
        )

    def expect_largest(self, policy: Policy) -> ExpectedLargest:
        """Of prompts that are read one after another, each in one piece."""
        each, tokens = page_bytes(policy, self.tokens, self.shape.head_dim), self.tokens
        batch = largest_batch(self.shape, self.gpu, "bf16", each, tokens, chunk_tokens=tokens)
        low, value, high = (
            self._rate(policy, int(n)) for n in (batch.low, batch.value, batch.high)
        )
        rate = Estimate(value.value, low.low, high.high, value.unit, value.tier)
        return ExpectedLargest(batch, rate)

    def _rate(self, policy: Policy, batch: int) -> Estimate:
        if not batch:
            return exact(0, "tokens/s")
        return per_second(self._step(policy, batch, 0), batch)

    def _step(self, policy: Policy, batch: int, generated: int) -> Estimate:
        held = cache_bytes_by_format(policy, self.shape, self.tokens)
        held["bf16"] += self.shape.kv_bytes(generated)
        return decode_step(self.shape, self.gpu, "bf16", batch, dict(held), "runtime")

    def _tensors(self, policy: Policy, batch: int) -> Estimate:
        pages = page_bytes(policy, self.tokens, self.shape.head_dim, NEW_TOKENS)
        weights = weight_bytes(self.shape, "bf16")
        return add(weights, self._activations(batch), exact(batch * pages, "B"))

    def _activations(self, batch: int) -> Estimate:
        """All prompts are read at once."""
        together = batch * self.tokens
        return prefill_peak_bytes(self.shape, together, batch, chunk_tokens=together)


def _one_after_the_other(first: Estimate, then: Estimate) -> Estimate:
    """Both times together, no surer than the second where it takes any."""
    value, low, high = (getattr(first, e) + getattr(then, e) for e in ("value", "low", "high"))
    return Estimate(value, low, high, first.unit, then.tier if then.value else first.tier)
