"""Core tokens: far tokens pooled group by group, weighted by what each group's last query sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.rotary import turn
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.method import Method
from kvtune.policies.parts import VIRTUAL, Part, PartPlan
from kvtune.policies.registry import parameter
from kvtune.policies.signals import ALL_QUERIES, Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_EXACT = (Bf16(), Bf16())


@dataclass(frozen=True)
class CCA(Method):
    """A training-free surrogate of core context aware attention: a local window and core tokens.

    local  = the newest ``recent_share`` of the budget, as they are
    groups = all others, as many as the rest of the budget and as equal as can be
    w      = softmax over a group's members of (last member's query . key), mean over the head group
    core   = sum of w[j] * (k[j] before RoPE), turned to the last member's place; sum of w[j] * v[j]

    Source: Chen et al., "Core Context Aware Transformers for Long Context Language Modeling", ICML
    2025, arXiv 2412.12465. The authors fine-tune their models for it, in groups of 16 with windows
    of 1024; nothing published of those holds of this. A core token's place and what a head group
    shares are not stated by them. A budget fixes how large groups are. Core tokens stay in 16 bits.
    Cost: O(Hq P D) once a prompt; every query of the prompt is looked at.
    """

    name = "cca"
    source = "a surrogate of Chen et al., ICML 2025, arXiv 2412.12465"
    stores_whole_prompts_alike = False  # part of one is pooled, in 16 bits

    recent_share: float = parameter(
        0.5, "share of the budget that goes to the newest tokens", low=0, high=1
    )

    @property
    def needs(self) -> Needs:
        """The last query of every group, and positions to turn its keys to."""
        return Needs(window=ALL_QUERIES, rope=True)

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """The newest tokens, as many as the budget."""
        import torch

        heads, tokens, _ = signals.keys.shape
        first = tokens - min(budget, tokens)
        return torch.arange(first, tokens, device=signals.keys.device).expand(heads, -1)

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """The local window, and one virtual entry a group."""
        import torch

        heads, tokens, _ = signals.keys.shape
        local, cores = self._sizes(budget, tokens)
        if not cores:
            return [Part(self.keep(signals, local))]
        keys, values = self._pooled(signals, tokens - local, cores)
        virtual = torch.full((heads, cores), VIRTUAL, device=signals.keys.device)
        pooled = Part(
            virtual, keys.to(signals.keys.dtype), values.to(signals.values.dtype), formats=_EXACT
        )
        return [Part(self.keep(signals, local)), pooled] if local else [pooled]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """Window and core tokens make up the budget."""
        local, cores = self._sizes(budget, prompt_tokens)
        if not cores:
            return (PartPlan(local),)
        pooled = PartPlan(cores, formats=_EXACT)
        return (PartPlan(local), pooled) if local else (pooled,)

    def _sizes(self, budget: int, tokens: int) -> tuple[int, int]:
        """Local tokens, and core tokens."""
        if budget >= tokens:
            return tokens, 0
        local = int(self.recent_share * budget)
        return local, budget - local

    def _pooled(self, signals: Signals, far: int, cores: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the core tokens, ``[H, cores, D]``."""
        import torch

        device, heads = signals.keys.device, len(signals.keys)
        ends = torch.arange(1, cores + 1, device=device) * far // cores  # one past each group
        token = torch.arange(far, device=device)
        group = torch.searchsorted(ends, token, right=True)
        last = ends[group] - 1
        queries = signals.queries[:, -signals.prompt_tokens :].float().unflatten(0, (heads, -1))
        keys, values = signals.keys[:, :far].float(), signals.values[:, :far].float()
        logits = (queries[:, :, last] * keys[:, None]).sum(-1) * signals.scale  # [H, G, far]
        weight = _softmax_of_groups(logits, group, cores).mean(1)[..., None]
        if signals.rope is not None:
            keys = turn(keys, last - token, signals.rope)
        zero = keys.new_zeros(heads, cores, keys.shape[-1])
        return zero.index_add(1, group, weight * keys), zero.index_add(1, group, weight * values)


def _softmax_of_groups(logits: Tensor, group: Tensor, groups: int) -> Tensor:
    """Softmax of ``[..., n]`` within each group of entries, ``group`` ``[n]`` saying which."""
    import torch

    number = group.expand_as(logits)
    lowest = logits.new_full((*logits.shape[:-1], groups), -torch.inf)
    largest = lowest.scatter_reduce(-1, number, logits, "amax")
    raised = (logits - largest.gather(-1, number)).exp()
    total = torch.zeros_like(lowest).scatter_add(-1, number, raised)
    return raised / total.gather(-1, number)
