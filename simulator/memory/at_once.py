"""How many prompts fit at once, as a figure with an interval: memory is known in one only."""

from __future__ import annotations

from kvtune.common.estimate import Estimate


def prompts_at_once(prompts: int, most: Estimate) -> Estimate:
    """The number, between those that fit at both ends of what is left for the caches.

    Args:
        prompts: that are run at once.
        most: that fit, as ``MemoryPlan`` counts them; what is run is never outside.
    """
    low, high = min(most.low, prompts), max(most.high, prompts)
    return Estimate(prompts, low, high, "prompts", most.tier)
