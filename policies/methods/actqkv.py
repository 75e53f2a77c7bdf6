"""ActQKV: InfLLM's blocks by cosine with a probe of the queries that stand out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtune.common.rotary import turn
from kvtune.policies.method import ReadingMethod
from kvtune.policies.methods.infllm import Representatives
from kvtune.policies.reader import Held, Memory
from kvtune.policies.recall import clamped_queries, ends, of_layer
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import ALL_QUERIES, Needs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ActQKV(ReadingMethod):
    """Holds every token; the budget is how many of them a step reads, the same for all heads.

    bias[j]  = mean over dimensions of (q_j - mean)^2 / (variance + mean variance / 100), of the
               layer's heads as one vector, against the prompt's queries before RoPE
    probe    = sum over a window of queries of bias[j] / sum(bias) * q_j
    score[b] = cos(probe, repr[b]) of the layer's heads as one vector; repr as InfLLM's
    read     = the first ``sinks`` and last ``recent`` tokens, and whole blocks of highest score

    Source: Xiao et al., "ActQKV: Activation-aware Probe-Query: Effective Key-Value Retrieval for
    Long-Context LLMs Inference", ACL 2025, arXiv 2502.13542; block 32, 64 sinks, a window of 512
    and 4 representatives are the authors' for Llama 3. While tokens are generated a window holds
    one query, and the probe is that query; ``window`` above 1 is for turns that are read in pieces.
    How many blocks a layer reads is the allocator's ``actqkv_layers``. Differs: as InfLLM's; the
    statistics are the layer's and the prompt's own, where the authors' code shares them.
    Cost: as InfLLM's, and O(Hq D^2) statistics.
    """

    name = "actqkv"
    source = "Xiao et al., ACL 2025, arXiv 2502.13542"

    block: int = parameter(32, "tokens of a block", unit="tokens", low=1, high=4096)
    representatives: int = parameter(4, "keys that stand for a block", low=1, high=4096)
    sinks: int = parameter(64, "first tokens always read", unit="tokens", low=0, high=4096)
    recent: int = parameter(
        512, "last tokens always read", unit="tokens", low=1, high=LONGEST_PROMPT
    )
    window: int = parameter(1, "queries that share a probe", unit="tokens", low=1, high=4096)

    @property
    def needs(self) -> Needs:
        """Every query of the prompt, their statistics, and positions."""
        return Needs(window=ALL_QUERIES, query_moments=True, rope=True)

    def reader(self, budget: int) -> Probe:
        """Blocks by the probe."""
        budget = max(budget, 1)
        at_ends = ends(budget, self.sinks, self.recent)
        return Probe(self.block, budget, *at_ends, self.representatives, self.window)


@dataclass(frozen=True)
class Probe(Representatives):
    """Ranks blocks by the cosine of their representative with a probe.

    Args:
        window: queries that share one.
    """

    window: int

    def follow(self, held: Held, query: Tensor, memory: Memory) -> Tensor:
        """The window's queries so far share a probe."""
        import torch

        if self.window == 1:
            return super().follow(held, query, memory)
        begins = (held.start - held.signals.prompt_tokens) % self.window == 0
        queries = query if begins else torch.cat([memory["window"], query], 2)
        first = held.start + 1 - queries.shape[2]
        found = super().follow(replace(held, start=first), queries, memory)
        memory["window"] = queries
        return found

    def score(self, held: Held, queries: Tensor, index: Mapping[str, Tensor]) -> Tensor:
        """The layer's score of every block, ``[R, C, b]``; minus infinity where it is empty."""
        import torch

        means, there = index["means"], index["there"]
        turned = clamped_queries(held, queries, self.last)
        probe = self.probes(turned, self.bias(held, queries))  # [R, G, C, D]
        group = queries.shape[1]
        product = of_layer(probe.sum(1) @ means.transpose(-1, -2), held.policies)
        of_probe = of_layer(probe.square().sum((1, 3)), held.policies).sqrt()
        of_means = of_layer(group * means.square().sum(-1), held.policies).sqrt()
        length = (of_probe[..., None] * of_means[:, None]).clamp_min(1e-30)
        return (product / length).masked_fill(~there[:, None], -torch.inf)

    def bias(self, held: Held, queries: Tensor) -> Tensor:
        """How far each query of the layer stands from the prompt's mean, ``[R, C]``."""
        import torch

        mean, covariance = held.signals.query_moments()
        variance = covariance.diagonal(dim1=-2, dim2=-1)[held.heads]  # [R, G, D]
        at = held.start + torch.arange(queries.shape[2], device=queries.device)
        rope = held.signals.rope
        plain = queries if rope is None else turn(queries, -at, rope) / rope.attention_factor
        heads = of_layer(torch.ones(len(queries), device=queries.device), held.policies)
        floor = of_layer(variance.mean((1, 2)), held.policies) / heads / 100
        away = (plain - mean[held.heads][:, :, None]).square()
        spread = (variance + floor[:, None, None]).clamp_min(1e-30)
        total: Tensor = of_layer((away / spread[:, :, None]).mean((1, 3)), held.policies)
        return total / heads[:, None]

    def probes(self, queries: Tensor, bias: Tensor) -> Tensor:
        """Each query's window as one, ``[R, G, C, D]``; equal weights where nothing stands out."""
        import torch

        found = torch.empty_like(queries)
        for start in range(0, queries.shape[2], self.window):
            some = slice(start, start + self.window)
            weight = bias[:, some] + 1e-30
            weight = weight / weight.sum(-1, keepdim=True)
            mixed = (queries[:, :, some] * weight[:, None, :, None]).sum(2, keepdim=True)
            found[:, :, some] = mixed
        return found
