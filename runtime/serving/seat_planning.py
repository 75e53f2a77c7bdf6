"""What one request's seat holds, worked out on the host: pages, lengths and tiles of all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kvtune.policies.page_formats import BF16_PAGE, PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.placement import pages_of
from kvtune.policies.policy import Policy
from kvtune.runtime.cache.segments import Ints, runs
from kvtune.runtime.kernels.tiles import FIELDS, PROGRAMS, Segments, kind_of, plan_tiles
from kvtune.runtime.serving.blocks import AHEAD_TOKENS, PlannedBlocks
from kvtune.runtime.serving.held import KINDS, Held, Stored

_ROOM_TOKENS = 4 * PAGE
"""How far a request's tiles reach beyond its tokens before they are laid out anew."""

_LARGEST_TILE_TOKENS = 16 * PAGE
"""A long head is cut even where requests alone would keep the device busy: others may end."""

EMPTY = np.array([-1, -1, *[0] * (FIELDS - 2)], np.int32)
"""The record of a tile that does nothing."""

AT, SEGMENT, SLOT = 2, 5, 6
"""Fields of a tile's record that are counted from its seat's beginnings."""

_ROW = 0
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


@dataclass(frozen=True)
class SeatPlanner:
    """Works out what requests' seats hold, for one policy.

    Args:
        codes: of the page formats of the prompt's and the growing pages, ``[kinds, L, H]``.
    """

    codes: Ints

    @staticmethod
    def of(policy: Policy, head_dim: int) -> SeatPlanner:
        """For a policy of a model whose heads have ``head_dim`` channels."""
        coded = [[pages_of(option, head_dim).code for option in row] for row in policy.heads]
        grows = PageLayout(head_dim).code
        return SeatPlanner(np.stack([np.array(coded), np.full_like(coded, grows)]))

    @property
    def layers(self) -> int:
        """How many layers are planned for, L."""
        return int(self.codes.shape[1])

    @property
    def heads(self) -> int:
        """H of a layer."""
        return int(self.codes.shape[2])

    @property
    def tiles_a_seat(self) -> int:
        """Tiles of a layer that a seat has room for."""
        return 8 * max(8, self.heads)

    @cached_property
    def pairs(self) -> list[tuple[int, ...]]:
        """The codes that occur in each layer, highest first."""
        layers = self.codes.swapaxes(0, 1)
        return [tuple(sorted(set(layer.ravel().tolist()), reverse=True)) for layer in layers]

    @cached_property
    def programs(self) -> int:
        """Programs that keep the device busy, of all layers together."""
        return sum(PROGRAMS[kind_of(pairs)] for pairs in self.pairs)

    def entries(self, request: Held, size: Size, together: int) -> Entries:
        """What a request's seat holds; its places are counted from the seat's own beginnings.

        Args:
            request: that takes the seat.
            size: of the tables.
            together: requests in the step, which share the device's programs.
        """
        stored, shape = request.settled(), (self.layers, self.heads)
        wanted = stored.pages_for(reach(request))
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
        tiles = self._tiles(stored, growing, wanted, size, together)
        return Entries(growing, coded, lengths, tiles)

    def _tiles(
        self, stored: Stored, growing: Ints, wanted: Ints, size: Size, together: int
    ) -> Ints:
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
            tables=np.concatenate([stored.tables.ravel(), np.zeros_like(stored.tables.ravel())]),
        )
        some = np.flatnonzero(segments.pages > 0)
        held = Segments(*(each[some] for each in vars(segments).values()))
        records = self._cut(held, listed, together)
        segment = some[records[:, SEGMENT]]
        kind, row = np.divmod(segment, counts.size)
        layer, head = np.divmod(row, self.heads)
        in_layer = (counts.cumsum(1) - counts).ravel() + self.heads * size.growing
        grows_at = np.tile(size.growing * np.arange(self.heads), self.layers)
        places = np.concatenate([in_layer, grows_at])
        a_layer = np.bincount(layer, minlength=self.layers)
        records[:, AT] += places[segment] - segments.table_at[segment]
        records[:, SLOT] -= (a_layer.cumsum() - a_layer)[layer]
        records[:, SEGMENT] = kind * size.seats * self.heads + head
        records[:, _HEAD] = head
        tiles = np.tile(EMPTY.astype(np.int64), (self.layers, self.tiles_a_seat, 1))
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


def reach(request: Held) -> int:
    """Tokens after the prompt that a request's tiles are to cover."""
    return request.reserved + _ROOM_TOKENS
