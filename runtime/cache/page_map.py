"""Which pages of a layer hold tokens, found again only when a page begins, ends or moves.

A step in plain torch takes the time of its operations, and most steps add a token to a page that is
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.kernels.launch import Paged


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
class _Tiles:
    """Tiles of one layout: those columns of ``kernels.tiles.Tiles`` that tell pages, ``[m]``."""

    layout: PageLayout
    row: Tensor
    entry: Tensor
    before: Tensor
    most: Tensor
    segment: Tensor
    place: Tensor
    tables: Tensor

    def tokens(self, lengths: Tensor) -> Tensor:
        """In each tile, ``[m]``."""
        return (lengths[self.segment].long() - self.before).clamp_min(0).minimum(self.most)

    def pages(self, table: Tensor, counts: Tensor) -> Pages:
        """The first so many pages of each tile."""
        size, device = self.layout.page_tokens, table.device
        tile = torch.repeat_interleave(counts)
        within = torch.arange(len(tile), device=device) - (counts.cumsum(0) - counts)[tile]
        first = table[self.entry[tile] + within].long()
        return Pages(
            layout=self.layout,
            rows=self.row[tile],
            cells=first[:, None] + torch.arange(self.layout.page_cells, device=device),
            segments=self.segment[tile],
            places=self.place[tile] + size * within,
            tiles=tile,
            before=size * within,
            tables=self.tables[tile],
        )


class PageMap:
    """What is known of one layer's pages, as long as its tables stay as they are."""

    def __init__(self, layer: Paged) -> None:
        self._state = layer.tiles.clone(), layer.table.clone()
        codes = layer.tiles[:, 1]
        known = codes[codes >= 0].unique().tolist()  # tiles of an empty seat have no layout
        self._tiles = [_tiles_of(layer, code) for code in known]
        self._found: list[tuple[Tensor, Pages] | None] = [None] * len(known)

    def is_of(self, layer: Paged) -> bool:
        """Whether the tables are still as they were; lengths may have changed."""
        tiles, table = self._state
        return torch.equal(tiles, layer.tiles) and torch.equal(table, layer.table)

    def pages(self, layer: Paged) -> list[tuple[Pages, Tensor]]:
        """Pages of each layout with the tokens in each, one at least, ``[n]``."""
        found = []
        for number, tiles in enumerate(self._tiles):
            size, tokens = tiles.layout.page_tokens, tiles.tokens(layer.lengths)
            counts = (tokens + (size - 1)) // size
            known = self._found[number]
            if known is None or not torch.equal(known[0], counts):
                known = self._found[number] = (counts, tiles.pages(layer.table, counts))
            pages = known[1]
            if len(pages.rows):
                found.append((pages, (tokens[pages.tiles] - pages.before).clamp_max(size)))
        return found


def pages_with_tokens(layer: Paged) -> list[tuple[Pages, Tensor]]:
    """All pages that hold tokens, those of one layout together, and the tokens in each."""
    known = layer.maps.get("pages")
    if known is None or not known.is_of(layer):
        known = layer.maps["pages"] = PageMap(layer)
    return known.pages(layer)


def _tiles_of(layer: Paged, code: int) -> _Tiles:
    tiles = layer.tiles[layer.tiles[:, 1] == code].long()
    row, _, entry, before, most, segment = tiles[:, :6].unbind(1)
    layout = PageLayout.of(layer.head_dim, code)
    return _Tiles(layout, row, entry, before, most, segment, tiles[:, 11], tiles[:, 12])
