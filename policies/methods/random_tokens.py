"""Random tokens: what every choice has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RandomTokens(ScoredMethod):
    """Every token has the same chance, in every head anew.

    score[j] = drawn from (seed, layer), uniform

    Source: the field's own floor; kvpress has it too. Drawn on the CPU from the seed and the
    layer's number, so that replay, live runs and every device choose alike.
    Cost: none. Needs no signal.
    """

    name = "random"
    source = "a floor for all others"
    heads_are_alike = False

    seed: int = parameter(0, "of the draw", low=0, high=2**31)

    def scores(self, signals: Signals) -> Tensor:
        """A draw for each token of each head."""
        import numpy as np
        import torch

        heads, tokens, _ = signals.keys.shape
        drawn = np.random.default_rng((self.seed, signals.layer)).random((heads, tokens))
        return torch.from_numpy(drawn).float().to(signals.keys.device)
