"""InfLLM: blocks stand for themselves by the few keys that were looked at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.gathering import of_tokens
from kvtune.policies.method import ReadingMethod
from kvtune.policies.reader import Held, Reader
from kvtune.policies.recall import (
    MiddleBlocks,
    between,
    clamped_keys,
    clamped_queries,
    ends,
    of_layer,
)
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import ALL_QUERIES, Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_NUMBER_BYTES = 2


@dataclass(frozen=True)
class InfLLM(ReadingMethod):
    """Holds every token; the budget is how many of them a step reads, the same for all heads.

    local[j]   = attention that key j drew from the next ``recent`` queries, summed over the group
    repr[b]    = mean key before RoPE of the ``representatives`` highest local scores of block b
    score[b]   = sum over the layer's query heads of q . repr[b], q turned to ``recent`` tokens away
    read       = the first ``sinks`` and last ``recent`` tokens, and whole blocks of highest score

    Source: Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an
    Efficient Context Memory", NeurIPS 2024, arXiv 2402.04617; block 128, 4 representatives, 128
    sinks and a window of 4096 are the authors'. Differs: representatives are chosen a KV head, not
    a query head; local scores are of attention over all earlier keys; attention keeps the original
    positions; prompts are read whole; the ends take at most half of a small budget.
    Cost: O(Hq P W D) once a prompt; O(Hq D P / b) a step; one key a block and head is held.
    """

    name = "infllm"
    source = "Xiao et al., NeurIPS 2024, arXiv 2402.04617"

    block: int = parameter(128, "tokens of a block", unit="tokens", low=1, high=4096)
    representatives: int = parameter(4, "keys that stand for a block", low=1, high=4096)
    sinks: int = parameter(128, "first tokens always read", unit="tokens", low=0, high=4096)
    recent: int = parameter(
        4096, "last tokens always read", unit="tokens", low=1, high=LONGEST_PROMPT
    )

    @property
    def needs(self) -> Needs:
        """Every query of the prompt, for local scores, and positions to turn queries to."""
        return Needs(window=ALL_QUERIES, rope=True)

    def reader(self, budget: int) -> Reader:
        """Blocks by their representatives."""
        budget = max(budget, 1)
        at_ends = ends(budget, self.sinks, self.recent)
        return Representatives(self.block, budget, *at_ends, self.representatives)


@dataclass(frozen=True)
class Representatives(MiddleBlocks):
    """Ranks blocks by the keys that stand for them.

    Args:
        count: keys that stand for a block.
    """

    count: int

    def score(self, held: Held, queries: Tensor, index: Mapping[str, Tensor]) -> Tensor:
        """The layer's score of every block, ``[R, C, b]``; minus infinity where it is empty."""
        import torch

        turned = clamped_queries(held, queries, self.last)
        worth = of_layer(turned.sum(1) @ index["means"].transpose(-1, -2), held.policies)
        return worth.masked_fill(~index["there"][:, None], -torch.inf)

    def index(self, held: Held) -> dict[str, Tensor]:
        """``means`` stand for blocks, ``[R, b, D]``; whether these are ``there``, ``[R, b]``."""
        import torch

        local = local_scores(held.signals, self.last)[held.heads].gather(1, held.tokens)
        local = local.masked_fill(~between(held, self.first, self.last), -torch.inf)
        keys = clamped_keys(held)
        local, keys = self.in_blocks(local, -torch.inf), self.in_blocks(keys, 0.0)
        top = local.topk(min(self.count, self.block), -1)
        mine = (top.values > -torch.inf)[..., None]
        means: Tensor = (of_tokens(keys, top.indices) * mine).sum(2) / mine.sum(2).clamp_min(1)
        return {"means": means, "there": mine[:, :, 0, 0]}

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """One key in 16 bits a block."""
        middle = max(entries - self.first - self.last, 0)
        return -(-middle // self.block) * head_dim * _NUMBER_BYTES


def local_scores(signals: Signals, window: int) -> Tensor:
    """Attention that each key drew from itself and the next queries, ``window`` in all, ``[H, P]``.

    Summed over the head's group.
    """

    def compute() -> Tensor:
        import torch

        heads, tokens, _ = signals.keys.shape
        total = torch.zeros(heads, tokens, device=signals.keys.device)
        column = torch.arange(tokens, device=total.device)
        for first, rows in signals.attention_tiles():
            row = torch.arange(first, first + rows.shape[2], device=total.device)
            near = row[:, None] - column < window
            total += (rows * near).sum((1, 2))
        return total

    return signals.once(f"local scores {window}", compute)
