"""A figure that says how far it can be trusted: value, interval, unit and tier."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Tier = Literal[
    "measured", "interpolated", "fitted", "transferred", "datasheet",  # latency and memory
    "table", "replay", "live",  # quality
    "exact", "assumed",
]  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A value with its 10-90 % interval (quality figures: 95 % bootstrap), unit and tier.

    Args:
        value: the figure.
        low: lower end of the interval; equals ``value`` where the tier is exact.
        high: upper end.
        unit: for example ``s``, ``B``, ``nats/token``.
        tier: how the figure was come by.
    """

    value: float
    low: float
    high: float
    unit: str
    tier: Tier

    def as_dict(self) -> dict[str, object]:
        """The form that goes into JSON: value, interval, unit, tier."""
        fields = asdict(self)
        low, high = fields.pop("low"), fields.pop("high")
        return {"value": self.value, "interval": [low, high], "unit": self.unit, "tier": self.tier}


def exact(value: float, unit: str) -> Estimate:
    """A figure that is counted, not estimated."""
    return Estimate(value, value, value, unit, "exact")
