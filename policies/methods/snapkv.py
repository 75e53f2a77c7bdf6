"""SnapKV: what the last prompt queries look at, with its neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.method import ScoredMethod
from kvtune.policies.pooling import check_kernel, pooled
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SnapKV(ScoredMethod):
    """The end of the prompt already shows which keys generation will use.

    score[j] = mean over the last ``window`` queries and over the head group of attention[q, j],
               pooled over ``kernel`` neighbours before the window
    keep = last ``recent`` tokens + highest scores of the rest

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS
    2024, arXiv 2404.14469; defaults are the paper's (window 32, kernel 7, max pooling). Differs
    from the authors' code: one choice a KV head, not a query head (which stores G times as much);
    their sum over the window is a mean here, which ranks alike. The head group is averaged before
    pooling, as the authors of Ada-KV (arXiv 2407.11550) do; ``group: pooled`` averages what each
    query head has pooled, as kvpress does (with mean pooling both are the same). A prompt no longer
    than the window is kept whole as far as the budget reaches. ``recent`` below ``window`` is our
    variant for budgets as small as the window. kvpress: ``window: 64, kernel: 5, pooling: mean``.
    Cost: O(Hq W P D) once a prompt; no state.
    """

    name = "snapkv"
    source = "Li et al., NeurIPS 2024, arXiv 2404.14469"

    window: int = parameter(32, "observation window", unit="tokens", low=1, high=LONGEST_PROMPT)
    kernel: int = parameter(7, "pooling kernel, odd", unit="tokens", low=1, high=1023)
    pooling: Literal["max", "mean"] = parameter("max", "how neighbours are pooled")
    group: Literal["averaged", "pooled"] = parameter(
        "averaged", "whether a group's attention is averaged before pooling, or after it"
    )
    recent: int | None = parameter(
        None,
        "newest tokens always kept; the whole window unless given",
        unit="tokens",
        low=0,
        high=LONGEST_PROMPT,
    )

    def __post_init__(self) -> None:
        check_kernel("snapkv", self.kernel)

    @property
    def needs(self) -> Needs:
        """The observation window."""
        return Needs(window=self.window)

    def protected(self, budget: int) -> tuple[int, int]:
        """The observation window, or the part of it asked for."""
        return 0, self.window if self.recent is None else self.recent

    def scores(self, signals: Signals) -> Tensor:
        """Pooled attention of the observation window."""
        drawn = signals.window_attention(self.window).mean(-2)
        if self.group == "averaged":
            drawn = drawn.mean(1, keepdim=True)
        return pooled(drawn, self.kernel, self.pooling, self.protected(0)[1]).mean(1)
