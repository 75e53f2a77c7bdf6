"""Which pages of a layer hold tokens, found again only when a page begins, ends or moves.

A step in plain torch takes the time of its operations, and most steps add a token to a page that is
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.kernels.launch import Paged

_PADDING = 2**40  # beyond any tile's tokens


@dataclass(frozen=True)
class Pages:
    """Pages of one layout that hold tokens, n of them.

    Args:
        layout: how each lies.
        rows: whose, ``[n]``.
        cells: of the pool, ``[n, cells of a page]``.
        segments: that they belong to, ``[n]``.
        places: of their first tokens where logits are wanted, ``[n]``.
        tiles: that they are part of, ``[n]``.
        before: tokens of their tile in earlier pages, ``[n]``.
        tables: first cells of the tables that they are read by, ``[n]``.
    """

    layout: PageLayout
    rows: Tensor
    cells: Tensor
    segments: Tensor
    places: Tensor
    tiles: Tensor
    before: Tensor
    tables: Tensor


@dataclass(frozen=True)
class Rows:
    """Rows whose pages have room for about as many tokens, r of them, padded to the most, w.

    Args:
        rows: which, ascending, ``[r]``.
        tokens: of all that the layer's pages have room for, page after page, ``[r, w]``.
        tiles: that each is part of, ``[r, w]``.
        inside: its place in that tile, ``[r, w]``; of padding beyond any tile's tokens.
        columns: its place where logits are wanted, ``[r, w]``.
    """

    rows: Tensor
    tokens: Tensor
    tiles: Tensor
    inside: Tensor
    columns: Tensor

    @property
    def real(self) -> Tensor:
        """What is no padding, ``[r, w]`` bool."""
        return self.inside < _PADDING


@dataclass(frozen=True)
class Found:
    """A layer's pages that hold tokens, those of one layout together, and its rows over them."""

    pages: Sequence[Pages]
    rows: Sequence[Rows]


class PageMap:
    """What is known of one layer's pages, as long as its tables stay as they are."""

    def __init__(self, layer: Paged) -> None:
        self._state = layer.tiles.clone(), layer.table.clone()
        records = layer.tiles[layer.tiles[:, 1] >= 0].long()  # those of an empty seat have none
        records = records[records[:, 1].argsort(stable=True)]  # by layout
        self._row, codes, self._entry, self._before, self._most, self._segment = records[
            :, :6
        ].unbind(1)
        self._place, self._tables = records[:, 11], records[:, 12]
        known, counts = codes.unique_consecutive(return_counts=True)
        self._layouts = [PageLayout.of(layer.head_dim, code) for code in known.tolist()]
        self._counts = counts.tolist()
        sizes = [layout.page_tokens for layout in self._layouts]
        self._size = torch.tensor(sizes, dtype=torch.long, device=counts.device)
        self._size = self._size.repeat_interleave(counts)
        self._found: tuple[Tensor, Found] | None = None

    def is_of(self, layer: Paged) -> bool:
        """Whether the tables are still as they were; lengths may have changed."""
        tiles, table = self._state
        return torch.equal(tiles, layer.tiles) and torch.equal(table, layer.table)

    def at(self, layer: Paged) -> tuple[Found, Tensor]:
        """Pages and rows, and the tokens of each tile now, ``[m]``."""
        tokens = (
            (layer.lengths.index_select(0, self._segment) - self._before)
            .clamp_min(0)
            .minimum(self._most)
        )
        counts = (tokens + (self._size - 1)) // self._size
        if self._found is None or not torch.equal(self._found[0], counts):
            pages = [each for each in self._pages(layer.table, counts) if len(each.rows)]
            self._found = counts, Found(pages, list(_rows(pages)))
        return self._found[1], tokens

    def _pages(self, table: Tensor, counts: Tensor) -> Iterator[Pages]:
        """The first so many pages of each tile, a layout at a time."""
        tiles = torch.repeat_interleave(counts)
        nth = torch.arange(len(tiles), device=table.device) - (counts.cumsum(0) - counts)[tiles]
        ends = [int(part.sum()) for part in counts.split(self._counts)]
        parts = zip(self._layouts, tiles.split(ends), nth.split(ends), strict=True)
        for layout, tile, within in parts:
            cells = table[self._entry[tile] + within].long()
            inside = torch.arange(layout.page_cells, device=table.device)
            before = layout.page_tokens * within
            yield Pages(
                layout=layout,
                rows=self._row[tile],
                cells=cells[:, None] + inside,
                segments=self._segment[tile],
                places=self._place[tile] + before,
                tiles=tile,
                before=before,
                tables=self._tables[tile],
            )


def _rows(pages: Sequence[Pages]) -> Iterator[Rows]:
    """Rows with about as much room together: none is padded to twice its own."""
    if not pages:
        return
    row, tile, inside, column = (
        torch.cat(parts) for parts in zip(*map(_tokens, pages), strict=True)
    )
    room = row.bincount()
    order, starts = row.argsort(stable=True), room.cumsum(0) - room
    width_class = room.clamp_min(1).double().log2().ceil()
    for each in width_class[room > 0].unique():
        rows = torch.nonzero((room > 0) & (width_class == each))[:, 0]
        slots = torch.arange(int(room[rows].max()), device=row.device)
        at = order[(starts[rows, None] + slots).clamp_max(len(order) - 1)]
        real = slots < room[rows, None]
        yield Rows(
            rows=rows,
            tokens=at,
            tiles=tile[at],
            inside=inside[at].masked_fill(~real, _PADDING),
            columns=column[at],
        )


def _tokens(pages: Pages) -> tuple[Tensor, ...]:
    """Row, tile, place in the tile and place of logits of each token, page after page."""
    size = pages.layout.page_tokens
    places = torch.arange(size, device=pages.rows.device)
    return (
        pages.rows.repeat_interleave(size),
        pages.tiles.repeat_interleave(size),
        (pages.before[:, None] + places).flatten(),
        (pages.places[:, None] + places).flatten(),
    )


def pages_at(layer: Paged) -> tuple[Found, Tensor]:
    """All pages that hold tokens, the rows over them, and the tokens of each tile."""
    known = layer.maps.get("pages")
    if known is None or not known.is_of(layer):
        known = layer.maps["pages"] = PageMap(layer)
    found: tuple[Found, Tensor] = known.at(layer)
    return found
