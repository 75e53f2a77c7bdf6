"""Where a request's prompt is stored, and what is then known of it, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.pool import Cells
from kvtune.runtime.cache.segments import Ints
from kvtune.runtime.serving.pages import RequestPages


@dataclass(frozen=True)
class OwnPages:
    """The engine's cache memory, of which one request owns some blocks.

    Args:
        memory: all of it, ``[bytes]`` uint8.
        cell_bytes: what places are multiples of.
        pages: of the request.
    """

    memory: Tensor
    cell_bytes: int
    pages: RequestPages

    def take(self, count: int, page_cells: int) -> Cells:
        """First cells of so many pages in the request's own blocks."""
        return self.pages.take(count, page_cells)

    def give(self, pages: Cells, page_cells: int) -> None:
        """Not possible: the engine takes blocks back, and pages with them."""
        raise RuntimeError("a request's pages go back with its blocks")


@dataclass(frozen=True)
class LayerRows:
    """What one request holds of one layer.

    Args:
        pages: first cells of each head's pages, ``[kinds][H]``.
        lengths: tokens ``[kinds, H]``.
        exact: prompt tokens in growing pages ``[H]``.
        fp8_scales: ``[kinds, H, 2]``.
    """

    pages: list[list[Ints]]
    lengths: Ints
    exact: Ints
    fp8_scales: Tensor

    @classmethod
    def of(cls, layer: PagedLayer, count: int) -> list[LayerRows]:
        """The rows of each of the layers that lie side by side in this one."""
        heads = layer.rows // count
        scales = layer.fp8_scales.view(len(layer.pages), -1, 2)
        return [
            cls(
                [rows[first : first + heads] for rows in layer.pages],
                layer.lengths[:, first : first + heads],
                layer.exact[first : first + heads],
                scales[:, first : first + heads],
            )
            for first in range(0, layer.rows, heads)
        ]
