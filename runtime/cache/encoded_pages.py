"""Packed buffers of formats that have no page layout of their own, in the pool's pages.

A head's buffers lie one behind the other, those of wide numbers first, each from a whole word on;
what they take is their own bytes, whatever a plan has foreseen. They are read in place by a kernel
(``packed_parts``), or back at every step: the memory is then saved, the time is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvtune.policies.encoded_pages import EncodedPages
from kvtune.policies.format import Stored
from kvtune.runtime.cache.pool import Cells, PageMemory

WORD = 4  # bytes


@dataclass(frozen=True)
class Buffer:
    """One buffer of several tensors': whose it is, its name, and how its bytes are to be read."""

    number: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Laid:
    """Where the buffers of some tensors lie.

    Args:
        pages: first cells.
        tokens: of each tensor.
        size: bytes of all buffers.
        buffers: where each lies among these bytes.
    """

    layout: EncodedPages
    pages: Cells
    tokens: tuple[int, ...]
    size: int
    buffers: tuple[Buffer, ...]
    _cells: Tensor

    def read(self, pool: PageMemory) -> list[Stored]:
        """The tensors' buffers, out of the pool's memory as it is now."""
        laid = pool.memory.view(-1, self.layout.cell_bytes)[self._cells].flatten()
        buffers: list[dict[str, Tensor]] = [{} for _ in self.tokens]
        for each in self.buffers:
            own = laid[each.start : each.stop].view(each.dtype)
            buffers[each.number][each.name] = own.view(each.shape)
        return [Stored(*pair) for pair in zip(buffers, self.tokens, strict=True)]

    def buffers_of(self, number: int) -> dict[str, Buffer]:
        """One tensor's buffers, by name."""
        return {each.name: each for each in self.buffers if each.number == number}

    def give(self, pool: PageMemory) -> None:
        """Give the pages back."""
        pool.give(self.pages, self.layout.page_cells)


def lay(pool: PageMemory, head_dim: int, tensors: Sequence[Stored]) -> Laid:
    """Put the buffers of some tensors into pages.

    Raises:
        PoolFullError: the pool is full.
    """
    layout, device = EncodedPages(head_dim), pool.memory.device
    named = [
        (number, name, buffer)
        for number, tensor in enumerate(tensors)
        for name, buffer in tensor.buffers.items()
    ]
    named.sort(key=lambda each: -each[2].element_size())
    parts = [x.contiguous().flatten().view(torch.uint8) for _, _, x in named]
    size = sum(len(part) for part in parts)
    starts = [*accumulate((-(-len(part) // WORD) * WORD for part in parts), initial=0)][:-1]
    pages = pool.take(layout.pages_for(size), layout.page_cells)
    first = torch.as_tensor(pages, device=device)
    cells = (first[:, None] + torch.arange(layout.page_cells, device=device)).flatten()
    whole = torch.zeros(len(cells) * layout.cell_bytes, dtype=torch.uint8, device=device)
    for start, part in zip(starts, parts, strict=True):
        whole[start : start + len(part)] = part
    pool.memory.view(-1, layout.cell_bytes)[cells] = whole.view(-1, layout.cell_bytes)
    buffers = tuple(
        Buffer(number, name, x.dtype, tuple(x.shape), start, start + len(part))
        for (number, name, x), start, part in zip(named, starts, parts, strict=True)
    )
    return Laid(layout, pages, tuple(x.tokens for x in tensors), size, buffers, cells)
