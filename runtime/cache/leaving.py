"""Pages that are given back: of entries that leave a row, and of sequences that have ended."""

from __future__ import annotations

from itertools import product

import numpy as np

from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.segments import CODED, GROWN, NOWHERE, SETTLED, Ints, Leaving


def leave(layer: PagedLayer, leaving: Leaving) -> None:
    """Let entries go, in place; pages that not even the next token needs are given back."""
    rows = leaving.rows
    layer.backend.move(layer.paged, layer.growing, leaving.moves)
    segments = layer.growing.segments[leaving.moves.rows]
    layer.paged.lengths.index_add_(0, segments, leaving.on_device, alpha=-1)
    layer.lengths[GROWN, rows] -= leaving.counts
    layer.evicted[rows] += leaving.counts
    _give_back(layer, GROWN, rows)


def shorten(layer: PagedLayer, rows: Ints, counts: Ints) -> None:
    """Note that entries have left rows that evict from fewer bits; give back empty pages."""
    layer.lengths[CODED, rows] -= counts
    layer.evicted[rows] += counts
    _give_back(layer, CODED, rows)


def _give_back(layer: PagedLayer, kind: int, rows: Ints) -> None:
    """Pages of some rows' segments behind the one that the next token takes."""
    for row, held in zip(rows, layer.lengths[kind, rows], strict=True):
        layout, cells = layer.layout(kind, row), layer.pages[kind][row]
        needed = layout.pages_for(held + 1)
        if needed < len(cells):
            layer.pool.give(cells[needed:], layout.page_cells)
            layer.pages[kind][row] = cells[:needed]


def free(layer: PagedLayer, sequence: int) -> None:
    """A sequence has ended: give back its pages. Its rows hold and read nothing from now on.

    Everything is changed in place, so that a captured graph goes on with the other sequences.
    Whoever evicts from the rows must have been told before (``CacheLayer.free``).
    """
    heads = len(layer.options)
    rows = range(sequence * heads, (sequence + 1) * heads)
    layer.ended[rows.start : rows.stop] = True
    _free_pages(layer, rows)
    if layer.beside is not None:
        layer.beside.free(rows)
    if layer.host is not None:
        layer.host.free(rows, layer.layouts)
    for each in layer.searched:
        each.free(rows)
    layer.searched = [each for each in layer.searched if len(each.rows)]
    for selection in layer.selections:
        selection.indexed.forget(rows)
    layer.lengths[:, rows.start : rows.stop] = 0
    layer.held_bytes[rows.start : rows.stop] = [0] * len(rows)
    layer.paged.lengths.view(3, -1)[:, rows.start : rows.stop] = 0
    layer.growing.segments[rows.start : rows.stop] = NOWHERE
    tiles = layer.paged.tiles
    theirs = (tiles[:, 0] >= rows.start) & (tiles[:, 0] < rows.stop)
    tiles[:, 8] = tiles[:, 8].where(~theirs, -1)  # to be looked up, and found to be none
    tiles[:, 9] = tiles[:, 9].where(~theirs, -1)


def _free_pages(layer: PagedLayer, rows: range) -> None:
    """Give back all pages of some rows, and those of the tables by which theirs are read."""
    for kind, row in product((CODED, GROWN, SETTLED), rows):
        if len(layer.pages[kind][row]):
            layer.pool.give(layer.pages[kind][row], layer.layout(kind, row).page_cells)
        layer.pages[kind][row] = np.zeros(0, np.int64)
    for row in rows:
        if layer.tables[row] != NOWHERE:
            tables = layer.layouts[row].tables
            layer.pool.give(layer.tables[row : row + 1], tables.page_cells)
    layer.tables[rows.start : rows.stop] = NOWHERE
