"""RazorAttention: sinks, a recent window, and one token that stands for all that was dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.method import Method
from kvtune.policies.parts import VIRTUAL, Part, PartPlan
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor

_EXACT = (Bf16(), Bf16())


@dataclass(frozen=True)
class Razor(Method):
    """The cache of a head that does not retrieve; retrieval heads get ``full`` in the same policy.

    kept         = the first ``sinks`` tokens and the newest ones, one fewer than the budget in all
    compensation = one virtual entry: mean key and mean value of the n dropped tokens, with the
                   log-weight log(n), so that it draws the attention of n tokens like the mean

    Source: Tang et al., "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    ICLR 2025, arXiv 2407.15891, Algorithm 1. Differs: a budget replaces max(4000, N / 5), and which
    heads retrieve is the policy's to say. The mean is of keys after RoPE, as published, and stays
    in 16 bits whatever the kept tokens' formats are.
    Cost: one mean of the dropped tokens once a prompt; one entry of state.
    """

    name = "razor"
    source = "Tang et al., ICLR 2025, arXiv 2407.15891"

    sinks: int = parameter(4, "first tokens always kept", unit="tokens", low=0, high=4096)

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """Sinks and the newest tokens, as many as the budget."""
        import torch

        heads, tokens, _ = signals.keys.shape
        budget = min(budget, tokens)
        first = min(self.sinks, budget)
        at = torch.arange(budget, device=signals.keys.device)
        return at.where(at < first, at + tokens - budget).expand(heads, -1)

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """The kept tokens, and what stands for the others where there are any."""
        import torch

        heads, tokens, _ = signals.keys.shape
        if not 0 < budget < tokens:
            return [Part(self.keep(signals, budget))]
        kept = self.keep(signals, budget - 1)
        dropped = torch.ones(tokens, dtype=torch.bool, device=kept.device)
        dropped[kept[0]] = False

        def mean(whole: Tensor) -> Tensor:
            return whole[:, dropped].float().mean(1, keepdim=True).to(whole.dtype)

        count = tokens - budget + 1
        weight = torch.full((heads, 1), float(count), device=kept.device).log()
        virtual = torch.full((heads, 1), VIRTUAL, device=kept.device)
        stands_for_all = Part(
            virtual, mean(signals.keys), mean(signals.values), weight, formats=_EXACT
        )
        return [Part(kept), stands_for_all]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """One entry of the budget is the virtual one."""
        if not 0 < budget < prompt_tokens:
            return (PartPlan(min(budget, prompt_tokens)),)
        return PartPlan(budget - 1), PartPlan(1, formats=_EXACT, weighted=True)
