"""H2O: heavy hitters by accumulated attention, and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.decode import DecodeMethod, DecodeState
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class H2O(DecodeMethod):
    """A few keys draw most of the attention: keep those, and the most recent tokens.

    drawn[j] = sum over all queries so far of attention[q, j], mean over the head group
    keep = last ``budget * recent_share`` + most drawn of the rest
    While decoding, each token's row is added and one entry leaves.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle", NeurIPS 2023, arXiv 2306.14048; half and half
    as published. Follows the authors' real-drop code; their masked simulation, which hides the
    token that has just left the window for one step, is not copied. For grouped-query attention,
    which their code does not cover, the query heads that share a KV head are averaged.
    Cost: a second pass over the prompt's attention, O(Hq P^2 D), for the column sums; then one row
    of attention and one ranking a token and layer. State: one float an entry of a KV head.
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

    @property
    def entry_bits(self) -> int:
        """A float32: the attention that the entry has received."""
        return 32

    def protected(self, budget: int) -> tuple[int, int]:
        """The recent window."""
        return 0, int(budget * self.recent_share)

    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """Attention drawn over the prompt."""
        return {"drawn": signals.column_sums().mean(1)}

    def observe(self, state: DecodeState, attention: Tensor) -> None:
        """Add the newest row."""
        state.statistics["drawn"] += attention.mean(2)

    def worth(self, state: DecodeState) -> Tensor:
        """The attention that each entry has received so far."""
        return state.statistics["drawn"]
