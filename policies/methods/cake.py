"""CAKE: attention that is high on average or changes much."""

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
class Cake(ScoredMethod):
    """Keys whose attention shifts between queries matter beside those that always draw it.

    score[j] = mean + ``gamma`` * variance over the last ``window`` queries of attention[q, j],
               mean-pooled over ``kernel`` neighbours before the window, then mean over the group
    keep     = last ``window`` tokens + highest scores of the rest

    Source: Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
    ICLR 2025, arXiv 2503.12491, 4.3; defaults are the authors' code's. Their split of the budget
    over layers is the allocator ``cake_layers``. Differs from their code: it also drops a token a
    decode step; here generated tokens stay.
    Cost: O(Hq W P D) once a prompt; no state after it.
    """

    name = "cake"
    source = "Qin et al., ICLR 2025, arXiv 2503.12491"

    window: int = parameter(32, "observation window", unit="tokens", low=1, high=LONGEST_PROMPT)
    kernel: int = parameter(5, "pooling kernel, odd", unit="tokens", low=1, high=1023)
    gamma: float = parameter(200.0, "weight of the variance", low=0, high=1e6)

    def __post_init__(self) -> None:
        check_kernel("cake", self.kernel)

    @property
    def needs(self) -> Needs:
        """The observation window."""
        return Needs(window=self.window)

    def protected(self, budget: int) -> tuple[int, int]:
        """The observation window."""
        return 0, self.window

    def scores(self, signals: Signals) -> Tensor:
        """Mean and weighted variance, pooled."""
        drawn = signals.window_attention(self.window)
        varied = drawn.mean(-2) + self.gamma * variance(drawn)
        return pooled(varied, self.kernel, "mean", self.window).mean(1)


def variance(drawn: Tensor) -> Tensor:
    """Unbiased variance over the rows of ``[..., W, P]``; nothing of a single row."""
    return drawn.var(-2, correction=min(1, drawn.shape[-2] - 1))
