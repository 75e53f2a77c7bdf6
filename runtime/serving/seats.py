"""Tables of the requests that generate, in device memory that stays where it is.

Every request has a seat: its own part of each layer's page table, lengths and tiles. Who comes is
written into a free seat, once for all layers; who goes leaves an empty one; nobody else's entries
are touched. A step of an engine thus costs the host the same whatever the requests hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.policies.pages import PAGE, PageLayout
from kvtune.policies.paging import pages_of
from kvtune.policies.policy import Policy
from kvtune.runtime.cache.backend import Backend, Growing
from kvtune.runtime.cache.segments import GROWN, Ints, runs
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.kernels.launch import Paged, Scratch
from kvtune.runtime.kernels.tiles import FIELDS, PROGRAMS, Segments, kind_of, plan_tiles
from kvtune.runtime.serving.held import KINDS, Held

_ROOM_TOKENS = 4 * PAGE
"""How far a request's tiles reach beyond its tokens before they are laid out anew."""

_LARGEST_TILE_TOKENS = 16 * PAGE
"""A long head is cut even where requests alone would keep the device busy: others may end."""

_EMPTY = np.array([-1, -1, *[0] * (FIELDS - 2)], np.int32)
_ROW, _AT, _SEGMENT, _SLOT, _COUNT = 0, 2, 5, 6, 7  # fields of a tile's record
_HEAD = FIELDS - 1  # one that kernels do not read


@dataclass(frozen=True)
class Size:
    """Of every seat, and how many there are.

    Args:
        seats: requests at once.
        growing: growing pages of a head.
        coded: pages of a layer in the prompt's formats.
        tiles: of a layer.
    """

    seats: int = 0
    growing: int = 0
    coded: int = 0
    tiles: int = 0

    def with_room(self, **wanted: int) -> Size:
        """At least so much of each, doubling what grows."""
        known = vars(self)
        grown = {
            name: known[name] if value <= known[name] else 1 << (value - 1).bit_length()
            for name, value in wanted.items()
        }
        return replace(self, **grown)


@dataclass(frozen=True)
class Entries:
    """One request's seat, as it is sent.

    Args:
        table: ``[L, room]`` first cells of pages: growing ones by head, then coded ones.
        lengths: ``[L, kinds, H]`` tokens.
        tiles: ``[L][n, 16]``.
    """

    table: Ints
    lengths: Ints
    tiles: list[NDArray[np.int32]]


