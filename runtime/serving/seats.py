"""Tables of the requests that generate, in device memory that stays where it is.

Every request has a seat: its own part of each layer's page table, lengths and tiles. Who comes is
written into a free seat, once for all layers; nobody else's entries are touched. A step then only
says who sits where, so that its launches can be captured in a CUDA graph: the tables of a graph
must have room from the beginning for all who may come (``most_room``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.pages import BF16_PAGE, PAGE, PageLayout
from kvtune.policies.paging import pages_of
from kvtune.policies.policy import Policy
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.segments import Ints, runs
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.kernels.launch import Paged, Scratch, Seating
from kvtune.runtime.kernels.tiles import FIELDS, PROGRAMS, Segments, kind_of, plan_tiles
from kvtune.runtime.serving.blocks import AHEAD_TOKENS, PlannedBlocks
from kvtune.runtime.serving.held import KINDS, Held, Stored

_ROOM_TOKENS = 4 * PAGE
"""How far a request's tiles reach beyond its tokens before they are laid out anew."""

_LARGEST_TILE_TOKENS = 16 * PAGE
"""A long head is cut even where requests alone would keep the device busy: others may end."""

_EMPTY = np.array([-1, -1, *[0] * (FIELDS - 2)], np.int32)
_ROW, _AT, _SEGMENT, _SLOT = 0, 2, 5, 6  # fields of a tile's record
_HEAD = FIELDS - 1  # that of ``Seating``


@dataclass(frozen=True)
class Size:
    """Of every seat, and how many there are.

    Args:
        seats: requests at once.
        growing: growing pages of a head.
        coded: pages of a layer in the prompt's formats.
    """

    seats: int = 0
    growing: int = 0
    coded: int = 0

    def with_room(self, **wanted: int) -> Size:
        """At least so much of each, doubling what grows."""
        known = vars(self)
        grown = {
            name: known[name] if value <= known[name] else 1 << (value - 1).bit_length()
            for name, value in wanted.items()
        }
        return replace(self, **grown)


