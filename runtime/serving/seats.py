"""Tables of the requests that generate, in device memory that stays where it is.

Every request has a seat: its own part of each layer's page table, lengths and tiles. A new request
is written into a free seat, once for all layers; no other entries are touched. A step then only
lists which seats take part, so that its launches can be captured in a CUDA graph: the tables of a
graph must have room from the beginning for all requests that may come (``most_room``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.policies.policy import Policy
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.kernels.launch import Paged, Scratch, Seating, signs_of
from kvtune.runtime.kernels.tiles import FIELDS
from kvtune.runtime.serving.held import KINDS, Held
from kvtune.runtime.serving.seat_planning import (
    AT,
    EMPTY,
    SEGMENT,
    SLOT,
    Entries,
    SeatPlanner,
    Size,
    reach,
)


class Seats:
    """The requests that generate together.

    Args:
        policy: for the model.
        head_dim: D.
        memory: the engine's, ``[bytes]`` uint8.
        backend: reads and writes pages.
        room: of the tables at first; they are replaced by larger ones where it does not do.
    """

    def __init__(
        self, policy: Policy, head_dim: int, memory: Tensor, backend: Backend, room: Size | None
    ) -> None:
        self.head_dim, self.memory, self.backend = head_dim, memory, backend
        self.page_cells = PageLayout(head_dim).page_cells
        self.planner = SeatPlanner.of(policy, head_dim)
        self.layers, self.heads = self.planner.layers, self.planner.heads
        self.together: list[int] = []  # seats of the step's requests
        self.seated: list[Held | None] = []
        self.scratch: Scratch | None = None
        self.captured = False
        self._allocate(room or Size(1, 1, 1))

    def seat(self, requests: Sequence[Held]) -> None:
        """Make these the requests that are attended to, in this order; each is to gain a token.

        Raises:
            RuntimeError: the engine has given a request fewer blocks than the plan counts, or a
                captured step's tables are too small.
        """
        at = {id(one): seat for seat, one in enumerate(self.seated) if one is not None}
        staying = {
            at[id(one)]: one
            for one in requests
            if id(one) in at and one.reserved <= self.reach[at[id(one)]]
        }
        self._grow(staying)
        coming = [one for one in requests if staying.get(at.get(id(one), -1)) is not one]
        if coming:
            self._enter(coming, staying, len(requests))
            at = {id(one): seat for seat, one in enumerate(self.seated) if one is not None}
        self._order([at[id(one)] for one in requests])

    def expect(self, coming: Sequence[Held]) -> None:
        """Write requests that are to generate next into seats, beside those of this step.

        To be called when the step's last layer has been launched: the host then works on tables
        while the device still reads prompts.
        """
        here = {seat: one for seat in self.together if (one := self.seated[seat]) is not None}
        self._enter(coming, here, len(here) + len(coming))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """One token a request, ``[n, H, D]``, in the order of the requests."""
        self.backend.append_seated(self.paged[layer], self.seating, keys, values)

    def attend(self, layer: int, q: Tensor, scale: float, out: Tensor) -> None:
        """Fill in ``out`` of one query a query head, ``[n, Hq, D]``; likewise."""
        scratch = self.scratch or self.prepare(q.shape[1])
        self.backend.attend_seated(q, self.paged[layer], self.seating, scratch, scale, out)

    def prepare(self, query_heads: int) -> Scratch:
        """Allocate what attention works in."""
        slots, rows = self.size.seats * self.planner.tiles_a_seat, self.size.seats * self.heads
        group, device = query_heads // self.heads, self.memory.device
        self.scratch = Scratch(rows, slots, group, self.head_dim, device)
        self.scratch.gathered(max(signs_of(pairs, self.head_dim) for pairs in self.planner.pairs))
        return self.scratch

    def _grow(self, staying: Mapping[int, Held]) -> None:
        """Give pages to those that need some, where their seats have room."""
        entries, firsts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for seat, request in staying.items():
            stored = request.settled()
            if request.reserved > stored.room:
                row, place, cells = stored.reserve(request.reserved, request.pages, self.page_cells)
                layer, head = np.divmod(row, self.heads)
                first = (layer * (self.size.seats + 1) + seat) * self._room
                entries.append(first + head * self.size.growing + place)
                firsts.append(cells)
        if sum(map(len, entries)):
            tables = [np.concatenate(entries), np.concatenate(firsts)]
            where, what = sent(tables, self.memory.device)
            self.table.view(-1).index_copy_(0, where.long(), what)

    @property
    def _room(self) -> int:
        """Entries of a seat in a layer's page table."""
        return self.heads * self.size.growing + self.size.coded

    def _enter(self, coming: Sequence[Held], staying: Mapping[int, Held], together: int) -> None:
        """Write requests into seats of nobody else in this step; make room first where needed."""
        for one in coming:
            if one.reserved > one.settled().room:
                one.settled().reserve(one.reserved, one.pages, self.page_cells)
        size = self._wanted(coming, together)
        if size != self.size:
            self._allocate(size)
            coming, staying = [*staying.values(), *coming], {}
        free = [seat for seat in range(size.seats) if seat not in staying]
        free.sort(
            key=lambda seat: self.seated[seat] is not None
        )  # requests that left keep their seats longest
        again = {id(one) for one in coming}
        self.seated = [None if id(one) in again else one for one in self.seated]
        for seat, one in zip(free, coming, strict=False):
            self._write(seat, one, self.planner.entries(one, size, together))

    def _wanted(self, coming: Sequence[Held], together: int) -> Size:
        """As large as these requests need besides those that are seated."""
        stored = [(one, one.settled()) for one in coming]
        return self.size.with_room(
            seats=together,
            growing=max(int(s.pages_for(reach(one)).max()) for one, s in stored),
            coded=max(int(s.coded_pages.sum(1).max()) for _, s in stored),
        )

    def _allocate(self, size: Size) -> None:
        """Tables of another size, all seats empty."""
        if self.captured:
            raise RuntimeError("a captured step's tables are too small for a request")
        self.size, device = size, self.memory.device
        self.seated = [None] * size.seats
        self.reach = [0] * size.seats  # of each seat: tokens after the prompt that its tiles cover
        self.scratch, self.together = None, []
        layers, seats, heads = self.layers, size.seats, self.heads
        # The kernel looks a few entries ahead, into a seat that nobody has.
        self.table = torch.zeros(layers, seats + 1, self._room, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(layers, KINDS, seats, heads, dtype=torch.int32, device=device)
        self.fp8_scales = torch.ones(layers, KINDS, seats, heads, 2, device=device)
        self.tiles = torch.as_tensor(EMPTY, device=device).repeat(
            layers, seats, self.planner.tiles_a_seat, 1
        )
        self.order = torch.full((seats,), -1, dtype=torch.int32, device=device)
        self.seating = Seating(
            self.order, heads, seats, self.planner.tiles_a_seat, self._room, size.growing
        )
        self.paged = [
            Paged(
                self.memory, self.table[n].view(-1), self.lengths[n].view(-1),
                self.fp8_scales[n].view(-1, 2), self.tiles[n].view(-1, FIELDS), pairs,
                self.head_dim, size.growing,
            )
            for n, pairs in enumerate(self.planner.pairs)
        ]  # fmt: skip

    def _write(self, seat: int, request: Held, entries: Entries) -> None:
        """Put a request into a seat, whatever it held before."""
        tiles, size = entries.tiles, self.size
        tiles[..., AT] += seat * self._room
        tiles[..., SLOT] += seat * self.planner.tiles_a_seat
        tiles[..., SEGMENT] += seat * self.heads
        growing, coded, lengths, records = sent(
            [entries.growing, entries.coded, entries.lengths, tiles], self.memory.device
        )
        first = self.heads * size.growing
        heads = self.table[:, seat, :first].view(self.layers, self.heads, -1)
        heads[..., : growing.shape[-1]] = growing
        self.table[:, seat, first : first + coded.shape[-1]] = coded
        self.lengths[:, :, seat], self.tiles[:, seat] = lengths, records
        self.fp8_scales[:, :, seat] = request.settled().fp8_scales
        self.seated[seat], self.reach[seat] = request, reach(request)

    def _order(self, seats: list[int]) -> None:
        """Write each row's seat into device memory; the rows behind them are empty."""
        if seats == self.together:
            return
        rows = max(len(seats), len(self.together))
        host = np.full(rows, -1)
        host[: len(seats)] = seats
        self.order[:rows].copy_(sent([host], self.memory.device)[0])
        self.together = seats
