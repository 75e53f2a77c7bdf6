"""A method in a package of its own: the tokens farthest from the middle of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MiddleOut(ScoredMethod):
    """Keeps the ends of the prompt, and of the rest the tokens nearest to an end.

    score[j] = distance of j from the middle of the prompt

    Source: none; it is an example. Cost: O(P).
    """

    name = "middle_out"
    source = "an example"

    sinks: int = parameter(4, "first tokens always kept", unit="tokens", low=0, high=4096)

    def protected(self, budget: int) -> tuple[int, int]:
        """The first tokens always stay."""
        return self.sinks, 0

    def scores(self, signals: Signals) -> Tensor:
        """The same for every head."""
        import torch

        heads, tokens, _ = signals.keys.shape
        place = torch.arange(tokens, device=signals.keys.device)
        distance: Tensor = (place - (tokens - 1) / 2).abs()
        return distance.expand(heads, -1)
