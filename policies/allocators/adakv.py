"""Ada-KV: the heads of a layer compete for its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.allocator import Allocator, one_scoring_method
from kvtune.policies.allocators.pyramid import round_to_sum
from kvtune.policies.method import Method, ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdaKV(Allocator):
    """Highest scores of the whole layer win, and each head is sure of a share of its budget.

    won[h]    = how many of the layer's highest scores are head h's, as many as the layer may keep
    budget[h] = (1 - safeguard) * won[h] + safeguard * its own budget

    Source: Feng et al., "Ada-KV", arXiv 2407.11550, algorithm 1; the safeguard 0.2 as in the
    authors' runs. ``rule: blend`` is theirs, but for rounding, which keeps the layer's sum to the
    token (theirs keeps it nearly). ``rule: floor`` is kvpress's: each head first takes its
    ``safeguard`` share, rounded down, one token at least, and the best scores of the rest win what
    is left, so that a head that wins anyway gains nothing from its share. Heads are stored at their
    own lengths; kvpress only masks. Needs a method that scores tokens, the same for all heads;
    the authors score with ``snapkv``.
    Cost: one ranking of H P scores a layer.
    """

    name = "adakv"
    source = "Feng et al., arXiv 2407.11550"

    safeguard: float = parameter(0.2, "share of its budget that a head is sure of", low=0, high=1)
    rule: Literal["blend", "floor"] = parameter(
        "blend", "whether the sure share is blended with what is won, or taken before"
    )

    def check(self, methods: Sequence[Sequence[Method]]) -> None:
        """One scoring method a layer."""
        for layer in methods:
            one_scoring_method(self.name, "a layer", layer)

    def split(
        self, budgets: Sequence[int], methods: Sequence[Method], signals: Signals
    ) -> list[int]:
        """What each head wins, blended with its own budget or beyond its sure tokens."""
        import numpy as np

        method = one_scoring_method(self.name, "a layer", methods)
        if self.rule == "floor":
            return self._beyond_sure(budgets, method, signals)
        won = _winners(method.ranked(signals, max(budgets)), sum(budgets))
        blended = (1 - self.safeguard) * np.array(won) + self.safeguard * np.array(budgets)
        return [int(n) for n in round_to_sum(blended, sum(budgets), signals.prompt_tokens)]

    def _beyond_sure(
        self, budgets: Sequence[int], method: ScoredMethod, signals: Signals
    ) -> list[int]:
        """Sure tokens first, then the best of the rest over all heads."""
        sure = [self._sure(budget) for budget in budgets]
        scores = method.ranked(signals, max(budgets))
        for head, count in enumerate(sure):
            scores[head, method.keep(signals, count)[head]] = -float("inf")
        won = _winners(scores, sum(budgets) - sum(sure))
        return [count + extra for count, extra in zip(sure, won, strict=True)]

    def _sure(self, budget: int) -> int:
        """A head's sure tokens; one at least, unless nothing is safeguarded or asked for."""
        least = min(budget, 1) if self.safeguard > 0 else 0
        return max(int(self.safeguard * budget), least)


def _winners(scores: Tensor, count: int) -> list[int]:
    """How many of the ``count`` highest scores ``[H, P]`` each head has."""
    import torch

    best = scores.flatten().topk(count).indices
    head = best // scores.shape[-1]
    # Not bincount, which waits for a GPU twice to learn the largest number.
    won = head.new_zeros(len(scores)).scatter_add_(0, head, torch.ones_like(head))
    found: list[int] = won.tolist()
    return found