class Seats:
    """The requests that generate together.

    Args:
        policy: for the model.
        head_dim: D.
        memory: the engine's, ``[bytes]`` uint8.
        backend: who works on pages.
    """

    def __init__(self, policy: Policy, head_dim: int, memory: Tensor, backend: Backend) -> None:
        self.head_dim, self.memory, self.backend = head_dim, memory, backend
        self.page_cells, grows = PageLayout(head_dim).page_cells, PageLayout(head_dim).code
        self.layers, self.heads = policy.layers, len(policy.heads[0])
        coded = [[pages_of(option, head_dim).code for option in row] for row in policy.heads]
        self.codes = np.stack([np.array(coded), np.full_like(coded, grows)])  # [kinds, L, H]
        self.pairs = [tuple(sorted({*row, grows}, reverse=True)) for row in coded]
        self.programs = sum(PROGRAMS[kind_of(pairs)] for pairs in self.pairs)
        self.size = Size()
        self.seated: list[Held | None] = []
        self.reach: list[int] = []  # of each seat: tokens after the prompt that its tiles cover
        self.together: list[Held] = []
        self.scratch: Scratch | None = None

    def seat(self, requests: Sequence[Held]) -> None:
        """Make these the requests that are attended to, in this order; each is to gain a token.

        Raises:
            RuntimeError: the engine has given a request fewer blocks than the plan counts.
        """
        at = {id(one): seat for seat, one in enumerate(self.seated) if one is not None}
        staying = {
            at[id(one)]: one
            for one in requests
            if id(one) in at and one.reserved <= self.reach[at[id(one)]]
        }
        self._grow(staying)
        coming = [one for one in requests if staying.get(at.get(id(one), -1)) is not one]
        if coming or len(requests) != len(self.together):
            self._leave([seat for seat in at.values() if seat not in staying])
            self._enter(coming, len(requests))
        if [*map(id, requests)] != [*map(id, self.together)] or coming:
            self._order(requests)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """One token a request, ``[n, H, D]``, in the order of the requests."""
        self.backend.append(self.paged[layer], self.growing, keys, values)

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """One query a query head over all that is held, ``[n * H, G, D]``; likewise."""
        if self.scratch is None:
            rows, tiles = self.size.seats * self.heads, self.size.seats * self.size.tiles
            self.scratch = Scratch(rows, tiles, q.shape[1], q.shape[2], q.device)
        return self.backend.attend(q, self.paged[layer], self.scratch, scale)

    def _grow(self, staying: Mapping[int, Held]) -> None:
        """Give pages to those that need some, where their seats have room."""
        entries, firsts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for seat, request in staying.items():
            stored = request.settled()
            if request.reserved > stored.room:
                row, place, cells = stored.reserve(request.reserved, request.pages, self.page_cells)
                layer, head = np.divmod(row, self.heads)
                entries.append(self._entry(layer, seat) + head * self.size.growing + place)
                firsts.append(cells)
        if sum(map(len, entries)):
            tables = [np.concatenate(entries), np.concatenate(firsts)]
            where, what = sent(tables, self.memory.device)
            self.table.view(-1).index_copy_(0, where.long(), what)

    def _entry(self, layer: Ints, seat: int) -> Ints:
        """Of a seat's first entry in the tables of some layers."""
        return (layer * (self.size.seats + 1) + seat) * self._room

    @property
    def _room(self) -> int:
        """Entries of a seat in a layer's page table."""
        return self.heads * self.size.growing + self.size.coded

    def _leave(self, seats: Sequence[int]) -> None:
        """Empty seats: their tiles attend to nothing."""
        for seat in seats:
            self.seated[seat] = None
            self.tiles[:, seat] = self.empty

    def _enter(self, coming: Sequence[Held], together: int) -> None:
        """Write requests into free seats; make room first where there is not enough."""
        for one in coming:
            if one.reserved > one.settled().room:
                one.settled().reserve(one.reserved, one.pages, self.page_cells)
        size = self._wanted(coming, together)
        entries = [self._entries(one, size, together) for one in coming]
        tiles = max((len(each) for one in entries for each in one.tiles), default=0)
        size = size.with_room(tiles=tiles)
        if size != self.size:
            staying = [one for one in self.seated if one is not None]
            self._allocate(size)
            entries = [self._entries(one, size, together) for one in staying] + entries
            coming = [*staying, *coming]
        free = [seat for seat, one in enumerate(self.seated) if one is None]
        for seat, one, each in zip(free, coming, entries, strict=False):
            self._write(seat, one, each)

    def _wanted(self, coming: Sequence[Held], together: int) -> Size:
        """As large as these requests need besides those that are seated."""
        stored = [(one, one.settled()) for one in coming]
        return self.size.with_room(
            seats=together,
            growing=max((int(s.pages_for(_reach(one)).max()) for one, s in stored), default=0),
            coded=max((int(s.coded_pages.sum(1).max()) for _, s in stored), default=0),
        )

    def _allocate(self, size: Size) -> None:
        """Tables of another size, all seats empty."""
        self.size, device = size, self.memory.device
        self.seated, self.reach = [None] * size.seats, [0] * size.seats
        self.scratch = None
        layers, seats, heads = self.layers, size.seats, self.heads
        # The kernel looks a few entries ahead, into a seat that nobody has.
        self.table = torch.zeros(layers, seats + 1, self._room, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(layers, KINDS, seats, heads, dtype=torch.int32, device=device)
        self.fp8_scales = torch.ones(layers, KINDS, seats, heads, 2, device=device)
        self.empty = torch.as_tensor(_EMPTY, device=device)
        self.tiles = self.empty.repeat(layers, seats, size.tiles, 1)
        self.paged = [
            Paged(
                self.memory, self.table[n].view(-1), self.lengths[n].view(-1),
                self.fp8_scales[n].view(-1, 2), self.tiles[n].view(-1, FIELDS), self.pairs[n],
                self.head_dim, size.growing,
            )
            for n in range(layers)
        ]  # fmt: skip

    def _entries(self, request: Held, size: Size, together: int) -> Entries:
        """What a request's seat holds, counted from the seat's own beginnings."""
        stored, growing, heads = request.settled(), size.growing, self.heads
        room = heads * growing + size.coded
        table = np.zeros((self.layers, room), np.int64)
        have = stored.cells.shape[-1]
        most = min(have, growing)
        table[:, : heads * growing].reshape(self.layers, heads, growing)[..., :most] = stored.cells[
            ..., :most
        ]
        counts = stored.coded_pages
        starts = (
            heads * growing + counts.cumsum(1) - counts + room * np.arange(self.layers)[:, None]
        )
        table.ravel()[runs(counts.ravel(), starts.ravel())] = stored.coded_cells
        lengths = np.stack([stored.coded_tokens, stored.exact + request.appended], 1)
        grows = room * np.arange(self.layers)[:, None] + growing * np.arange(heads)
        segments = Segments(
            row=np.tile(np.arange(self.layers * heads), KINDS),
            pair=self.codes.ravel(),
            table_at=np.concatenate([starts.ravel(), grows.ravel()]),
            pages=np.concatenate([counts.ravel(), stored.pages_for(_reach(request)).ravel()]),
            tokens=np.concatenate([stored.coded_tokens.ravel(), np.full(counts.size, -1)]),
        )
        return Entries(table, lengths, self._tiles(segments, table, together))

    def _tiles(self, segments: Segments, table: Ints, together: int) -> list[NDArray[np.int32]]:
        """Tiles of one request's layers, as of a layer whose only request it is."""
        some = segments.pages > 0
        kind = np.flatnonzero(some) // (self.layers * self.heads)
        held = Segments(*(each[some] for each in vars(segments).values()))
        programs = max(self.programs // together, int(held.most.sum()) // _LARGEST_TILE_TOKENS)
        records = plan_tiles(held, table.ravel(), programs).records
        layer, records[:, _HEAD] = np.divmod(records[:, _ROW], self.heads)
        records[:, _SEGMENT] = kind[records[:, _SEGMENT]]
        first_slot = np.bincount(layer, minlength=self.layers).cumsum()
        found = []
        for n in range(self.layers):
            mine = records[layer == n]
            mine[:, _AT] -= n * table.shape[1]
            mine[:, _SLOT] -= first_slot[n] - len(mine)
            found.append(mine)
        return found

    def _write(self, seat: int, request: Held, entries: Entries) -> None:
        """Put a request into an empty seat."""
        rows, size = self.size.seats * self.heads, self.size
        tiles = np.broadcast_to(_EMPTY, (self.layers, size.tiles, FIELDS)).copy()
        for n, mine in enumerate(entries.tiles):
            tiles[n, : len(mine)] = mine
            own = tiles[n, : len(mine)]
            own[:, _AT] += seat * self._room
            own[:, _SLOT] += seat * size.tiles
            own[:, _SEGMENT] = own[:, _SEGMENT] * rows + seat * self.heads + own[:, _HEAD]
        table, lengths, records = sent(
            [entries.table, entries.lengths, tiles.astype(np.int64)], self.memory.device
        )
        self.table[:, seat], self.lengths[:, :, seat], self.tiles[:, seat] = table, lengths, records
        self.fp8_scales[:, :, seat] = request.settled().fp8_scales
        self.seated[seat], self.reach[seat] = request, _reach(request)

    def _order(self, requests: Sequence[Held]) -> None:
        """Say which request of the step is whose."""
        self.together = list(requests)
        place = {id(one): at for at, one in enumerate(requests)}
        first = np.array([self.heads * place.get(id(one), 0) for one in self.seated])
        seats = [seat for seat, one in enumerate(self.seated) if one is not None]
        seats.sort(key=lambda seat: place[id(self.seated[seat])])
        heads, seat = np.arange(self.heads), np.array(seats, np.int64)[:, None]
        segments = GROWN * self.size.seats * self.heads + seat * self.heads + heads
        tables_at = seat * self._room + heads * self.size.growing
        host = [first, segments.ravel(), tables_at.ravel()]
        rows, *growing = sent(host, self.memory.device)
        self.growing = Growing(*growing)
        own = self.tiles[..., _HEAD] + rows[:, None]
        self.tiles[..., _ROW] = own.where(self.tiles[..., _COUNT] > 0, -1)


def _reach(request: Held) -> int:
    """Tokens after the prompt that a request's tiles are to cover."""
    return request.reserved + _ROOM_TOKENS
