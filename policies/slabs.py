"""What the paged runtime's allocator hands out: shares of slabs, each of pages of one size."""

from __future__ import annotations

from collections import Counter

from kvtune.policies.encoded_pages import EncodedPages
from kvtune.policies.pages import PageLayout, PageTables

SLAB_CELLS = 576
"""36 pages of bf16, 32 of int4: a size of which every format wastes less than 3 %."""

Pages = Counter[PageLayout | PageTables | EncodedPages]
"""How many of each; tables of a head's pages count as one."""

CodedPages = Counter[PageLayout]
"""The same of those that may lie on the host, which have no tables."""


def pool_cells(pages: Pages) -> int:
    """Cells of a pool that holds so many pages; a slab holds pages of one size."""
    by_size = Counter[int]()
    for layout, count in pages.items():
        by_size[layout.page_cells] += count
    slabs = sum(-(-count // (SLAB_CELLS // size)) for size, count in by_size.items())
    return SLAB_CELLS * slabs


def share_of_slab(layout: PageLayout | PageTables | EncodedPages) -> float:
    """Bytes of a pool for each page of this size."""
    return SLAB_CELLS * layout.cell_bytes / (SLAB_CELLS // layout.page_cells)


def growing_bytes(tokens: int, head_dim: int) -> float:
    """Bytes of the 16-bit pages that so many tokens of one head take."""
    layout = PageLayout(head_dim)
    return layout.pages_for(tokens) * share_of_slab(layout)


def pool_bytes(pages: CodedPages) -> int:
    """Bytes of a pool's slabs that pages take their shares of."""
    return round(sum(count * share_of_slab(layout) for layout, count in pages.items()))
