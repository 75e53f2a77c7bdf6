"""SentenceKV: sentences by their mean key, for as long as one sentence is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import Method
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.parts import PartPlan
from kvtune.policies.pooling import check_kernel
from kvtune.policies.reader import Held, Memory, Reader
from kvtune.policies.recall import best, between, ends
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_NUMBER_BYTES = 2
_WORDS_A_SENTENCE = 8  # entries for which one mean key is reserved


@dataclass(frozen=True)
class SentenceKV(Method):
    """Holds ``held`` times the budget; the budget is how many tokens a step reads.

    held     = what SnapKV keeps with this ``window`` and ``kernel``
    mean[s]  = mean key of the held tokens of sentence s
    query    = mean of the queries since the last sentence of the answer ended
    read     = the first and last 32 tokens held, and sentence by sentence of falling
               max over the head's group of query . mean[s]; the last one is cut where it must be

    Source: Zhu et al., "SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV
    Caching", COLM 2025, arXiv 2504.00970; 3 times a budget of 1024, a window of 32 and pooling over
    7 are the authors'. Differs: one choice a KV head; the first query of a sentence chooses by
    itself, where the authors' code reads everything; sentences of the answer are always read; the
    ends take at most half of a small budget. Where sentences end is read off the tokens' text.
    Cost: as SnapKV's, and O(G D S) a step of S sentences.
    """

    name = "sentencekv"
    source = "Zhu et al., COLM 2025, arXiv 2504.00970"

    held: int = parameter(3, "tokens held for every token of the budget", low=1, high=64)
    window: int = parameter(32, "observation window", unit="tokens", low=1, high=LONGEST_PROMPT)
    kernel: int = parameter(7, "pooling kernel, odd", unit="tokens", low=1, high=1023)

    def __post_init__(self) -> None:
        check_kernel("sentencekv", self.kernel)

    @property
    def needs(self) -> Needs:
        """The observation window, and where sentences end."""
        return Needs(window=self.window, sentences=True)

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """What SnapKV would keep under so many times the budget."""
        prefilter = SnapKV(self.window, self.kernel)
        return prefilter.keep(signals, min(self.held * budget, signals.prompt_tokens))

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """So many times the budget, or the prompt."""
        return (PartPlan(min(self.held * budget, prompt_tokens)),)

    def reader(self, budget: int) -> Reader:
        """Sentences by their mean key."""
        budget = max(budget, 1)
        return Sentences(budget, *ends(budget, 32, 32))


@dataclass(frozen=True)
class Sentences(Reader):
    """Ranks sentences of the entries between the ends.

    Args:
        budget: entries read.
        first: at the start, always read.
        last: at the end, likewise.
    """

    budget: int
    first: int
    last: int

    def reads(self, held: Held, queries: Tensor) -> Tensor:
        """The ends, and entries in the order of their sentences."""
        return self._ranked(held, self._running(held, queries), self._sentences(held))

    def follow(self, held: Held, query: Tensor, memory: Memory) -> Tensor:
        """The same; sentences are averaged once, and queries since the last one ended summed up."""
        import torch

        if not memory:
            zero = torch.zeros_like(query[:, :, 0], dtype=torch.float64)
            memory |= self._sentences(held) | {"total": zero, "count": zero[:, :1, :1]}
        ended = held.signals.given("sentence_ends")[held.start - 1 : held.start]
        goes_on = 1 - ended.double() if len(ended) else 1  # of what is not known it does
        memory["total"] = memory["total"] * goes_on + query[:, :, 0].double()
        memory["count"] = memory["count"] * goes_on + 1
        mean = (memory["total"] / memory["count"]).to(query.dtype)
        return self._ranked(held, mean[:, :, None], memory)[:, 0]

    def _ranked(self, held: Held, asked: Tensor, sentences: Mapping[str, Tensor]) -> Tensor:
        """What queries ``[R, G, C, D]``, each as it chooses, attend to, ``[R, C, n]`` bool."""
        import torch

        sentence, means = sentences["number"], sentences["means"]
        worth = (asked @ means[:, None].transpose(-1, -2)).amax(1)
        worth = worth.masked_fill(~sentences["there"][:, None], -torch.inf)
        rank = worth.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # 0 for the best
        place = torch.arange(held.keys.shape[1], device=asked.device)
        at = sentence[:, None].expand(-1, rank.shape[1], -1)
        order = -(rank.gather(-1, at) * (len(place) + 1) + place).double()
        return best(held, order, self.first, self.last, self.budget)

    def _sentences(self, held: Held) -> dict[str, Tensor]:
        """Each entry's ``number`` of a sentence ``[R, n]``; of sentences ``means`` of keys
        ``[R, S, D]``, and which are ``there``, ``[R, S]``."""
        ends_at = held.signals.given("sentence_ends")[: held.signals.prompt_tokens].long()
        number = (ends_at.cumsum(0) - ends_at)[held.tokens]  # sentences that ended before a token
        middle = between(held, self.first, self.last)
        count = int(ends_at.sum()) + 1
        keys = held.keys * middle[..., None]
        total = keys.new_zeros(len(keys), count, keys.shape[-1])
        total = total.scatter_add(1, number[..., None].expand_as(keys), keys)
        each = keys.new_zeros(len(keys), count).scatter_add(1, number, middle.to(keys.dtype))
        means = total / each.clamp_min(1)[..., None]
        return {"number": number, "means": means, "there": each > 0}

    def _running(self, held: Held, queries: Tensor) -> Tensor:
        """Mean of the queries since the last sentence ended, ``[R, G, C, D]``."""
        import torch

        steps = torch.arange(queries.shape[2], device=queries.device)
        # Whether the token before a step's ended a sentence; of what is not known it did not.
        ended = held.signals.given("sentence_ends")[held.start : held.start + len(steps) - 1]
        begins = torch.zeros_like(steps)
        begins[1 : 1 + len(ended)] = steps[1 : 1 + len(ended)] * ended
        begun = begins.cummax(0).values
        total = torch.nn.functional.pad(queries.double().cumsum(2), (0, 0, 1, 0))
        mean = total[:, :, 1:] - total[:, :, begun]
        return (mean / (steps + 1 - begun)[:, None]).to(queries.dtype)

    def entries_read(self, entries: int) -> int:
        """Most entries that a step reads."""
        return min(entries, self.budget)

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """One mean key in 16 bits a sentence, of which every eighth entry is taken to be one."""
        return -(-entries // _WORDS_A_SENTENCE) * head_dim * _NUMBER_BYTES
