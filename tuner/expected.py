"""What the simulator says of runs in the paged runtime, before they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvtune.common.estimate import Estimate, exact
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.runtime.largest import NEW_TOKENS as LARGEST_NEW_TOKENS
from kvtune.runtime.largest import Largest
from kvtune.runtime.timing import NEW_TOKENS, STEPS, STRETCHES, Decoding, Timing
from kvtune.simulator.cost import one_after_the_other, per_second
from kvtune.simulator.latency.compression import compression
from kvtune.simulator.latency.steps import decode_step, prefill
from kvtune.simulator.memory.peak import add
from kvtune.simulator.memory.plan import MemoryPlan
from kvtune.simulator.memory.policy_bytes import cache_bytes_by_format

Pair = tuple[Estimate, float]
"""A predicted figure, and what was measured."""


@dataclass(frozen=True)
class Expected:
    """What the simulator says of one policy on the card, for the batch that was timed.

    Args:
        prefill: of the whole batch, compression included, seconds.
        step: one decode step, seconds.
        tokens_per_second: of all sequences together.
        peak_bytes: of tensors: weights, pages, and what the runtime works with.
        device_bytes: those, and what the process takes beside them.
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
        """Figures of a batch whose prompts are read in turn, in the middle of the timed steps."""
        step = self._step(policy, batch, STEPS * (1 + STRETCHES // 2))
        read = prefill(self.shape, self.gpu, "bf16", self.tokens, batch, "runtime")
        compressed = compression(policy, self.shape, self.gpu, self.tokens, read, batch)
        tensors = self._tensors(policy, batch)
        return Expected(
            prefill=one_after_the_other(read, compressed),
            step=step,
            tokens_per_second=per_second(step, batch),
            peak_bytes=tensors,
            device_bytes=add(tensors, self._memory(NEW_TOKENS).overhead),
        )

    def expect_largest(self, policy: Policy) -> ExpectedLargest:
        """The largest batch of prompts that are read one after another."""
        batch = self._memory(LARGEST_NEW_TOKENS).most(policy)
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
        memory = self._memory(NEW_TOKENS).at(batch)
        caches = exact(batch * memory.sequence_bytes(policy), "B")
        return add(memory.weights, memory.prefill, caches)

    def _memory(self, new_tokens: int) -> MemoryPlan:
        """All of the card's memory, for sequences that generate so many tokens."""
        limit = self.gpu.visible_bytes
        return MemoryPlan(self.shape, self.gpu, limit, "bf16", "", self.tokens, new_tokens)
