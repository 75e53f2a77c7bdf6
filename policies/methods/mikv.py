"""MiKV: no token is dropped; those that matter less are kept in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.gathering import other_tokens
from kvtune.policies.method import ScoredMethod
from kvtune.policies.parts import Part, PartPlan
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST, _LARGEST = 1e-4, 1e4  # of a balancer's factor
_HIGH: dict[str, Format] = {
    "bf16": Bf16(),
    "int8": Int8(keys_by="token"),
    "int4": Int4(keys_by="token"),
}


@dataclass(frozen=True)
class MiKV(ScoredMethod):
    """The budget's tokens in ``high``, all others in the option's own formats.

    score[j]   = attention that key j drew from all prompt queries, summed over the head's group
    important  = half of the budget for the newest tokens, the rest for the highest scores
    balance[c] = sqrt(max |q_c| / max |k_c|): a channel's keys are multiplied by it before they are
                 quantised and divided after, which narrows outlying channels

    Source: Yang et al., "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware
    Mixed Precision Quantization", arXiv 2402.18096; an importance ratio of 20 % and two bits with
    ``keys_by: token`` and groups of half a head are the paper's. There is no official code; ours
    follows the paper's formulas. Differs: the balancer's queries are the last ``window`` ones, not
    all; the prompt alone is divided, and generated tokens stay in 16 bits.
    Cost: column sums, as H2O, and O(Hq W D).
    """

    name = "mikv"
    source = "Yang et al., arXiv 2402.18096"

    high: Literal["bf16", "int8", "int4"] = parameter("bf16", "how important tokens are stored")
    recent_share: float = parameter(
        0.5, "share of the budget that goes to the newest tokens", low=0, high=1
    )
    balanced: bool = parameter(True, "whether outlying channels of keys are narrowed")
    window: int = parameter(
        64, "newest queries that the balancer looks at", unit="tokens", low=1, high=4096
    )

    @property
    def needs(self) -> Needs:
        """Column sums, and queries for the balancer."""
        return Needs(window=self.window if self.balanced else 0, column_sums=True)

    def protected(self, budget: int) -> tuple[int, int]:
        """The newest tokens."""
        return 0, int(self.recent_share * budget)

    def scores(self, signals: Signals) -> Tensor:
        """Attention drawn from the whole prompt."""
        return signals.column_sums().sum(1)

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """Important tokens, and the others in fewer bits."""
        important = self.keep(signals, budget)
        others = other_tokens(important, signals.prompt_tokens)
        found = []
        if important.shape[1]:
            found.append(Part(important, formats=self._high))
        if others.shape[1]:
            found.append(Part(others, balance=self._balance(signals)))
        return found or [Part(important)]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """Every token of the prompt, in one of two precisions."""
        important = min(budget, prompt_tokens)
        found = []
        if important:
            found.append(PartPlan(important, self._high))
        if important < prompt_tokens:
            found.append(PartPlan(prompt_tokens - important, balanced=self.balanced))
        return tuple(found) or (PartPlan(0),)

    @property
    def _high(self) -> tuple[Format, Format]:
        return _HIGH[self.high], _HIGH[self.high]

    def _balance(self, signals: Signals) -> Tensor | None:
        """Factors of each head's channels, ``[H, D]``; 1 where either largest number is zero."""
        if not self.balanced:
            return None
        keys = signals.keys.float().abs().amax(1)
        queries = signals.queries[:, -self.window :].float().abs().amax(1)
        queries = queries.unflatten(0, (len(keys), -1)).amax(1)
        factor = (queries / keys).sqrt().clamp(_SMALLEST, _LARGEST)
        balance: Tensor = factor.where((queries > 0) & (keys > 0), 1)
        return balance
