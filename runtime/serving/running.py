"""Requests that come and go, each in its own pages: one step of a serving engine at a time.

    begin    once a step: which requests read their prompt, which generate, which blocks they have
    attend   once a layer: prompts are answered and compressed, generated tokens appended

A request is known by its first block: while it holds that block no other request can, and whoever
is given the block next begins with a prompt. What an engine no longer names is forgotten as soon as
its blocks are given to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.runtime.cache.backend import Backend, TritonBackend, backend_for
from kvtune.runtime.cache.reading import column_sums
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.compressing import compress
from kvtune.runtime.serving.held import Held, Stored
from kvtune.runtime.serving.pages import RequestPages
from kvtune.runtime.serving.reading import Reading
from kvtune.runtime.serving.seat_planning import Size
from kvtune.runtime.serving.seats import Seats
from kvtune.traces.seam import prompt_attention

_HEADS_TIMES_TOKENS = 2**17
"""Compressed at once: a prompt of 1,024 tokens in 16 layers of 8 heads, with some 300 MB of working
memory."""


class BlockTable(Protocol):
    """The engine's table of blocks, of the requests of one step."""

    def first(self) -> list[int]:
        """The first block of each request; 0 of rows that only pad the step."""

    def blocks(self, row: int, start: int, stop: int) -> list[int]:
        """Some of one request's blocks."""


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    Args:
        prompts: requests that read their prompt, and where in the step's tokens.
        generating: rows that append one token each, rows of nobody in a captured step included.
        places: where in the step's tokens; ``[n]``, or a slice of neighbours.
    """

    prompts: list[tuple[Held, slice]]
    generating: int
    places: Tensor | slice


class Running:
    """All requests of one engine under one plan.

    Args:
        planned: the plan, and how it counts blocks.
        device: where the engine's memory is.
        backend: who works on pages; the device's own unless given.
        room: of the tables of requests that generate, if it is known beforehand.
    """

    def __init__(
        self,
        planned: PlannedBlocks,
        device: torch.device,
        backend: Backend | None = None,
        room: Size | None = None,
    ) -> None:
        self.planned, self.policy, self.device = planned, planned.policy, device
        self.backend, self.needs = backend or backend_for(device), self.policy.needs
        self.alone = all(map(self.policy.chooses_head_by_head, range(self.policy.layers)))
        self.memory: Tensor | None = None
        self.held: dict[int, Held] = {}  # by first block
        self._owners: dict[int, tuple[int, Held]] = {}  # by block: first block and request
        self.seats: Seats | None = None
        self.room = room

    def attach(self, memory: Tensor, query_heads: int | None = None) -> None:
        """Say where the engine's cache memory is, all layers' in one tensor; safe to repeat.

        Args:
            memory: any type; other memory than before holds no requests.
            query_heads: Hq, where nothing may be allocated in steps that are captured.
        """
        if self.memory is not None and self.memory.data_ptr() == memory.data_ptr():
            return
        self.memory = memory.view(torch.uint8).view(-1)
        self.held, self._owners = {}, {}
        self.seats = Seats(self.policy, self.planned.head_dim, self.memory, self.backend, self.room)
        if query_heads is not None:
            self.seats.prepare(query_heads)

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
        self._seat(generating)
        return Step(prompts, len(generating), self._places(places))

    def nobody(self, rows: int) -> Step:
        """A step of rows that are nobody's: it reads nothing and writes nowhere."""
        self._seats.seat([])
        return Step([], rows, slice(0, rows))

    def capture(self, rows: int) -> Step:
        """The same, for a graph: replayed it serves those whom the last ``begin`` has seated."""
        self._seats.captured = True
        return self.nobody(rows)

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
            self._generate(layer, tuple(x[step.places] for x in qkv), step.places, out, scale)

    def _seat(self, requests: list[Held]) -> None:
        if requests:
            self._seats.seat(requests)
        for request in requests:
            request.appended += 1

    def _places(self, places: list[int]) -> Tensor | slice:
        """Neighbours need no copy."""
        if places and places == list(range(places[0], places[0] + len(places))):
            return slice(places[0], places[0] + len(places))
        return torch.tensor(places, device=self.device)

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

    def _prompt(self, request: Held, layer: int, qkv: tuple[Tensor, ...], scale: float) -> Tensor:
        """Causal attention over one prompt ``[T, Hq, D]``; keeps what the plan says of it."""
        q, k, v = (x.transpose(0, 1) for x in qkv)
        output = prompt_attention(q[None], k[None], v[None], scale)[0]
        sums, window = self._column_sums(q, k, scale), self.needs.queries(len(qkv[0]))
        if sums is not None:
            window = min(self.needs.window, len(qkv[0]))
        reading = request.reading or Reading.begin(self._next(request, layer), qkv[1], scale)
        reading.add(qkv[1], qkv[2], q[:, len(qkv[0]) - window :].clone(), sums)
        request.reading = None if reading.is_whole else reading
        if reading.is_whole:
            request.parts.append(self._compressed(request, reading))
        return output.transpose(0, 1)

    def _next(self, request: Held, layer: int) -> range:
        """Layers that are compressed together: for each one alone the host has as much to do."""
        rows = request.prompt_tokens * self.policy.kv_heads
        count = max(1, _HEADS_TIMES_TOKENS // rows) if self.alone else 1
        return range(layer, min(layer + count, self.policy.layers))

    def _compressed(self, request: Held, reading: Reading) -> Stored:
        """The layers that have read the prompt, in pages."""
        layers, heads, signals = reading.layers, self.policy.kv_heads, reading.signals
        budgets = [budget for n in layers for budget in request.budgets[n]]
        if not self.alone:
            budgets = self.policy.split(layers.start, budgets, signals)
        groups = self.planned.alike(heads * layers.start, budgets, request.prompt_tokens)
        if self.memory is None:
            raise RuntimeError("the engine has not said where its memory is")
        return compress(groups, signals, heads, request.pages, self.memory, self.backend)

    def _column_sums(self, q: Tensor, k: Tensor, scale: float) -> Tensor | None:
        if not (self.needs.column_sums and isinstance(self.backend, TritonBackend)):
            return None
        return column_sums(q[None], k[None], scale)[0]

    def _generate(
        self, layer: int, qkv: tuple[Tensor, ...], places: Tensor | slice, out: Tensor, scale: float
    ) -> None:
        """Append one token a request, and attend."""
        q, k, v = qkv
        self._seats.append(layer, k, v)
        if isinstance(places, slice):
            self._seats.attend(layer, q, scale, out[places])
            return
        answers = torch.zeros_like(q)
        self._seats.attend(layer, q, scale, answers)
        out[places] = answers

    @property
    def _seats(self) -> Seats:
        if self.seats is None:
            raise RuntimeError("the engine has not said where its memory is")
        return self.seats
