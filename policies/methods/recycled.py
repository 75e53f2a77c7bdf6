"""Recycled Attention: most steps read the tokens that the last full step looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.gathering import of_tokens
from kvtune.policies.method import ReadingMethod
from kvtune.policies.pooling import check_kernel, pooled
from kvtune.policies.reader import Held, Memory, Reader
from kvtune.policies.recall import best, of_layer
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Recycled(ReadingMethod):
    """Holds every token; the budget is how many of them a step reads between two full steps.

    at a full step:  read everything; pick the budget's tokens of highest attention, max over the
                     head's group, max-pooled over ``kernel`` neighbours
    otherwise:       read what the last full step picked (at first, the prompt's last query)
    every ``stride`` steps a full step is due; it is passed over where the query, mean over the
    layer's heads, has a cosine above ``similarity`` with that of the last full step

    Source: Xu et al., "Recycled Attention: Efficient inference for long-context language models",
    arXiv 2411.05787, later RefreshKV; a stride of 10 and no pooling are a published setting, as are
    5 with ``similarity: 0.8``; 1 keeps to the stride. No official code is out; ours follows
    descriptions of the paper. Differs: generated tokens are always read beside the budget's; the
    last token of the prompt always is. Bytes count every full step that is due.
    Cost: a full step every ``stride`` steps, with its keys read twice.
    """

    name = "recycled"
    source = "Xu et al., arXiv 2411.05787"

    stride: int = parameter(10, "steps from one full step to the next", low=1, high=65536)
    similarity: float = parameter(
        1.0, "cosine of queries above which a full step is passed over", low=-1, high=1
    )
    kernel: int = parameter(1, "pooling kernel, odd", unit="tokens", low=1, high=1023)

    def __post_init__(self) -> None:
        check_kernel("recycled", self.kernel)

    @property
    def needs(self) -> Needs:
        """The prompt's last query."""
        return Needs(window=1)

    def reader(self, budget: int) -> Reader:
        """What the last full step looked at."""
        return LastFullStep(max(budget, 1), self.stride, self.similarity, self.kernel)


@dataclass(frozen=True)
class LastFullStep(Reader):
    """Reads everything now and then, and in between what that showed.

    Args:
        budget: entries read at other steps.
        stride: steps between full ones.
        similarity: cosine above which a full step is passed over.
        kernel: of the pooling.
    """

    budget: int
    stride: int
    similarity: float
    kernel: int

    def reads(self, held: Held, queries: Tensor) -> Tensor:
        """Step by step: all entries, or those of the last full step."""
        import torch

        before = self._last_prompt_query(held)
        seen = torch.cat([before, queries], 2)  # step -1 is the prompt's last token
        picked = self.picks(held, seen)
        full, source = self.schedule(held, seen)
        chosen = of_tokens(picked, source)
        return chosen | (full[..., None] & held.real[:, None])

    def follow(self, held: Held, query: Tensor, memory: Memory) -> Tensor:
        """The same; what the last full step picked is remembered, and its query."""
        import torch

        if not memory:
            before = self._last_prompt_query(held)
            memory |= {"picked": self.picks(held, before)[:, 0], "mean": self._mean(held, before)}
        chosen: Tensor = memory["picked"]
        if (held.start - held.signals.prompt_tokens + 1) % self.stride:
            return chosen
        mean = self._mean(held, query)
        full = self._is_full(mean, memory["mean"])[:, None]
        picked = self.picks(held, query)[:, 0]
        memory["picked"] = torch.where(full, picked, chosen)
        memory["mean"] = torch.where(full, mean, memory["mean"])
        return chosen | (full & held.real)

    def _mean(self, held: Held, query: Tensor) -> Tensor:
        """Of one query over the layer's heads, ``[R, D]``, times their number."""
        return of_layer(query.mean(1), held.policies)[:, 0]

    def _is_full(self, mean: Tensor, last: Tensor) -> Tensor:
        """Whether a step that is due reads everything, ``[R]`` bool."""
        import torch

        cosine = torch.cosine_similarity(mean, last, dim=-1)
        return (cosine <= self.similarity) | (self.similarity >= 1)

    def picks(self, held: Held, queries: Tensor) -> Tensor:
        """What each query would pick, were its step full, ``[R, C, n]`` bool."""
        import torch

        logits = queries @ held.keys[:, None].transpose(-1, -2) * held.signals.scale
        logits = logits.masked_fill(~held.real[:, None, None], -torch.inf)
        drawn = pooled(logits.softmax(-1).amax(1), self.kernel, "max", 0)
        return best(held, drawn, 0, 1, self.budget)

    def schedule(self, held: Held, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Which steps are full, and whose picks each step reads, ``[R, C]`` each.

        ``queries`` begin with the prompt's last one, whose picks count as number 0.
        """
        import torch

        mean = of_layer(queries.mean(1), held.policies)  # [R, C + 1, D]
        steps = queries.shape[2] - 1
        full = torch.zeros(len(mean), steps, dtype=torch.bool, device=mean.device)
        source = torch.zeros(len(mean), steps, dtype=torch.int64, device=mean.device)
        latest = torch.zeros(len(mean), dtype=torch.int64, device=mean.device)
        row = torch.arange(len(mean), device=mean.device)
        for step in range(steps):
            source[:, step] = latest
            if (step + 1) % self.stride == 0:
                full[:, step] = self._is_full(mean[:, step + 1], mean[row, latest])
                latest = torch.where(full[:, step], step + 1, latest)
        return full, source

    def _last_prompt_query(self, held: Held) -> Tensor:
        """``[R, G, 1, D]``."""
        last = held.signals.queries[:, -1:].float()
        grouped: Tensor = last.unflatten(0, (held.signals.keys.shape[0], -1))
        return grouped[held.heads]

    @property
    def is_scheduled(self) -> bool:
        """A full step reads everything."""
        return True

    def entries_read(self, entries: int) -> int:
        """The mean over a stride, every full step counted that is due."""
        few = min(entries, self.budget)
        return -(-(few * (self.stride - 1) + entries) // self.stride)

    def most_read(self, entries: int, step: int) -> int:
        """Everything where a full step is due."""
        return min(entries, self.budget) if (step + 1) % self.stride else entries

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """The numbers of what is read; the authors hold a copy of it instead."""
        return 4 * min(entries, self.budget)

    def scanned_bytes(self, entries: int, head_dim: int, key_bytes: int) -> int:
        """A full step's keys once more, and the numbers."""
        return -(-key_bytes // self.stride) + self.index_bytes(entries, head_dim)
