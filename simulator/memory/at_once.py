"""How many prompts fit at once, as a figure with an interval: memory is known in one only."""

from __future__ import annotations

from kvtune.common.estimate import Estimate
from kvtune.simulator.memory.plan import MemoryPlan


def prompts_at_once(prompts: int, each_bytes: float, budget: MemoryPlan) -> Estimate:
    """The number, between those that fit at both ends of what is left for the caches.

    Args:
        prompts: that fit at once.
        each_bytes: that one of them takes of it.
        budget: of which this is what is left.
    """
    most = budget.most_of(max(each_bytes, 1.0))
    low, high = min(most.low, prompts), max(most.high, prompts)
    return Estimate(prompts, low, high, "prompts", most.tier)


def bytes_of_each(prompts: int, peak: Estimate, budget: MemoryPlan) -> float:
    """What one of so many prompts takes where everything together comes to ``peak``."""
    at_once = budget.at(max(prompts, 1))
    fixed = sum(part.value for part in (at_once.weights, at_once.overhead, at_once.prefill))
    return (peak.value - fixed) / at_once.batch
