"""Requests that come and go, each in its own pages: one step of a serving engine at a time.

    begin    once a step: which requests read their prompt, which generate, which blocks they have
    attend   once a layer: prompts are answered and compressed, generated tokens appended

A request is known by its first block: while it holds that block no other request can, and whoever
is given the block next begins with a prompt. What an engine no longer names is forgotten as soon as
its blocks are given to others. Tables of requests that generate together are kept for as long as
the same requests do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.backend import Backend, TritonBackend, backend_for
from kvtune.runtime.cache.choosing import choose, side_by_side
from kvtune.runtime.cache.reading import column_sums
from kvtune.runtime.cache.storing import store_prompts
from kvtune.runtime.kernels.launch import Scratch
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.pages import RequestPages
from kvtune.runtime.serving.served_layer import Arena, LayerRows, ServedLayer
from kvtune.traces.seam import causal_attention


class BlockTable(Protocol):
    """The engine's table of blocks, of the requests of one step."""

    def first(self) -> list[int]:
        """The first block of each request; 0 of rows that only pad the step."""

    def blocks(self, row: int, start: int, stop: int) -> list[int]:
        """Some of one request's blocks."""


@dataclass
class Held:
    """What is held of one request.

    Args:
        prompt_tokens: read in one piece.
        tokens: seen so far.
        pages: its own.
        budgets: of each layer's heads, ``[L][H]``.
        layers: its rows of each layer that has read the prompt.
    """

    prompt_tokens: int
    tokens: int
    pages: RequestPages
    budgets: list[list[int]]
    layers: list[LayerRows] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    Args:
        prompts: requests that read their prompt, and where in the step's tokens.
        generating: requests that append one token each.
        places: ``[n]``, where in the step's tokens.
    """

    prompts: list[tuple[Held, slice]]
    generating: list[Held]
    places: Tensor


class Running:
    """All requests of one engine under one plan.

    Args:
        planned: the plan, and how it counts blocks.
        device: where the engine's memory is.
        backend: who works on pages; the device's own unless given.
    """

    def __init__(
        self, planned: PlannedBlocks, device: torch.device, backend: Backend | None = None
    ) -> None:
        self.planned, self.policy, self.device = planned, planned.policy, device
        self.backend = backend or backend_for(device)
        self.arena: Arena | None = None
        self.held: dict[int, Held] = {}  # by first block
        self._owners: dict[int, tuple[int, Held]] = {}  # by block: first block and request
        self._together: list[Held] = []
        self._joined: list[ServedLayer] = []
        self._scratch: Scratch | None = None

    def attach(self, memory: Tensor) -> None:
        """Say where the engine's cache memory is, all layers' in one tensor; safe to repeat."""
        if self.arena is None:
            self.arena = Arena(memory.view(torch.uint8), self.planned.cell_bytes)

    def begin(self, table: BlockTable, starts: Sequence[int], lengths: Sequence[int]) -> Step:
        """Take in who is part of a step.

        Args:
            table: of the step's requests.
            starts: of each request's tokens in the step, and their end.
            lengths: of each request, tokens of this step included.

        Raises:
            KvtuneError: a prompt comes in pieces.
        """
        prompts, generating, places = [], [], []
        for row, first in enumerate(table.first()[: len(lengths)]):
            start, stop, tokens = starts[row], starts[row + 1], lengths[row]
            if first == 0 or stop == start:
                continue
            if stop - start == tokens:
                prompts.append((self._new(table, row, first, tokens), slice(start, stop)))
            else:
                generating.append(self._known(table, row, first, stop - start, tokens))
                places.append(start)
        self._join(generating)
        return Step(prompts, generating, torch.tensor(places, device=self.device))

    def attend(
        self, step: Step, layer: int, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, scale: float
    ) -> None:
        """Answer one layer's queries, and store its keys and values.

        Args:
            step: as ``begin`` made it.
            layer: which; layers come in order.
            qkv: queries ``[T, Hq, D]``, keys and values ``[T, H, D]``, after RoPE.
            out: ``[T, Hq, D]``, is filled in.
            scale: of the logits.
        """
        for request, at in step.prompts:
            out[at] = self._prompt(request, layer, tuple(x[at] for x in qkv), scale)
        if step.generating:
            q, k, v = (x[step.places] for x in qkv)
            out[step.places] = self._generated(layer, q, k, v, scale).to(out.dtype)

    def _new(self, table: BlockTable, row: int, first: int, tokens: int) -> Held:
        budgets = self.policy.budgets(tokens).clip(0, tokens).tolist()
        request = Held(tokens, tokens, RequestPages(self.planned.block_cells), budgets)
        self.held[first] = request
        self._give(request, first, table, row)
        return request

    def _known(self, table: BlockTable, row: int, first: int, count: int, tokens: int) -> Held:
        request = self.held.get(first)
        if count != 1 or request is None or tokens not in (request.tokens, request.tokens + 1):
            raise KvtuneError(
                "a compressed prompt must be read in one piece, and then one token at a time",
                hint="serve without chunked prefill, prefix caching and speculative decoding.",
            )
        request.tokens = tokens
        self._give(request, first, table, row)
        return request

    def _give(self, request: Held, first: int, table: BlockTable, row: int) -> None:
        """Hand a request the blocks that it now needs, and forget whoever had them before."""
        have = len(request.pages.blocks)
        wanted = self.planned.blocks(request.prompt_tokens, request.tokens)
        if wanted <= have:
            return
        blocks = table.blocks(row, have, wanted)
        for block in blocks:
            former = self._owners.get(block)
            if former and self.held.get(former[0]) is former[1] is not request:
                del self.held[former[0]]
            self._owners[block] = first, request
        request.pages.add(blocks)

    def _prompt(self, request: Held, number: int, qkv: tuple[Tensor, ...], scale: float) -> Tensor:
        """Causal attention over one prompt ``[T, Hq, D]``; keeps what the plan says of it."""
        q, k, v = (x.transpose(0, 1).contiguous() for x in qkv)
        output = causal_attention(q[None], k[None], v[None], scale, None)[0]
        signals = Signals(q, k, v, scale, self._column_sums(q, k, scale), layer=number)
        choice = choose(self.policy, request.budgets[number], signals, evicts=False)
        layer = self._layer(number, [request])
        store_prompts(layer, *side_by_side([signals], [choice]), choice.kept, choice.exact)
        request.layers.append(LayerRows.of(layer, 0))
        return output.transpose(0, 1)

    def _column_sums(self, q: Tensor, k: Tensor, scale: float) -> Tensor | None:
        if not (self.policy.needs.column_sums and isinstance(self.backend, TritonBackend)):
            return None
        return column_sums(q[None], k[None], scale)[0]

    def _generated(self, number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append one token a request and attend, ``[n, Hq, D]``."""
        layer = self._joined[number]
        layer.reserve(1)
        layer.append(k, v)
        layer.count_appended()
        queries = q.reshape(layer.rows, -1, q.shape[-1]).contiguous()
        return layer.attend(queries, self._scratch_for(layer, queries), scale).view_as(q)

    def _join(self, requests: list[Held]) -> None:
        """Put the tables of these requests side by side, unless they are already."""
        same = len(requests) == len(self._together) and all(
            one is other for one, other in zip(requests, self._together, strict=True)
        )
        if same:
            return
        for layer in self._joined:
            for at, request in enumerate(self._together):
                request.layers[layer.number] = LayerRows.of(layer, at)
        self._together = requests
        self._joined = [self._joined_layer(n, requests) for n in range(self.policy.layers)]

    def _joined_layer(self, number: int, requests: list[Held]) -> ServedLayer:
        layer = self._layer(number, requests)
        if requests:
            layer.hold([request.layers[number] for request in requests])
        return layer

    def _layer(self, number: int, requests: list[Held]) -> ServedLayer:
        if self.arena is None:
            raise RuntimeError("the engine has not said where its memory is")
        pages = [request.pages for request in requests]
        options, head_dim = self.policy.heads[number], self.planned.head_dim
        return ServedLayer(number, options, head_dim, pages, self.arena, self.backend)

    def _scratch_for(self, layer: ServedLayer, queries: Tensor) -> Scratch:
        """One for all layers, as large as the largest has needed."""
        rows, group, head_dim = queries.shape
        old = self._scratch
        if old is None or len(old.lse) < layer.slots or len(old.arrived) < rows:
            self._scratch = Scratch(rows, layer.slots, group, head_dim, queries.device)
        assert self._scratch is not None  # noqa: S101 (for mypy)
        return self._scratch
