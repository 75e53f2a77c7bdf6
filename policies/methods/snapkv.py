"""SnapKV: what the last prompt queries look at, with its neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.common.errors import KvtuneError
from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SnapKV(ScoredMethod):
    """The end of the prompt already shows which keys generation will use.

    score[j] = mean over the last ``window`` queries of attention[q, j], pooled over ``kernel``
               neighbours, then mean over the head group
    keep = last ``recent`` tokens + highest scores of the rest

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS
    2024, arXiv 2404.14469; defaults are the paper's (window 32, kernel 7, max pooling). Differs
    from the authors' code: one choice a KV head, not a query head. ``recent`` below ``window`` is
    our variant for budgets as small as the window.
    Cost: O(Hq W P D) once a prompt.
    """

    name = "snapkv"
    source = "Li et al., NeurIPS 2024, arXiv 2404.14469"

    window: int = parameter(32, "observation window", unit="tokens", low=1)
    kernel: int = parameter(7, "pooling kernel, odd", unit="tokens", low=1)
    pooling: Literal["max", "mean"] = parameter("max", "how neighbours are pooled")
    recent: int | None = parameter(
        None, "newest tokens always kept; the whole window unless given", unit="tokens", low=0
    )

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise KvtuneError(f"snapkv pools over an odd kernel, not {self.kernel}")

    @property
    def needs(self) -> Needs:
        """The observation window."""
        return Needs(window=self.window)

    def protected(self, budget: int) -> tuple[int, int]:
        """The observation window, or the part of it asked for."""
        return 0, self.window if self.recent is None else self.recent

    def scores(self, signals: Signals) -> Tensor:
        """Pooled attention of the observation window."""
        import torch.nn.functional as F

        drawn = signals.window_attention(self.window).mean(-2)
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        return pool(drawn, self.kernel, stride=1, padding=self.kernel // 2).mean(1)
