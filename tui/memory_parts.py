"""A plan's memory in parts, for screens and report alike."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.estimate import Estimate
from kvtune.simulator.memory.plan import MemoryPlan


@dataclass(frozen=True)
class MemoryParts:
    """A plan's memory.

    Args:
        budget: the fixed parts and the limit.
        peak: of everything together.
    """

    budget: MemoryPlan
    peak: Estimate

    def sizes(self) -> dict[str, float]:
        """Bytes by part; the cache is the peak less the rest, what is free may be nothing."""
        fixed = {key: getattr(self.budget, key).value for key in ("weights", "overhead", "prefill")}
        cache = max(self.peak.value - sum(fixed.values()), 0.0)
        free = max(self.budget.limit_bytes - self.peak.value, 0.0)
        return fixed | {"cache": cache, "free": free}
