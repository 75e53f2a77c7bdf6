"""TokenSelect: all heads of a layer vote for the tokens that a step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ReadingMethod
from kvtune.policies.reader import Held, Memory, Reader
from kvtune.policies.recall import best, between, clamped_keys, clamped_queries, ends, of_layer
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenSelect(ReadingMethod):
    """Holds every token; the budget is how many of them a step reads, the same for all heads.

    vote[i] = sum over the layer's query heads of softmax over candidates (q . k_i), unscaled, keys
              taken as if they stood ``recent`` tokens away
    read    = the first ``sinks`` and last ``recent`` tokens, and the highest votes
    reuse   = the last selection while cos(q, query that selected) >= ``similarity``, all heads of
              the layer as one vector

    Source: Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for
    LLMs via Dynamic Token-Level KV Cache Selection", EMNLP 2025, arXiv 2411.02886; 128, 512 and 0.9
    are the paper's, with 2048 voted tokens. Differs: attention itself keeps the original positions,
    where the authors number what they read anew; prompts are read whole; the ends take at most half
    of a small budget. Their released code never reuses a selection; the paper does.
    Cost: reads every key where nothing is reused; O(Hq P D) a step.
    """

    name = "token_select"
    source = "Wu et al., EMNLP 2025, arXiv 2411.02886"

    sinks: int = parameter(128, "first tokens always read", unit="tokens", low=0, high=4096)
    recent: int = parameter(
        512, "last tokens always read", unit="tokens", low=1, high=LONGEST_PROMPT
    )
    similarity: float = parameter(
        0.9, "cosine of queries from which a selection is reused; 2 never", low=-1, high=2
    )

    @property
    def needs(self) -> Needs:
        """Positions to turn queries and keys to."""
        return Needs(rope=True)

    def reader(self, budget: int) -> Reader:
        """The layer's votes."""
        budget = max(budget, 1)
        return Votes(budget, *ends(budget, self.sinks, self.recent), self.similarity)


@dataclass(frozen=True)
class Votes(Reader):
    """Ranks entries by the votes of all heads of a layer.

    Args:
        budget: entries read.
        first: at the start, always read.
        last: at the end, likewise.
        similarity: from which a selection is reused.
    """

    budget: int
    first: int
    last: int
    similarity: float

    def reads(self, held: Held, queries: Tensor) -> Tensor:
        """The ends and the highest votes."""
        chosen = self._voted(held, queries)
        source = self.source_of(held, queries)[..., None].expand_as(chosen)
        return chosen.gather(1, source)

    def follow(self, held: Held, query: Tensor, memory: Memory) -> Tensor:
        """The same; the last selection and the query that made it are remembered."""
        import torch

        chosen, asked = self._voted(held, query)[:, 0], query[:, :, 0]
        if memory:
            last = memory["asked"]
            product, own, theirs = (
                of_layer((x * y).sum((1, 2)), held.policies).clamp_min(floor)
                for x, y, floor in (
                    (asked, last, -torch.inf), (asked, asked, 1e-30), (last, last, 1e-30),
                )
            )  # fmt: skip
            near = product / (own.sqrt() * theirs.sqrt()) >= self.similarity
            chosen = torch.where(near[:, None], memory["chosen"], chosen)
            asked = torch.where(near[:, None, None], last, asked)
        memory |= {"chosen": chosen, "asked": asked}
        return chosen

    def _voted(self, held: Held, queries: Tensor) -> Tensor:
        """What each query selects by itself, ``[R, C, n]`` bool."""
        return best(held, self.votes(held, queries), self.first, self.last, self.budget)

    def votes(self, held: Held, queries: Tensor) -> Tensor:
        """The layer's votes for every entry, ``[R, C, n]``; zero at the ends."""
        import torch

        q, k = clamped_queries(held, queries, self.last), clamped_keys(held)
        candidate = between(held, self.first, self.last)
        logits = q @ k[:, None].transpose(-1, -2)
        logits = logits.masked_fill(~candidate[:, None, None], -torch.inf)
        soft = (logits - logits.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
        soft = soft / soft.sum(-1, keepdim=True).clamp_min(1e-30)
        return of_layer(soft.sum(1), held.policies)

    def source_of(self, held: Held, queries: Tensor) -> Tensor:
        """The step whose selection each step reads, ``[R, C]`` int64."""
        import torch

        alike = of_layer(torch.einsum("rgcd,rged->rce", queries, queries), held.policies)
        length = alike.diagonal(dim1=1, dim2=2).clamp_min(1e-30).sqrt()
        cosine = alike / (length[:, :, None] * length[:, None])
        source = torch.zeros(cosine.shape[:2], dtype=torch.int64, device=cosine.device)
        for step in range(1, cosine.shape[1]):
            last = source[:, step - 1]
            near = cosine[:, step].gather(1, last[:, None])[:, 0] >= self.similarity
            source[:, step] = torch.where(near, last, step)
        return source

    def entries_read(self, entries: int) -> int:
        """Most entries that a step reads."""
        return min(entries, self.budget)

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """One query a layer is remembered, which is nothing a head."""
        return 0

    def scanned_bytes(self, entries: int, head_dim: int, key_bytes: int) -> int:
        """Every key, where nothing is reused; reuse depends on the text and is not counted."""
        return key_bytes
