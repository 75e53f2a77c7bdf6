"""The full cache: nothing is evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Full(ScoredMethod):
    """Keep every token; under a budget, the most recent ones (a plain sliding window).

    Cost: none. Needs no signal.
    """

    name = "full"
    source = "the uncompressed cache"
    shape = "window"

    def scores(self, signals: Signals) -> Tensor:
        """Positions: of a budget the newest tokens stay."""
        import torch

        heads, tokens, _ = signals.keys.shape
        return torch.arange(tokens, device=signals.keys.device).float().expand(heads, -1)
