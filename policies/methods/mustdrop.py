"""MustDrop's rule for decoding: of tokens of one type, those that the text does not look at go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MustDrop(ScoredMethod):
    """Tokens of a span, such as an image's, are dropped; those of other types stay before them.

    A surrogate of the whole: what its authors drop in the vision encoder and the prefill is not.

    a[q, j]  = attention of the last ``window`` queries (text behind an image), mean of all heads
    sum[j]   = share of j in all that the span draws;  most[j] = the most that one query pays to j
    score[j] = max(sum[j] / ``overall``, most[j] / ``individual``) within the span

    Source: Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large
    Language Model", 2024, arXiv 2411.10803, and its released code: a token is dropped where its sum
    is below one threshold and its most below another. A budget takes the place of how high both
    are: the tokens that stay are those that stay at the two thresholds times some common factor.
    Differs: the code gives layers before the last pruning stage that stage's survivors, and each
    layer here chooses by its own attention; tokens keep their positions; the authors publish no
    thresholds, so that their ratio is ours; nothing of the vision encoder is kept apart.
    Cost: O(Hq W P D) once a prompt; no state.
    """

    name = "mustdrop"
    source = "a surrogate of Liu et al., arXiv 2411.10803: its rule for decoding"

    start: int = parameter(0, "first token of the span", unit="tokens", low=0, high=LONGEST_PROMPT)
    stop: int = parameter(
        LONGEST_PROMPT, "token behind the span", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    window: int = parameter(32, "queries that look", unit="tokens", low=1, high=LONGEST_PROMPT)
    overall: float = parameter(0.01, "threshold of a token's share of all", low=1e-6, high=1)
    individual: float = parameter(0.01, "threshold of one query's attention", low=1e-6, high=1)

    @property
    def needs(self) -> Needs:
        """The queries that look."""
        return Needs(window=self.window)

    @property
    def looks_across_heads(self) -> bool:
        """Attention is the mean of all heads."""
        return True

    def scores(self, signals: Signals) -> Tensor:
        """How many times its nearer threshold a token of the span draws; others rank above."""
        import torch

        drawn = signals.window_attention(self.window).mean((0, 1))  # [W, P]
        place = torch.arange(drawn.shape[-1], device=drawn.device)
        inside = (place >= self.start) & (place < self.stop)
        total = drawn.sum(0)
        whole = total[inside].sum().clamp_min(1e-30)
        times = torch.maximum(total / whole / self.overall, drawn.amax(0) / self.individual)
        above = times[inside].amax() + 1 if inside.any() else 0
        scores: Tensor = torch.where(inside, times, times + above)
        return scores.expand(signals.keys.shape[0], -1)
