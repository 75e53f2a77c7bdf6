"""Says which live losses are partly rounding, where the model runs in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvtune.tuner.result import Baseline

MEASURED = "rounding_kl_nats_per_token"
"""In a result's provenance: KL of the uncompressed cache from itself, only rounded otherwise."""
WELL_ABOVE = 3.0
"""A loss of so many times what rounding makes is hardly touched by it."""


def said_of_rounding(provenance: Mapping[str, Any], ran: Sequence[Baseline]) -> str | None:
    """The sentence that a result's losses need; None in float32, and where all are well above it.

    Args:
        provenance: of the result.
        ran: the plan first, then what it is compared with.
    """
    losses = {each.name: each.live.value for each in ran if each.live is not None}
    return rounding_words(provenance.get(MEASURED), str(provenance.get("dtype")), losses)


def rounding_words(floor: float | None, dtype: str, losses: Mapping[str, float]) -> str | None:
    """The same of one figure.

    Args:
        floor: KL of the uncompressed cache from itself, nats/token; None where not measured.
        dtype: that the model ran in.
        losses: live, nats/token, by the policy's name.
    """
    near = [name for name, loss in losses.items() if floor and loss < WELL_ABOVE * floor]
    if not near:
        return None
    return (
        f"rounding: in {dtype} the uncompressed cache differs from itself by {floor:.2g} nats a "
        "token between two ways to run it. Losses near or below that are rounding, not the plan's "
        f"or a baseline's; within {WELL_ABOVE:g} times of it: {', '.join(near)}. `kvtune validate "
        "policy.yaml --device cpu` runs a policy in float32, without it."
    )
