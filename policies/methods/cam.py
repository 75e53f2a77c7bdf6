"""CaM: a token that leaves the window gives its value to those that stay right behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.gathering import of_tokens
from kvtune.policies.method import Method
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CaM(Method):
    """Sinks and the newest tokens stay; values of the others are merged as they leave, in order.

    kept   = the first ``sinks`` tokens and the newest ones
    p[i]   = min(1, attention that i drew / mean of what the kept tokens drew)
    v[j]  += p[i] v[i] / m for the m = ``merged`` tokens j right behind i, for each i that leaves,
             oldest first; what i was given before goes on with it

    Source: Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference", ICML 2024, and
    its released code (StreamingLLM's budget, m = 32, values alone). Differs: the paper draws
    whether a token is merged with probability p, and we merge the share p of it, which is the mean
    of its draws (nothing is random here); attention is that of the whole prompt, averaged over the
    group, not of the rows before each token left; all of it happens when the prompt is complete.
    Cost: column sums, and O(H P m D) one token after another; no state.
    """

    name = "cam"
    source = "Zhang et al., ICML 2024"

    sinks: int = parameter(4, "first tokens always kept", unit="tokens", low=0, high=4096)
    merged: int = parameter(
        32, "tokens that a leaving token's value is spread over", unit="tokens", low=1, high=4096
    )

    @property
    def needs(self) -> Needs:
        """The attention that each key received, summed over queries."""
        return Needs(column_sums=True)

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """Sinks and the newest tokens, as many as the budget."""
        import torch

        heads, tokens, _ = signals.keys.shape
        budget = min(budget, tokens)
        first = min(self.sinks, budget)
        at = torch.arange(budget, device=signals.keys.device)
        return at.where(at < first, at + tokens - budget).expand(heads, -1)

    def merge(self, signals: Signals, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """The kept tokens' own keys, and values with what left before them."""
        count, tokens = kept.shape[1], signals.prompt_tokens
        if count <= self.sinks or count == tokens:
            return None
        first, last = self.sinks, tokens - (count - self.sinks)
        drawn = signals.column_sums().mean(1)
        mean = drawn.gather(1, kept).mean(1, keepdim=True).clamp_min(1e-20)
        spread = min(self.merged, count - first)
        share = (drawn / mean).clamp(0, 1)[..., None, None] / spread
        values = signals.values.float().clone()
        for leaving in range(first, last):
            behind = slice(leaving + 1, leaving + 1 + spread)
            values[:, behind] += share[:, leaving] * values[:, leaving : leaving + 1]
        merged = of_tokens(values, kept).to(signals.values.dtype)
        return of_tokens(signals.keys, kept), merged

    def work(self, shape: LayerShape, budget: int) -> Work:
        """Every leaving value read once and added to those behind it."""
        cells = float(shape.kv_heads * shape.prompt_tokens * self.merged * shape.head_dim)
        launches = 3.0 * max(shape.prompt_tokens - budget, 0)  # one token after another
        return super().work(shape, budget) + Work(2 * cells, 8 * cells, launches=launches)