def most_room(planned: PlannedBlocks, requests: int, longest: int) -> Size:
    """Room for so many requests of any length up to ``longest`` tokens, answers included."""
    growing = -(-(longest + AHEAD_TOKENS + _ROOM_TOKENS) // BF16_PAGE)
    return Size(requests, growing, planned.most_coded_pages(longest))


@dataclass(frozen=True)
class Entries:
    """One request's seat, as it is sent.

    Args:
        growing: ``[L, H, n]`` first cells of growing pages.
        coded: ``[L, n]`` first cells of the others, head after head, zeros behind them.
        lengths: ``[L, kinds, H]`` tokens.
        tiles: ``[L, tiles, 16]``.
    """

    growing: Ints
    coded: Ints
    lengths: Ints
    tiles: Ints


class Seats:
    """The requests that generate together.

    Args:
        policy: for the model.
        head_dim: D.
        memory: the engine's, ``[bytes]`` uint8.
        backend: who works on pages.
        room: of the tables at first; they are replaced by larger ones where it does not do.
    """

    def __init__(
        self, policy: Policy, head_dim: int, memory: Tensor, backend: Backend, room: Size | None
    ) -> None:
        self.head_dim, self.memory, self.backend = head_dim, memory, backend
        self.page_cells, grows = PageLayout(head_dim).page_cells, PageLayout(head_dim).code
        self.layers, self.heads = policy.layers, len(policy.heads[0])
        coded = [[pages_of(option, head_dim).code for option in row] for row in policy.heads]
        self.codes = np.stack([np.array(coded), np.full_like(coded, grows)])  # [kinds, L, H]
        self.pairs = [tuple(sorted({*row, grows}, reverse=True)) for row in coded]
        self.programs = sum(PROGRAMS[kind_of(pairs)] for pairs in self.pairs)
        self.tiles_a_seat = 8 * max(8, self.heads)  # of a layer
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
        slots, rows = self.size.seats * self.tiles_a_seat, self.size.seats * self.heads
        group, device = query_heads // self.heads, self.memory.device
        self.scratch = Scratch(rows, slots, group, self.head_dim, device)
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
        free.sort(key=lambda seat: self.seated[seat] is not None)  # who left keeps a seat for long
        again = {id(one) for one in coming}
        self.seated = [None if id(one) in again else one for one in self.seated]
        for seat, one in zip(free, coming, strict=False):
            self._write(seat, one, self._entries(one, together))

    def _wanted(self, coming: Sequence[Held], together: int) -> Size:
        """As large as these requests need besides those that are seated."""
        stored = [(one, one.settled()) for one in coming]
        return self.size.with_room(
            seats=together,
            growing=max(int(s.pages_for(_reach(one)).max()) for one, s in stored),
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
        self.tiles = torch.as_tensor(_EMPTY, device=device).repeat(
            layers, seats, self.tiles_a_seat, 1
        )
        self.order = torch.full((seats,), -1, dtype=torch.int32, device=device)
        self.seating = Seating(
            self.order, heads, seats, self.tiles_a_seat, self._room, size.growing
        )
        self.paged = [
            Paged(
                self.memory, self.table[n].view(-1), self.lengths[n].view(-1),
                self.fp8_scales[n].view(-1, 2), self.tiles[n].view(-1, FIELDS), self.pairs[n],
                self.head_dim, size.growing,
            )
            for n in range(layers)
        ]  # fmt: skip

    def _entries(self, request: Held, together: int) -> Entries:
        """What a request's seat holds; its places are counted from the seat's own beginnings."""
        stored, shape = request.settled(), (self.layers, self.heads)
        wanted = stored.pages_for(_reach(request))
        growing = np.zeros((*shape, int(wanted.max())), np.int64)
        most = min(growing.shape[-1], stored.cells.shape[-1])
        growing[..., :most] = stored.cells[..., :most]
        counts = stored.coded_pages
        layer_pages = counts.sum(1)
        coded = np.zeros((self.layers, int(layer_pages.max())), np.int64)
        coded[np.repeat(np.arange(self.layers), layer_pages), runs(layer_pages)] = (
            stored.coded_cells
        )
        lengths = np.stack([stored.coded_tokens, stored.exact + request.appended], 1)
        tiles = self._tiles(stored, growing, wanted, together)
        return Entries(growing, coded, lengths, tiles)

    def _tiles(self, stored: Stored, growing: Ints, wanted: Ints, together: int) -> Ints:
        """Tiles of one request's layers, as of a layer whose only request it is."""
        counts, width = stored.coded_pages, growing.shape[-1]
        starts = counts.ravel().cumsum() - counts.ravel()
        grows = counts.sum() + width * np.arange(counts.size)
        listed = np.concatenate([stored.coded_cells, growing.ravel()])
        segments = Segments(
            row=np.tile(np.arange(counts.size), KINDS),
            pair=self.codes.ravel(),
            table_at=np.concatenate([starts, grows]),
            pages=np.concatenate([counts.ravel(), wanted.ravel()]),
            tokens=np.concatenate([stored.coded_tokens.ravel(), np.full(counts.size, -1)]),
        )
        some = np.flatnonzero(segments.pages > 0)
        held = Segments(*(each[some] for each in vars(segments).values()))
        records = self._cut(held, listed, together)
        segment = some[records[:, _SEGMENT]]
        kind, row = np.divmod(segment, counts.size)
        layer, head = np.divmod(row, self.heads)
        in_layer = (counts.cumsum(1) - counts).ravel() + self.heads * self.size.growing
        grows_at = np.tile(self.size.growing * np.arange(self.heads), self.layers)
        places = np.concatenate([in_layer, grows_at])
        a_layer = np.bincount(layer, minlength=self.layers)
        records[:, _AT] += places[segment] - segments.table_at[segment]
        records[:, _SLOT] -= (a_layer.cumsum() - a_layer)[layer]
        records[:, _SEGMENT] = kind * self.size.seats * self.heads + head
        records[:, _HEAD] = head
        tiles = np.tile(_EMPTY.astype(np.int64), (self.layers, self.tiles_a_seat, 1))
        by_layer = np.argsort(layer, kind="stable")
        tiles[layer[by_layer], runs(a_layer)] = records[by_layer]
        return tiles

    def _cut(self, held: Segments, listed: Ints, together: int) -> Ints:
        """Records of all layers' tiles; no layer has more than a seat has room for."""
        wanted = max(1, self.programs // together, int(held.most.sum()) // _LARGEST_TILE_TOKENS)
        while True:
            records = plan_tiles(held, listed, wanted).records.astype(np.int64)
            most = int(np.bincount(records[:, _ROW] // self.heads).max())
            if most <= self.tiles_a_seat:
                return records
            wanted = max(1, wanted * self.tiles_a_seat // (most + 1))

    def _write(self, seat: int, request: Held, entries: Entries) -> None:
        """Put a request into a seat, whatever it held before."""
        tiles, size = entries.tiles, self.size
        tiles[..., _AT] += seat * self._room
        tiles[..., _SLOT] += seat * self.tiles_a_seat
        tiles[..., _SEGMENT] += seat * self.heads
        growing, coded, lengths, records = sent(
            [entries.growing, entries.coded, entries.lengths, tiles], self.memory.device
        )
        first = self.heads * size.growing
        heads = self.table[:, seat, :first].view(self.layers, self.heads, -1)
        heads[..., : growing.shape[-1]] = growing
        self.table[:, seat, first : first + coded.shape[-1]] = coded
        self.lengths[:, :, seat], self.tiles[:, seat] = lengths, records
        self.fp8_scales[:, :, seat] = request.settled().fp8_scales
        self.seated[seat], self.reach[seat] = request, _reach(request)

    def _order(self, seats: list[int]) -> None:
        """Say in device memory who sits where; the rows behind them are nobody's."""
        if seats == self.together:
            return
        rows = max(len(seats), len(self.together))
        host = np.full(rows, -1)
        host[: len(seats)] = seats
        self.order[:rows].copy_(sent([host], self.memory.device)[0])
        self.together = seats


def _reach(request: Held) -> int:
    """Tokens after the prompt that a request's tiles are to cover."""
    return request.reserved + _ROOM_TOKENS
