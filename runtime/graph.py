"""Decoding without the host: one token for every sequence is one replay of a CUDA graph.

The graph reads token, position and page tables from fixed memory; between replays the host only
gives out pages, every 64 tokens, and looks whether all sequences have ended. Without a GPU, or
where methods evict while decoding and the host counts what leaves, the same loop runs step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.transformers_interface import cache_argument
from kvtune.policies.page_formats import PAGE
from kvtune.runtime.admission import read_prompts
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.fuse import fused_on_gpu


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: 0 for the likeliest.
        top_k: of so many; 0 for all.
        top_p: of the fewest that together have this probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def draw(self, logits: Tensor) -> Tensor:
        """Token ids ``[B]`` of logits ``[B, vocabulary]``; a graph may capture it."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            share = ordered.softmax(-1)
            beyond = share.cumsum(-1) - share >= self.top_p
            logits = logits.masked_fill(
                torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf
            )
        noise = torch.empty_like(logits).exponential_()
        return (logits.softmax(-1) / noise).argmax(-1)


GREEDY = Sampling()


@torch.no_grad()
def generate(
    model: Any,
    cache: PolicyCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    ends: tuple[int, ...] = (),
) -> Tensor:
    """Answer a batch of prompts, ``[B, n]`` new tokens, n at most ``new_tokens``.

    Prompts are read one after another, so that the batch's caches are the memory that it takes.

    Args:
        model: that the cache was loaded for.
        cache: new.
        input_ids: prompts ``[B, P]``, padded on the left.
        attention_mask: ``[B, P]``, where there is padding.
        new_tokens: room for which the cache was made.
        sampling: how tokens are drawn.
        ends: token ids that end a sequence; what follows the first of them means nothing, and the
            sequence's pages are given back.

    Raises:
        KvtuneError: more tokens than the cache has room for; see ``load_cache`` for others.
    """
    if cache.prompts:
        raise KvtuneError(
            "this cache has read its prompts, and the loop begins with prompts",
            hint="model.generate takes a second turn; or load another cache.",
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    first = sampling.draw(read_prompts(model, cache, input_ids, attention_mask))
    loop = DecodeLoop(model, cache, first, mask.sum(1), new_tokens, sampling)
    return loop.run(ends)


class DecodeLoop:
    """Generates from a cache that holds the prompts.

    Args:
        model: answers one token a sequence.
        cache: holds the prompts.
        tokens: ``[B]``, the first new ones, already drawn.
        positions: ``[B]``, theirs.
        new_tokens: to generate, the first included.
        sampling: how.
        fuse: replace small modules by fused kernels while decoding on a GPU.
    """

    def __init__(
        self,
        model: Any,
        cache: PolicyCache,
        tokens: Tensor,
        positions: Tensor,
        new_tokens: int,
        sampling: Sampling = GREEDY,
        fuse: bool = True,
    ) -> None:
        if new_tokens > cache.new_tokens:
            raise KvtuneError(
                f"the cache has room for {cache.new_tokens} new tokens, not for {new_tokens}",
                hint="give load_cache(..., new_tokens=).",
            )
        self.model, self.cache, self.sampling, self.fuse = model, cache, sampling, fuse
        self.tokens, self.positions = tokens[:, None].clone(), positions[:, None].clone()
        self.found = tokens.new_zeros(len(tokens), new_tokens)
        self.found[:, 0] = tokens
        self.at = torch.ones(1, dtype=torch.long, device=tokens.device)
        self.done = 1
        self._graph: Any = None
        self._freed: set[int] = set()
        self._cache_argument = cache_argument(model, cache)

    def run(self, ends: tuple[int, ...] = ()) -> Tensor:
        """Generate until the room is used or every sequence has ended."""
        total = self.found.shape[1]
        with self.ready():
            while self.done < total:
                self.advance(min(PAGE, total - self.done))
                if ends and self._free_ended(ends) == len(self.found):
                    break
        return self.found[:, : self.done]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Fused and captured until the block ends, where there is a GPU and no head evicts."""
        with fused_on_gpu(self.model) if self.fuse else nullcontext():
            if self.tokens.is_cuda and self.cache.can_be_captured:
                self._capture()
            try:
                yield
            finally:
                self.cache.captured = False
                self._graph = None

    def advance(self, steps: int) -> None:
        """So many tokens more for every sequence."""
        self.cache.reserve(steps)
        for _ in range(steps):
            self._graph.replay() if self._graph else self._step()
        if self._graph:
            self._count(steps)
        self.done += steps

    def _capture(self) -> None:
        """Two tokens in the open, which compile what needs compiling; then the graph.

        On the stream that will replay, as ``runtime.measure.timer.capture`` explains.
        """
        warm_up = min(2, self.found.shape[1] - self.done)
        for _ in range(warm_up):
            self._step()
        self.done += warm_up
        graph = torch.cuda.CUDAGraph()
        self.cache.captured = True
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def _step(self) -> None:
        logits = self.model(
            input_ids=self.tokens, position_ids=self.positions, use_cache=True,
            logits_to_keep=1, **self._cache_argument,
        ).logits[:, -1]  # fmt: skip
        drawn = self.sampling.draw(logits)[:, None]
        # A kernel, not a copy: a graph's copy node goes to another engine of the GPU and back.
        torch.add(drawn, 0, out=self.tokens)
        self.found.index_copy_(1, self.at, drawn)
        self.positions += 1
        self.at += 1

    def _count(self, steps: int) -> None:
        for layer in self.cache.layers:
            layer.paged.count_appended(steps)
            layer.seen += steps

    def _free_ended(self, ends: tuple[int, ...]) -> int:
        """Give back what is held of sequences that have ended; how many have."""
        listed = torch.tensor(ends, device=self.found.device)
        ended = torch.isin(self.found[:, : self.done], listed).any(1).nonzero()[:, 0].tolist()
        for sequence in ended:
            if sequence not in self._freed:
                self.cache.free(sequence)
        self._freed.update(ended)
        return len(ended)
