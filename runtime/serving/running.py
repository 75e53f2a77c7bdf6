"""Requests that come and go, each in its own pages: one step of a serving engine at a time.

    begin    once a step: which requests read their prompt, which generate, which blocks they have
    attend   once a layer: prompts are answered and compressed, generated tokens appended

A request is known by its first block: while it holds that block no other request can, and whoever
is given the block next begins with a prompt. What an engine no longer names is forgotten as soon as
its blocks are given to others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.reading import column_sums
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.cache.which_backend import backend_for
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.compressing import compress
from kvtune.runtime.serving.held import Held
from kvtune.runtime.serving.pages import RequestPages
from kvtune.runtime.serving.reading import Prompts
from kvtune.runtime.serving.seat_planning import Size
from kvtune.runtime.serving.seats import Seats
from kvtune.runtime.serving.step import BlockTable, Step
from kvtune.traces.seam import prompt_attention


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
        """Take in the requests that are part of a step.

        Args:
            table: of the step's requests.
            starts: of each request's tokens in the step, and their end.
            lengths: of each request, tokens of this step included.

        Raises:
            KvtuneError: a prompt comes in pieces.
        """
        prompts, read, generating, places = [], [], [], []
        for row, first in enumerate(table.first()[: len(lengths)]):
            start, stop, tokens = starts[row], starts[row + 1], lengths[row]
            if first == 0 or stop == start:
                continue
            if stop - start == tokens:
                prompts.append(self._new(table, row, first, tokens))
                read.append(slice(start, stop))
            else:
                generating.append(self._known(table, row, first, stop - start, tokens))
                places.append(start)
        self._seat(generating)
        return Step(self._prompts(prompts, read), len(generating), self._places(places))

    def nobody(self, rows: int) -> Step:
        """A step whose rows belong to no request: it reads nothing and writes nowhere."""
        self._seats.seat([])
        return Step(None, rows, slice(0, rows))

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
        if step.prompts:
            self._read(step.prompts, layer, qkv, out, scale)
        if step.generating:
            self._generate(layer, tuple(x[step.places] for x in qkv), step.places, out, scale)
        if step.prompts and layer == self.policy.layers - 1:
            self._seats.expect(step.prompts.requests)

    def _seat(self, requests: list[Held]) -> None:
        self._seats.seat(requests)
        for request in requests:
            request.appended += 1

    def _places(self, places: list[int]) -> Tensor | slice:
        """Neighbours need no copy."""
        if places and places == list(range(places[0], places[0] + len(places))):
            return slice(places[0], places[0] + len(places))
        return sent([np.array(places, np.int64)], self.device)[0].long()

    def _new(self, table: BlockTable, row: int, first: int, tokens: int) -> Held:
        budgets = self.policy.budgets(tokens).clip(0, tokens)
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

    def _prompts(self, requests: list[Held], places: list[slice]) -> Prompts | None:
        """Requests that read their prompts at these places, and the queries that methods see."""
        if not requests:
            return None
        tails = [self._tail(request.prompt_tokens) for request in requests]
        return Prompts(requests, places, tails, self.device)

    def _tail(self, tokens: int) -> int:
        """How many of a prompt's last queries methods look at; sums are made of all at once."""
        return min(self.needs.window, tokens) if self._sums else self.needs.queries(tokens)

    def _read(
        self,
        prompts: Prompts,
        layer: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        scale: float,
    ) -> None:
        """Causal attention over each prompt; keeps what the plan says of it."""
        sums = []
        for at in prompts.places:
            q, k, v = (x[at].transpose(0, 1)[None] for x in qkv)
            out[at] = prompt_attention(q, k, v, scale)[0].transpose(0, 1)
            if self._sums:
                sums.append(column_sums(q, k, scale)[0])
        last = self.policy.layers - 1 if self.alone else layer
        if prompts.add(layer, last, qkv, sums):
            self._compress(prompts, scale)

    def _compress(self, prompts: Prompts, scale: float) -> None:
        """Put the layers that have been read into pages."""
        if self.memory is None:
            raise RuntimeError("the engine has not said where its memory is")
        layers = prompts.layers
        budgets = np.stack(
            [r.budgets[layers.start : layers.stop].ravel() for r in prompts.requests]
        )
        pieces = prompts.asked()
        signals: Iterable[Signals] = (prompts.signals(each, scale) for each in pieces)
        if not self.alone:  # one layer, each prompt for itself: budgets are known when it is seen
            signals = list(signals)
            each = zip(budgets.tolist(), signals, strict=True)
            budgets = np.array([self.policy.split(layers.start, *both) for both in each])
        stored = compress(
            self.planned, prompts, budgets, pieces, signals, self.memory, self.backend
        )
        for request, part in zip(prompts.requests, stored, strict=True):
            request.parts.append(part)
        prompts.taken()

    @property
    def _sums(self) -> bool:
        """Whether what each key draws is counted while a prompt is read, by a kernel."""
        return self.needs.column_sums and self.backend.has_kernels

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
