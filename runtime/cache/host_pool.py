"""Host memory for pages: pinned where there is a GPU, so that kernels read it over the bus.

A page keeps the layout that it has on the device. Its place is one number, the slab times a slab's
bytes and the offset in it; a slab holds pages of one size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.policies.host_pages import HOST_SLAB_BYTES

Places = NDArray[np.int64]


class HostPool:
    """Takes and gives pages of host memory, shared by all layers of a cache.

    Args:
        device: that works on the pages; memory is pinned for a GPU.
        slab_bytes: of a piece of memory.
    """

    def __init__(self, device: torch.device, slab_bytes: int = HOST_SLAB_BYTES) -> None:
        self.device, self.slab_bytes = device, slab_bytes
        self.slabs: list[Tensor] = []
        self._free: dict[int, Places] = {}
        self._pages_in_use: dict[int, int] = {}
        self._addresses = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use."""
        return sum(size * count for size, count in self._pages_in_use.items())

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory that the slabs take."""
        return self.slab_bytes * len(self.slabs)

    def take(self, count: int, page_bytes: int) -> Places:
        """Places of ``count`` pages, ascending within a slab; takes memory where it must."""
        free = self._free.get(page_bytes, np.zeros(0, np.int64))
        while len(free) < count:
            free = np.concatenate([free, self._open(page_bytes)])
        taken, self._free[page_bytes] = free[:count], free[count:]
        self._pages_in_use[page_bytes] = self._pages_in_use.get(page_bytes, 0) + count
        return taken

    def give(self, places: Places, page_bytes: int) -> None:
        """Take pages back, for others of their size."""
        self._free[page_bytes] = np.concatenate([self._free[page_bytes], places])
        self._pages_in_use[page_bytes] -= len(places)

    def runs(self, places: Places, page_bytes: int) -> Iterator[slice]:
        """Which of the places lie one behind the other in one slab, and are written in one copy."""
        if not len(places):
            return
        breaks = np.diff(places) != page_bytes
        breaks |= np.diff(places // self.slab_bytes) != 0
        ends = [*(np.flatnonzero(breaks) + 1).tolist(), len(places)]
        yield from (slice(a, b) for a, b in zip([0, *ends], ends, strict=False))

    def put(self, place: int, pages: Tensor) -> None:
        """Write pages that lie one behind the other, ``[bytes]`` uint8 on the device, at a place.

        Whoever reads them on the device's current stream afterwards finds them.
        """
        self.view(place, pages.numel()).copy_(pages, non_blocking=True)

    def view(self, place: int, count: int) -> Tensor:
        """So many bytes from a place on, ``[bytes]`` uint8; they must lie in one slab."""
        slab, offset = divmod(int(place), self.slab_bytes)
        return self.slabs[slab][offset : offset + count]

    @property
    def addresses(self) -> Tensor:
        """Where each slab begins, ``[slabs]`` int64, on the device: for kernels."""
        if len(self._addresses) != len(self.slabs):
            begins = [slab.data_ptr() for slab in self.slabs]
            self._addresses = torch.tensor(begins, dtype=torch.int64, device=self.device)
        return self._addresses

    def _open(self, page_bytes: int) -> Places:
        pinned = self.device.type == "cuda"
        slab = torch.empty(self.slab_bytes, dtype=torch.uint8, pin_memory=pinned)
        first = self.slab_bytes * len(self.slabs)
        self.slabs.append(slab)
        return first + page_bytes * np.arange(self.slab_bytes // page_bytes)
