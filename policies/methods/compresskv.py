"""CompressKV: only heads that retrieve have a vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.pooling import check_kernel, pooled
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CompressKV(ScoredMethod):
    """A mean over all heads lets sink and local heads evict what is needed; ask a few instead.

    heads    = the ``voters`` query heads of the layer that look most at what they copy
    score[j] = mean over those heads of the attention that the last ``window`` queries pay to j,
               summed, then mean-pooled over ``kernel`` neighbours before the window
    keep     = last ``window`` tokens + highest scores of the rest, the same in all KV heads

    Source: Lin et al., "CompressKV", arXiv 2508.02401; defaults are the authors'. The heads' scores
    are measured on the model once (``kvtune.runtime.calibrate``), with our own needles. The layer
    budgets that go with it are the allocator ``compresskv_layers``.
    Cost: O(voters W P D) once a prompt; no state but the heads' numbers.
    """

    name = "compresskv"
    source = "Lin et al., arXiv 2508.02401"

    voters: int = parameter(4, "query heads that vote in each layer", low=1, high=4096)
    window: int = parameter(8, "observation window", unit="tokens", low=1, high=LONGEST_PROMPT)
    kernel: int = parameter(5, "pooling kernel, odd", unit="tokens", low=1, high=1023)

    def __post_init__(self) -> None:
        check_kernel("compresskv", self.kernel)

    @property
    def looks_across_heads(self) -> bool:
        """The voters choose for all."""
        return True

    @property
    def needs(self) -> Needs:
        """The observation window and the heads' scores."""
        return Needs(window=self.window, calibration=True)

    def protected(self, budget: int) -> tuple[int, int]:
        """The observation window."""
        return 0, self.window

    def scores(self, signals: Signals) -> Tensor:
        """The voters' pooled attention, for every KV head alike."""
        ability: Tensor = signals.given("head_scores")
        voters = ability.argsort(descending=True, stable=True)[: self.voters]
        drawn = signals.window_attention(self.window).sum(-2).flatten(0, 1)[voters]
        smooth = pooled(drawn[None], self.kernel, "mean", self.window)[0]
        return smooth.mean(0).expand(signals.keys.shape[0], -1)
