"""Pages for tokens to come, taken between steps: a captured graph cannot ask for any."""

from __future__ import annotations

import numpy as np

from kvtune.policies.page_formats import BF16_PAGE, PAGE
from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.segments import CODED, GROWN, Ints, runs
from kvtune.runtime.cache.sending import sent


def reserve(layer: PagedLayer, tokens: int) -> None:
    """Give every row pages for so many more tokens. Changes tables in place, if they have room.

    Raises:
        PoolFullError: the pool is full.
    """
    ends = np.minimum(layer.lengths[GROWN] + tokens, layer.most)
    wanted = -(-np.where(layer.evicts_coded, layer.window, ends) // BF16_PAGE) * ~layer.ended
    if wanted.max() > layer.paged.growing_pages:
        layer.seal(2 * BF16_PAGE * int(wanted.max()))
    have = _pages_held(layer, GROWN)
    rows = np.flatnonzero(wanted > have)
    if len(rows):
        _add_pages(layer, GROWN, rows, (wanted - have)[rows], layer.growing_layout)
    if layer.evicts_coded.any():
        _reserve_coded(layer, tokens)


def _reserve_coded(layer: PagedLayer, tokens: int) -> None:
    """Give rows that evict from quantised pages more of these for the next tokens.

    New pages are filled with zeros, so that no row reads what another one left there.

    Raises:
        PoolFullError: the pool is full.
    """
    ends = np.minimum(layer.lengths[CODED] + tokens, layer.most)
    lacking = -(-ends // PAGE) - _pages_held(layer, CODED)
    more = np.where(layer.evicts_coded & ~layer.ended, lacking, 0).clip(0)
    for layout in dict.fromkeys(layer.layouts[row] for row in np.flatnonzero(more)):
        rows = np.array([row for row in np.flatnonzero(more) if layer.layouts[row] == layout])
        cells = _add_pages(layer, CODED, rows, more[rows], layout)
        every = cells[:, None] + np.arange(layout.page_cells)
        (fresh,) = sent([every.ravel()], layer.pool.memory.device)
        layer.pool.memory.view(-1, layout.cell_bytes).index_fill_(0, fresh.long(), 0)


def _add_pages(layer: PagedLayer, kind: int, rows: Ints, more: Ints, layout: PageLayout) -> Ints:
    """Take pages of one layout for some rows' segments of a kind, behind those that they have.

    Args:
        layer: whose.
        kind: of the segments.
        rows: some of the layer's.
        more: how many each of these takes, likewise.
        layout: of the pages.

    Returns:
        Their first cells, row by row.

    Raises:
        PoolFullError: the pool is full.
    """
    places = runs(more, layer.tables_at[kind, rows] + _pages_held(layer, kind)[rows])
    cells = layer.take(kind * layer.rows + rows, more, layout)
    layer.write_table(places, cells)
    return cells


def _pages_held(layer: PagedLayer, kind: int) -> Ints:
    """Pages of each row's segment of a kind."""
    return np.array([len(cells) for cells in layer.pages[kind]])
