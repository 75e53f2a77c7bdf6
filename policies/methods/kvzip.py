"""KVzip: keep what the model needs to repeat its context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KVzip(ScoredMethod):
    """Ask for the context once more and see which keys that takes: no question is needed.

    score[j] = most attention that any query of a pass repeating the prompt, chunk by chunk, pays
               to key j, over the head group
    keep     = first ``sinks`` + highest scores of the rest

    Source: Kim et al., "KVzip", NeurIPS 2025, arXiv 2505.23416, 3. One ranking over all layers and
    heads, as the authors have it, is the allocator ``model_wide``; heads of one layer compete
    under ``adakv``. Differs from the authors' code: prompts are plain text, so the repeat request
    ends in a line break instead of a chat template's suffix and no template prefix is left
    unscored; the threshold is a rank, not a strict comparison (which drops one more); sinks are
    kept by place, as in kvpress.
    Cost: one more pass over the prompt, attending to it all; O(Hq P^2 D) for the scores; no state.
    """

    name = "kvzip"
    source = "Kim et al., NeurIPS 2025, arXiv 2505.23416"

    sinks: int = parameter(
        4, "first tokens that are always kept", unit="tokens", low=0, high=LONGEST_PROMPT
    )

    @property
    def needs(self) -> Needs:
        """The attention of the repeating pass."""
        return Needs(reconstruction=True)

    def protected(self, budget: int) -> tuple[int, int]:
        """The first tokens always stay."""
        return self.sinks, 0

    def scores(self, signals: Signals) -> Tensor:
        """The most attention that repeating paid."""
        repeated: Tensor = signals.given("reconstruction")
        return repeated.float()
