"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StreamingLLM(ScoredMethod):
    """Softmax dumps surplus mass on the first tokens: keep a few of them and the newest ones.

    keep = first ``sinks`` + last ``budget - sinks``.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
    arXiv 2309.17453. Differs from the authors' code: keys keep their original RoPE positions
    (theirs re-number positions inside the cache), and the prompt is trimmed once, when complete.
    Cost: none. Needs no signal.
    """

    name = "streaming_llm"
    source = "Xiao et al., ICLR 2024, arXiv 2309.17453"

    sinks: int = parameter(4, "first tokens that are always kept", unit="tokens", low=0)

    def protected(self, budget: int) -> tuple[int, int]:
        """The sinks."""
        return self.sinks, 0

    def scores(self, signals: Signals) -> Tensor:
        """Recency."""
        import torch

        heads, tokens, _ = signals.keys.shape
        return torch.arange(tokens, device=signals.keys.device).float().expand(heads, -1)
