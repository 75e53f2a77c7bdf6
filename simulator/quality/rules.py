"""Rules: one option for all heads, whose tokens an allocator divides when a prompt is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvtune.common.estimate import Estimate
from kvtune.policies.allocator import Allocator
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy, label_of


@dataclass(frozen=True, eq=False)
class Rule:
    """A policy that needs to know nothing of single heads.

    Args:
        family: of policies that it belongs to, as baselines are called.
        option: of all heads, its budget before it is divided.
        allocator: divides the budgets when the prompt is known, and keeps their sum.
        loss: on every sample of the tables that it stands beside, ``[n]`` nats/token.
        live: its loss where it was measured live, and needs no calibration; or None.
    """

    family: str
    option: Option
    allocator: Allocator
    loss: NDArray[np.float32]
    live: Estimate | None = None

    @property
    def label(self) -> str:
        """``kvzip+model_wide 9.3% int4+4``."""
        return label_of(self.option, self.allocator)

    def policy(self, layers: int, kv_heads: int, name: str = "") -> Policy:
        """The rule for a model of so many layers and KV heads."""
        return Policy.uniform(self.option, layers, kv_heads, name=name, allocator=self.allocator)

    def on(self, rows: NDArray[np.int64]) -> Rule:
        """The same beside some of the samples."""
        return replace(self, loss=self.loss[rows])
