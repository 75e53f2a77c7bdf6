"""Which program attends to what: ragged heads cut into tiles that take about equally long.

Runs on the host in numpy, once when a prompt is stored and again as pages are added; the tiles are
plain numbers in device memory, so that a captured graph goes on with new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtune.runtime.kernels.layout import CODES

Ints = NDArray[np.int64]

PROGRAMS = 132 * 8
"""Tiles wanted of a layer: several for each of an H100's 132 processors, to even out their ends."""

_SMALLEST_TILE = 2.0  # bf16 pages; below, starting a program takes longer than reading
_PAGE_COST = {16: 1.0, 9: 0.55, 8: 0.6, 4: 0.35, 2: 0.28}
"""Time of a page by its format, bf16 as 1: bytes, and the arithmetic of unpacking them."""


@dataclass(frozen=True)
class Segments:
    """Runs of pages of one format; a row (a sequence's KV head) has one or more. All ``[n]``.

    Args:
        row: whose it is.
        pair: ``PageLayout.code``.
        table_at: its first entry in the page table.
        pages: how many it has or may grow to while these tiles are used.
    """

    row: Ints
    pair: Ints
    table_at: Ints
    pages: Ints


@dataclass(frozen=True)
class Tiles:
    """What the attention kernel is launched over.

    Args:
        records: ``[n, 8]`` int32: row, pair, first table entry, tokens of the segment before it,
            pages, segment, slot, slots of the row before it * 65536 + all of them.
        pairs: the pairs that occur.
    """

    records: NDArray[np.int32]
    pairs: tuple[int, ...]


def page_costs(pair: Ints) -> NDArray[np.float64]:
    """Time of one page of each pair, in pages of bf16."""
    lookup = np.zeros(32)
    lookup[list(CODES.values())] = [_PAGE_COST[code] for code in CODES.values()]
    return (lookup[pair // 32] + lookup[pair % 32]) / 2


def plan_tiles(segments: Segments, programs: int = PROGRAMS) -> Tiles:
    """Cut segments into tiles, the longest first; empty segments get none unless a row's only.

    Args:
        segments: of one layer.
        programs: tiles wanted; there will be about as many, and one a segment at least.
    """
    cost = page_costs(segments.pair)
    target = max(float((cost * segments.pages).sum()) / programs, _SMALLEST_TILE)
    cuts = np.minimum(np.maximum(np.rint(cost * segments.pages / target), 1), segments.pages)
    cuts = np.maximum(cuts, 1).astype(np.int64)
    segment = np.repeat(np.arange(len(cuts)), cuts)
    turn = np.arange(len(segment)) - np.repeat(cuts.cumsum() - cuts, cuts)
    first = turn * segments.pages[segment] // cuts[segment]
    pages = (turn + 1) * segments.pages[segment] // cuts[segment] - first
    row = segments.row[segment]
    slot, before, count = _slots(row)
    records = np.stack(
        [
            row,
            segments.pair[segment],
            segments.table_at[segment] + first,
            first * 64,
            pages,
            segment,
            slot,
            before * 65536 + count,
        ],
        axis=1,
    )
    longest_first = np.argsort(-cost[segment] * pages, kind="stable")
    pairs = tuple(sorted({int(pair) for pair in segments.pair}, reverse=True))
    return Tiles(records[longest_first].astype(np.int32), pairs)


def _slots(row: Ints) -> tuple[Ints, Ints, Ints]:
    """A scratch slot a tile, a row's side by side; how many of its row come before, and all."""
    order = np.argsort(row, kind="stable")
    slot = np.empty_like(row)
    slot[order] = np.arange(len(row))
    counts = np.bincount(row)
    starts = counts.cumsum() - counts
    return slot, slot - starts[row], counts[row]
