"""TOVA: what the newest token does not look at leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.decode import DecodeMethod, DecodeState, refuse_unequal
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Tova(DecodeMethod):
    """A decoder with a bounded cache is a recurrent network: keep what its last step attended to.

    score[j] = attention[newest query, j], mean over all query heads of the layer
    keep = highest ``budget`` scores; nothing is protected, the newest token included.
    While decoding, the same for each token's row: no memory of earlier rows.

    Source: Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024, arXiv 2401.06104. The
    paper's choice is one for a layer; ``unit`` ``kv_head`` (mean over the head group only) is our
    variant for grouped-query models whose KV heads specialise. With unequal budgets in a layer
    only the variant can decode.
    Cost: O(Hq P D) once a prompt; then one row and one ranking a token and layer. State: none that
    outlives a step.
    """

    name = "tova"
    source = "Oren et al., EMNLP 2024, arXiv 2401.06104"

    unit: Literal["layer", "kv_head"] = parameter("layer", "which heads share one choice")

    @property
    def looks_across_heads(self) -> bool:
        """Where they share a choice."""
        return self.unit == "layer"

    @property
    def needs(self) -> Needs:
        """The last prompt query."""
        return Needs(window=1)

    def check_heads(self, budgets: NDArray[np.int64]) -> None:
        """Heads that share a choice must have room for the same tokens."""
        if self.unit == "layer":
            refuse_unequal(self.name, budgets)

    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """The last prompt token's row."""
        return {"row": self._reduced(signals.window_attention(1)[:, :, 0][None])[0]}

    def observe(self, state: DecodeState, attention: Tensor) -> None:
        """The newest row replaces the one before."""
        state.statistics["row"] = self._reduced(attention)

    def worth(self, state: DecodeState) -> Tensor:
        """The newest row."""
        return state.statistics["row"]

    def _reduced(self, attention: Tensor) -> Tensor:
        """``[B, H, n]`` of ``[B, H, G, n]``; equal for all heads of a layer that choose as one."""
        by_head = attention.mean(2)
        if self.unit == "kv_head":
            return by_head
        return by_head.mean(1, keepdim=True).expand_as(by_head).contiguous()
