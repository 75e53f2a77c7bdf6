"""Memory for pages of all sizes: what one sequence gives back, any other may take.

The pool is one tensor, counted in cells. It is cut into slabs; a slab holds pages of one size for
as long as any of them is in use, and is then free for another size.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.units import format_bytes
from kvtune.policies.slabs import SLAB_CELLS

Cells = NDArray[np.int64]


class PoolFullError(KvtuneError):
    """More pages were asked for than there is memory for; whoever owns the pool may extend it."""


class PageMemory(Protocol):
    """Where a layer's pages lie, and who gives them out."""

    @property
    def memory(self) -> Tensor:
        """The whole memory that pages lie in, ``[bytes]`` uint8."""

    def take(self, count: int, page_cells: int) -> Cells:
        """First cells of ``count`` pages."""

    def give(self, pages: Cells, page_cells: int) -> None:
        """Take pages back."""


class Pool:
    """Takes and gives pages; their contents are the caller's.

    Args:
        cells: how many at first, rounded up to slabs.
        cell_bytes: ``PageLayout.cell_bytes``.
        device: where the memory is.
    """

    def __init__(self, cells: int, cell_bytes: int, device: Any) -> None:
        self.cell_bytes = cell_bytes
        self.memory: Tensor = torch.empty(0, dtype=torch.uint8, device=device)
        self._free_slabs: list[int] = []
        self._free_pages: dict[int, Cells] = {}
        self._used = np.zeros(0, np.int64)  # pages in use, by slab
        self._pages_in_use: dict[int, int] = {}
        self.extend(cells)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use."""
        cells = sum(size * count for size, count in self._pages_in_use.items())
        return cells * self.cell_bytes

    def take(self, count: int, page_cells: int) -> Cells:
        """First cells of ``count`` pages.

        Raises:
            PoolFullError: there are not so many.
        """
        free = self._free_pages.get(page_cells, np.zeros(0, np.int64))
        a_slab = SLAB_CELLS // page_cells
        wanted = -(-(count - len(free)) // a_slab)
        if wanted > 0:
            free = np.concatenate([free, self._open(wanted, page_cells)])
        taken, self._free_pages[page_cells] = free[:count], free[count:]
        np.add.at(self._used, taken // SLAB_CELLS, 1)
        self._pages_in_use[page_cells] = self._pages_in_use.get(page_cells, 0) + count
        return taken

    def give(self, pages: Cells, page_cells: int) -> None:
        """Take pages back; slabs that are empty now may hold another size."""
        free = np.concatenate([self._free_pages[page_cells], pages])
        slabs = np.unique(pages // SLAB_CELLS)
        np.subtract.at(self._used, pages // SLAB_CELLS, 1)
        empty = slabs[self._used[slabs] == 0]
        self._free_slabs.extend(empty.tolist())
        self._free_pages[page_cells] = free[~np.isin(free // SLAB_CELLS, empty)]
        self._pages_in_use[page_cells] -= len(pages)

    def bytes_of(self, cells: int) -> int:
        """Bytes that so many cells take, whole slabs."""
        return -(-cells // SLAB_CELLS) * SLAB_CELLS * self.cell_bytes

    def extend(self, cells: int) -> None:
        """Make room for so many cells more; moves the memory, so no graph may have captured it."""
        slabs = -(-cells // SLAB_CELLS)
        first = len(self._used)
        more = self.memory.new_zeros(self.bytes_of(cells))
        self.memory = torch.cat([self.memory, more]) if first else more
        self._free_slabs.extend(range(first, first + slabs))
        self._used = np.append(self._used, np.zeros(slabs, np.int64))

    def check_integrity(self) -> None:
        """Raise AssertionError if a slab is counted wrongly."""
        for size, free in self._free_pages.items():
            slabs, counts = np.unique(free // SLAB_CELLS, return_counts=True)
            whole = SLAB_CELLS // size
            if not (self._used[slabs] + counts == whole).all() or len(set(free)) < len(free):
                raise AssertionError(f"pages of {size} cells are counted wrongly")
        if self._used[self._free_slabs].any():
            raise AssertionError("a free slab has pages in use")

    def _open(self, slabs: int, page_cells: int) -> Cells:
        if slabs > len(self._free_slabs):
            raise PoolFullError(
                f"the cache's pool of {format_bytes(self.memory.numel())} is full",
                hint="free a sequence, or make the cache for more tokens.",
            )
        opened = np.array([self._free_slabs.pop() for _ in range(slabs)], np.int64)
        inside = np.arange(SLAB_CELLS // page_cells) * page_cells
        pages: Cells = (opened[:, None] * SLAB_CELLS + inside).ravel()
        return pages
