"""Prompts of one step: read layer by layer, and shown to methods some layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.signals import Signals
from kvtune.runtime.cache.segments import Ints, runs
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.serving.held import Held

_HELD_AT_ONCE = 2**19
"""Tokens, counted once a head and layer, whose keys and values wait to be compressed: 256 MiB where
a head has 128 channels in 16 bits."""

_ASKED_AT_ONCE = 2**17
"""The same, of what a method is asked about at once: some 300 MB of working memory."""


@dataclass(frozen=True)
class Asked:
    """Neighbouring heads of a prompt, which methods are asked about at once.

    Args:
        prompt: its number.
        heads: of the layers that are held, layer by layer.
    """

    prompt: int
    heads: range


class Prompts:
    """The prompts of one step, and the layers of them that are yet to be compressed.

    Prompts lie one after another in the token axis of what is held, as in the step.

    Args:
        requests: whose they are.
        places: where in the step's tokens, ascending.
        tails: how many of each one's last queries methods look at.
        device: where the step's tokens are.
    """

    def __init__(
        self,
        requests: Sequence[Held],
        places: Sequence[slice],
        tails: Sequence[int],
        device: torch.device,
    ) -> None:
        self.requests, self.places, self.tails = list(requests), list(places), list(tails)
        self.span = slice(places[0].start, places[-1].stop)
        counts = np.array(self.tails)
        firsts = np.array([place.stop for place in places]) - counts
        self._last_queries = sent([runs(counts, firsts)], device)[0]
        self.layers = range(0)
        self.keys = self.values = torch.empty(0)
        self._queries: list[Tensor] = []
        self._sums: list[list[Tensor]] = []

    @property
    def tokens(self) -> int:
        """Of all prompts together."""
        return int(self.span.stop - self.span.start)

    @property
    def starts(self) -> Ints:
        """Where each prompt begins in what is held."""
        return np.array([place.start - self.span.start for place in self.places], np.int64)

    def add(
        self, layer: int, last: int, qkv: tuple[Tensor, Tensor, Tensor], sums: list[Tensor]
    ) -> bool:
        """Hold another layer; whether all that are held at once are now there.

        Args:
            layer: which; layers come in order.
            last: the layer at which no more are to be held, whatever room there is.
            qkv: of all of the step's tokens, ``[T, Hq, D]`` and ``[T, H, D]``.
            sums: attention that each key of a prompt drew, ``[Hq, P]`` each, where methods ask.
        """
        q, k, v = qkv
        heads = k.shape[1]
        if not self._queries:
            self._begin(range(layer, last + 1), k)
        first = heads * len(self._queries)
        rows = slice(first, first + heads)
        self.keys[rows] = k[self.span].transpose(0, 1)
        self.values[rows] = v[self.span].transpose(0, 1)
        self._queries.append(q.index_select(0, self._last_queries))
        self._sums.append(sums)
        return len(self._queries) == len(self.layers)

    def _begin(self, layers: range, keys: Tensor) -> None:
        """Room for as many layers as may be held at once, of keys like these, ``[T, H, D]``."""
        _, heads, head_dim = keys.shape
        count = max(1, _HELD_AT_ONCE // (heads * self.tokens))
        self.layers = layers[:count]
        shape = len(self.layers) * heads, self.tokens, head_dim
        self.keys, self.values = keys.new_empty(shape), keys.new_empty(shape)

    def taken(self) -> None:
        """All layers that were held have been compressed."""
        self.layers, self.keys, self.values = range(0), torch.empty(0), torch.empty(0)
        self._queries, self._sums = [], []

    def asked(self) -> list[Asked]:
        """In which pieces methods are asked about what is held, prompt by prompt."""
        return [
            Asked(number, heads)
            for number, request in enumerate(self.requests)
            for heads in self._pieces(request.prompt_tokens)
        ]

    def _pieces(self, tokens: int) -> Iterator[range]:
        """All heads that are held, some layers at a time."""
        heads = len(self.keys) // len(self.layers)
        step = heads * max(1, _ASKED_AT_ONCE // (heads * tokens))
        return (range(len(self.keys))[at : at + step] for at in range(0, len(self.keys), step))

    def signals(self, asked: Asked, scale: float) -> Signals:
        """What methods may look at; ``scale`` is that of the logits."""
        number, heads = asked.prompt, asked.heads
        start, tail = int(self.starts[number]), sum(self.tails[:number])
        tokens = slice(start, start + self.requests[number].prompt_tokens)
        rows = slice(heads.start, heads.stop)
        a_layer = len(self.keys) // len(self.layers)
        layers = slice(heads.start // a_layer, heads.stop // a_layer)
        queries = torch.stack([q[tail : tail + self.tails[number]] for q in self._queries[layers]])
        sums = [each[number] for each in self._sums[layers] if each]
        return Signals(
            queries.transpose(1, 2).flatten(0, 1),
            self.keys[rows, tokens],
            self.values[rows, tokens],
            scale,
            torch.cat(sums) if sums else None,
            layer=self.layers[layers.start],
        )
