"""A figure that says how far it can be trusted: value, interval, unit and tier."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Tier = Literal[
    "measured", "interpolated", "fitted", "transferred", "datasheet",  # latency and memory
    "measured elsewhere",  # kernel tables that others measured
    "table", "replay", "live", "stand-in band",  # quality
    "exact", "assumed",
]  # fmt: skip


BAND: Tier = "stand-in band"
"""Of a loss that was seen on another model: what counts is the interval, not the value in it."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 10-90 % interval, unit and tier.

    Quality figures have 95 % intervals over samples; a stand-in's band is made by ``tuner.band``.

    Args:
        value: the figure.
        low: lower end of the interval; equals ``value`` where the tier is exact.
        high: upper end.
        unit: for example ``s``, ``B``, ``nats/token``.
        tier: how the figure was obtained.
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

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """How a schema reads what ``as_dict`` wrote."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(
            _from_stored,
            handler.generate_schema(StoredEstimate),
            serialization=core_schema.plain_serializer_function_ser_schema(cls.as_dict),
        )


@dataclass(frozen=True)
class StoredEstimate:
    """The form of an estimate in JSON: what ``Estimate.as_dict`` writes."""

    value: float
    interval: tuple[float, float]
    unit: str
    tier: Tier


_MAY_BE_NEGATIVE = ("ratio - 1",)
_ROUNDING = 1e-6
_LARGEST = 1e18


def _from_stored(stored: StoredEstimate) -> Estimate:
    """The estimate, refused if it is no figure that a measurement can have.

    Raises:
        ValueError: it is not finite, negative, or outside its own interval.
    """
    return checked_estimate(Estimate(stored.value, *stored.interval, stored.unit, stored.tier))


def checked_estimate(found: Estimate) -> Estimate:
    """The same estimate, refused if it is no figure that a measurement can have.

    Raises:
        ValueError: it is not finite, negative, or outside its own interval.
    """
    value, low, high = found.value, found.low, found.high
    if not all(abs(number) <= _LARGEST for number in (value, low, high)):  # NaN fails too
        raise ValueError(f"{value} [{low}, {high}] is no finite figure")
    if min(value, low) < 0 and found.unit not in _MAY_BE_NEGATIVE:
        raise ValueError(f"{value} [{low}, {high}] {found.unit} is negative")
    slack = _ROUNDING * max(abs(value), abs(low), abs(high))
    if not low - slack <= value <= high + slack:
        raise ValueError(f"{value} lies outside its own interval [{low}, {high}]")
    return found


def exact(value: float, unit: str) -> Estimate:
    """A figure that is counted, not estimated."""
    return Estimate(value, value, value, unit, "exact")
