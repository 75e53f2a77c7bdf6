"""Every head gets the budget that the policy names."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.policies.allocator import Allocator


@dataclass(frozen=True)
class AsGiven(Allocator):
    """Budgets stay as they are: uniform where all are alike, else the tuner's plan."""

    name = "as_given"
    source = "the policy's own numbers"
