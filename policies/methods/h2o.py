"""H2O: heavy hitters by accumulated attention, and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class H2O(ScoredMethod):
    """A few keys draw most of the attention: keep those, and the most recent tokens.

    score[j] = sum over all prompt queries of attention[q, j], mean over the head group
    keep = last ``budget * recent_share`` + highest scores of the rest

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle", NeurIPS 2023, arXiv 2306.14048. This is its
    choice at the end of the prompt. The authors also drop one token a decode step; here generated
    tokens stay. For grouped-query attention, which their code does not cover, the scores of the
    query heads that share a KV head are averaged.
    Cost: a second pass over the prompt's attention, O(Hq P^2 D), for the column sums.
    """

    name = "h2o"
    source = "Zhang et al., NeurIPS 2023, arXiv 2306.14048"

    recent_share: float = parameter(
        0.5, "share of the budget kept for the newest tokens", low=0, high=1
    )

    @property
    def needs(self) -> Needs:
        """Column sums of the whole prompt."""
        return Needs(column_sums=True)

    def protected(self, budget: int) -> tuple[int, int]:
        """The recent window."""
        return 0, int(budget * self.recent_share)

    def scores(self, signals: Signals) -> Tensor:
        """Accumulated attention."""
        return signals.column_sums().mean(1)
