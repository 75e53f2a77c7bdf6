"""One request's pages, carved from the memory blocks that a serving engine has given to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtune.runtime.cache.segments import Ints


class RequestPages:
    """Gives out pages of a request's own blocks; the request's end frees them all at once.

    A block holds pages of one size. Pages are never given back alone, so that as many blocks are
    opened as ``PlannedBlocks.blocks`` says, in whatever order pages are taken.

    Args:
        block_cells: cells of a block.
    """

    def __init__(self, block_cells: int) -> None:
        self.block_cells = block_cells
        self.blocks: list[int] = []
        self.opened = 0
        self._free: dict[int, Ints] = {}

    def add(self, blocks: Sequence[int]) -> None:
        """The engine has given the request more blocks."""
        self.blocks.extend(blocks)

    def take(self, count: int, page_cells: int) -> Ints:
        """First cells of ``count`` pages.

        Raises:
            RuntimeError: the engine has given fewer blocks than the plan counts.
        """
        free = self._free.get(page_cells, np.zeros(0, np.int64))
        a_block = self.block_cells // page_cells
        wanted = max(0, -(-(count - len(free)) // a_block))
        if self.opened + wanted > len(self.blocks):
            raise RuntimeError(
                f"{self.opened + wanted} blocks are needed, the engine has given {len(self.blocks)}"
            )
        opened = np.array(self.blocks[self.opened : self.opened + wanted], np.int64)
        self.opened += wanted
        inside = np.arange(a_block) * page_cells
        free = np.concatenate([free, (opened[:, None] * self.block_cells + inside).ravel()])
        self._free[page_cells] = free[count:]
        return free[:count]
