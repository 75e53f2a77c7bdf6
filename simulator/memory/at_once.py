"""How many prompts fit at once, as a figure with an interval: memory is known in one only."""

from __future__ import annotations

from kvtune.common.estimate import Estimate
from kvtune.simulator.memory.budget import MemoryBudget


def prompts_at_once(prompts: int, each_bytes: float, budget: MemoryBudget) -> Estimate:
    """The number, between those that fit at both ends of what is left for the caches.

    Args:
        prompts: that fit at once.
        each_bytes: that one of them takes of it.
        budget: of which this is what is left.
    """
    cache, each = budget.cache, max(each_bytes, 1.0)
    low, high = (int(end // each) for end in (cache.low, cache.high))
    return Estimate(prompts, min(low, prompts), max(high, prompts), "prompts", cache.tier)


def bytes_of_each(prompts: int, peak: Estimate, budget: MemoryBudget) -> float:
    """What one of so many prompts takes where everything together comes to ``peak``."""
    fixed = sum(part.value for part in (budget.weights, budget.overhead, budget.prefill))
    return (peak.value - fixed) / max(prompts, 1)
