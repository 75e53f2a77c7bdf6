"""Where a layer's segments lie in its page table, with room to grow, and the tiles over them.

Made on the host in numpy, when all prompts are stored and again when a segment outgrows its room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.segments import GROWN, NO_END, Ints, runs
from kvtune.runtime.cache.selecting import pages_read
from kvtune.runtime.kernels.launch import shape_for
from kvtune.runtime.kernels.tiles import TABLE_AHEAD, Segments, Tiles, plan_tiles

if TYPE_CHECKING:
    from kvtune.runtime.cache.paged_layer import PagedLayer


@dataclass(frozen=True)
class Tables:
    """The tables by which kernels find a layer's pages.

    Args:
        rooms: pages that each segment has or may grow to, ``[kinds, rows]``.
        cells: of all pages, segment by segment; zero where there is none yet.
        segments: by kind, and by row within a kind.
        tiles: over them.
    """

    rooms: Ints
    cells: Ints
    segments: Segments
    tiles: Tiles

    @property
    def starts(self) -> Ints:
        """Each segment's first entry in the page table, ``[kinds, rows]``."""
        return self.segments.table_at.reshape(self.rooms.shape)

    @property
    def places(self) -> Ints:
        """Each segment's first token where the tokens of all lie side by side, and their end."""
        return np.append(self.segments.places, self.segments.most.sum())


def tables_of(layer: PagedLayer, new_tokens: int) -> Tables:
    """Tables of a layer as it is, with room for so many tokens more in every row."""
    rooms = _rooms(layer, new_tokens)
    kinds, pages = len(rooms), rooms.ravel()
    starts = pages.cumsum() - pages
    cells = np.zeros(int(pages.sum()) + TABLE_AHEAD, np.int64)
    held = layer.page_counts(kinds).ravel()
    inside = runs(held) < np.repeat(pages, held)  # a reader's rows list fewer than they hold
    every = np.concatenate([pages for rows in layer.pages[:kinds] for pages in rows])
    cells[runs(held, starts)[inside]] = every[inside]
    tokens = np.where(_fixed(layer, kinds), layer.lengths[:kinds], -1).ravel()
    pairs = layer.codes[:kinds].ravel()
    row, tables = np.arange(layer.rows), np.maximum(layer.tables, 0)
    segments = Segments(np.tile(row, kinds), pairs, starts, pages, tokens, np.tile(tables, kinds))
    shape = shape_for(tuple(sorted(set(pairs.tolist()), reverse=True)), layer.head_dim)
    return Tables(rooms, cells, segments, plan_tiles(segments, cells, shape.programs))


def _fixed(layer: PagedLayer, kinds: int) -> NDArray[np.bool_]:
    """Segments whose length is known for good, ``[kinds, rows]``: prompts that nothing leaves or
    chooses from."""
    fixed = np.zeros((kinds, layer.rows), bool)
    fixed[0] = [row not in layer.readers for row in range(layer.rows)]
    fixed[0] &= ~layer.evicts_coded & ~layer.ended
    return fixed


def _rooms(layer: PagedLayer, new_tokens: int) -> Ints:
    """Pages that each segment has or may grow to, ``[kinds, rows]``."""
    growing = layer.lengths[GROWN]
    ends = np.where(layer.most < NO_END, layer.most, growing + new_tokens)
    coded, _, settled = layer.page_counts()
    for row, reader in layer.readers.items():
        layout = layer.layouts[row]
        coded[row] = pages_read(reader, layout.blocks_of(coded[row]), layout)
    for row in np.flatnonzero(layer.evicts_coded).tolist():
        coded[row] = layer.layouts[row].pages_for(layer.most[row])
        ends[row] = layer.window
    if layer.residual is None:
        return np.stack([coded, np.full(layer.rows, _growing_room(layer.growing_layout, ends))])
    settle = np.array([layout.settles for layout in layer.layouts]) & ~layer.evicts_coded
    open_ends = np.maximum(growing, layer.staying + layer.residual + PAGE) + PAGE
    ends = np.where(settle, np.minimum(ends, open_ends), ends)
    old = np.maximum(growing - layer.staying, 0)
    settled = (settled - (-(new_tokens + old) // PAGE)) * settle
    grown = np.full(layer.rows, _growing_room(layer.growing_layout, ends))
    return np.stack([coded, grown, settled])


def _growing_room(layout: PageLayout, ends: Ints) -> int:
    """Pages that any growing segment may have: of whole blocks, as pages are reserved ahead."""
    blocks = -(-int(ends.max()) // PAGE)
    return layout.pages_for(PAGE * blocks)
