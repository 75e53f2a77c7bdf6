"""Steps and prefills of a model on one or several GPUs, by the kernels of a serving stack."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.estimate import Estimate, Tier
from kvtune.profiles.elsewhere import Stack, StackChoice
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import split_over
from kvtune.simulator.latency.stacks import FRONT_ENDS, interval_of, on_card, stack_model
from kvtune.simulator.latency.sums import sums_over_gpus
from kvtune.simulator.memory.plan import MemoryPlan


@dataclass(frozen=True)
class Deployment:
    """A model on GPUs that share each layer.

    Args:
        shape: the whole model.
        gpu: one of the cards.
        gpus: how many.
        stack: whose kernels; ``kvtune`` for our own or the datasheet's.
    """

    shape: ModelShape
    gpu: GpuProfile
    gpus: int = 1
    stack: StackChoice = "kvtune"

    @property
    def local(self) -> ModelShape:
        """One GPU's share."""
        return split_over(self.shape, self.gpus)

    def times(
        self,
        step: Estimate,
        prefill: Estimate,
        budget: MemoryPlan,
        read_tokens: int | None = None,
    ) -> tuple[Estimate, Estimate]:
        """A decode step and a prefill of all GPUs together over the uncompressed bf16 cache.

        Args:
            step: of one GPU's share alone, by kvtune's own model.
            prefill: likewise.
            budget: of one GPU's share.
            read_tokens: of a prompt that the prefill reads; all of them unless given.
        """
        tokens, batch = budget.context_tokens, budget.batch
        if self.stack == "kvtune":
            return self._summed(step, batch), self._summed(prefill, read_tokens or tokens)
        return self._served(self.stack, budget, tokens + budget.generated_tokens)

    def _summed(self, alone: Estimate, rows: int) -> Estimate:
        """With two sums over the GPUs a layer."""
        if self.gpus == 1:
            return alone
        sums = sums_over_gpus(self.shape, self.gpu, self.gpus, rows).at()
        value, low, high = (getattr(alone, e) + getattr(sums, e) for e in ("value", "low", "high"))
        return Estimate(value, low, high, "s", "datasheet")

    def _served(self, stack: Stack, budget: MemoryPlan, held: int) -> tuple[Estimate, Estimate]:
        """A step at the longest cache, and a prefill, from the stack's tables."""
        model, card = stack_model(self.shape, self.gpu, self.gpus, stack, budget.weight_format)
        factor, tier = interval_of(card, self.gpu)
        model = on_card(model, card, self.gpu)
        step, first = model.decode(budget.batch, held), model.prefill(budget.context_tokens)
        of_first = max(factor, FRONT_ENDS[stack].within)
        return _within(float(step), factor, tier), _within(float(first), of_first, tier)


def _within(seconds: float, factor: float, tier: Tier) -> Estimate:
    return Estimate(seconds, seconds / factor, seconds * factor, "s", tier)
