"""Steps and prefills of a model on one or several GPUs, by the kernels of a serving stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvtune.common.estimate import Estimate, Tier, exact
from kvtune.profiles.elsewhere import Stack, StackChoice
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import split_over
from kvtune.simulator.latency.reading import Reading
from kvtune.simulator.latency.stacks import (
    KvFormat,
    StackSetting,
    front_end,
    interval_of,
    on_card,
    stack_model,
)
from kvtune.simulator.latency.sums import sums_over_gpus
from kvtune.simulator.memory.engine_memory import default_batch
from kvtune.simulator.memory.plan import MemoryPlan


class DeploymentTimes(NamedTuple):
    """Seconds of a decode step, of a prefill, and of a first token beside its prefill."""

    step: Estimate
    prefill: Estimate
    front: Estimate


@dataclass(frozen=True)
class Deployment:
    """A model on GPUs that share each layer.

    Args:
        shape: the whole model.
        gpu: one of the cards.
        gpus: how many.
        stack: whose kernels; ``kvtune`` for our own or the datasheet's.
        kv_format: of a stack's cache.
        expert_parallel: groups of GPUs that have routed experts of their own, under a stack.
    """

    shape: ModelShape
    gpu: GpuProfile
    gpus: int = 1
    stack: StackChoice = "kvtune"
    kv_format: KvFormat = "bfloat16"
    expert_parallel: int = 1

    @property
    def local(self) -> ModelShape:
        """One GPU's share."""
        return split_over(self.shape, self.gpus)

    def times(
        self, step: Estimate, prefill: Estimate, budget: MemoryPlan, reading: Reading
    ) -> DeploymentTimes:
        """Times of all GPUs together over the uncompressed cache.

        Args:
            step: of one GPU's share alone, by kvtune's own model.
            prefill: likewise.
            budget: of one GPU's share.
            reading: how prompts are read.
        """
        if self.stack == "kvtune":
            read = reading.new_tokens(budget.context_tokens)
            first = self._summed(prefill, read)
            return DeploymentTimes(self._summed(step, budget.batch), first, exact(0, "s"))
        return self._served(self.stack, budget, reading)

    def _summed(self, alone: Estimate, rows: int) -> Estimate:
        """With two sums over the GPUs a layer."""
        if self.gpus == 1:
            return alone
        sums = sums_over_gpus(self.shape, self.gpu, self.gpus, rows).at()
        value, low, high = (getattr(alone, e) + getattr(sums, e) for e in ("value", "low", "high"))
        return Estimate(value, low, high, "s", "datasheet")

    def _served(self, stack: Stack, budget: MemoryPlan, reading: Reading) -> DeploymentTimes:
        """A step at the longest cache, and a prefill, from the stack's tables."""
        setting = StackSetting(
            stack, budget.weight_format, self.gpus, self.kv_format, self.expert_parallel
        )
        model, card = stack_model(self.shape, self.gpu, setting)
        factor, tier = interval_of(card, self.gpu, self.shape)
        model, tokens = on_card(model, card, self.gpu), budget.context_tokens
        step = float(model.decode(budget.batch, tokens + budget.generated_tokens))
        chunk = reading.chunk_tokens or (default_batch(self.gpu)[0] if stack == "vllm" else None)
        first = model.prefill_in_chunks(reading.new_tokens(tokens), reading.prefix_tokens, chunk)
        server = front_end(stack, self.shape)
        front = float(server.seconds(tokens, step, budget.batch))
        of_first = max(factor, server.within)
        return DeploymentTimes(
            _within(step, factor, tier),
            _within(first, of_first, tier),
            _within(front, of_first, tier),
        )


def _within(seconds: float, factor: float, tier: Tier) -> Estimate:
    return Estimate(seconds, seconds / factor, seconds * factor, "s", tier)
