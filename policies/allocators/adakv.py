"""Ada-KV: the heads of a layer compete for its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocator import Allocator
from kvtune.policies.method import Method, ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Signals


@dataclass(frozen=True)
class AdaKV(Allocator):
    """Highest scores of the whole layer win; each head is sure of a share of its budget.

    Source: Feng et al., "Ada-KV", arXiv 2407.11550; the safeguard 0.2 as in the authors' runs. The
    rule is kvpress's exact one: the safeguard is rounded down, one token at least, and the layer's
    sum is kept to the token (the authors' rounding keeps it nearly). Heads are stored at their own
    lengths; kvpress only masks. Needs a method that scores tokens, the same for all heads.
    Cost: one ranking of H P scores a layer.
    """

    name = "adakv"
    source = "Feng et al., arXiv 2407.11550"

    safeguard: float = parameter(0.2, "share of its budget that a head is sure of", low=0, high=1)

    def split(
        self, budgets: Sequence[int], methods: Sequence[Method], signals: Signals
    ) -> list[int]:
        """Sure tokens first, then the best of the rest over all heads."""
        method = methods[0]
        if not isinstance(method, ScoredMethod) or any(other != method for other in methods):
            raise KvtuneError(
                "adakv compares scores between heads and needs one scoring method a layer",
                hint="give all heads of a layer the same method, for example snapkv.",
            )
        sure = [self._sure(budget) for budget in budgets]
        scores = method.ranked(signals, max(budgets))
        for head, count in enumerate(sure):
            scores[head, method.keep(signals, count)[head]] = -float("inf")
        winners = scores.flatten().topk(sum(budgets) - sum(sure)).indices
        won = (winners // signals.prompt_tokens).bincount(minlength=len(sure))
        return [count + extra for count, extra in zip(sure, won.tolist(), strict=True)]

    def _sure(self, budget: int) -> int:
        """A head's sure tokens; one at least, unless nothing is safeguarded or asked for."""
        least = min(budget, 1) if self.safeguard > 0 else 0
        return max(int(self.safeguard * budget), least)
