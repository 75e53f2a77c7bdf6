"""One layer of requests whose prompts are stored in pages of their own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvtune.policies.option import Option
from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.pool import Cells
from kvtune.runtime.cache.segments import Ints
from kvtune.runtime.serving.pages import RequestPages


@dataclass(frozen=True)
class Arena:
    """The engine's cache memory, of which requests own blocks.

    Args:
        memory: all of it, ``[bytes]`` uint8.
        cell_bytes: what places are multiples of.
    """

    memory: Tensor
    cell_bytes: int

    def take(self, count: int, page_cells: int) -> Cells:
        """Not possible: pages come from a request's own blocks."""
        raise RuntimeError("pages come from a request's own blocks")

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
    def of(cls, layer: ServedLayer, at: int) -> LayerRows:
        """The rows of a layer's ``at``-th request."""
        heads = len(layer.options)
        mine = slice(at * heads, (at + 1) * heads)
        scales = layer.fp8_scales.view(len(layer.pages), -1, 2)[:, mine]
        pages = [rows[mine] for rows in layer.pages]
        return cls(pages, layer.lengths[:, mine].copy(), layer.exact[mine].copy(), scales)


class ServedLayer(PagedLayer):
    """A paged layer whose rows take pages from the blocks of the request that they belong to.

    Args:
        number: the layer's.
        options: one a KV head.
        head_dim: D.
        owners: pages of each request.
        arena: where the blocks are.
        backend: who works on pages.
    """

    def __init__(
        self,
        number: int,
        options: Sequence[Option],
        head_dim: int,
        owners: Sequence[RequestPages],
        arena: Arena,
        backend: Backend,
    ) -> None:
        super().__init__(number, options, head_dim, len(owners), arena, backend)
        self.owners = owners

    def take(self, segments: Ints, counts: Ints, layout: PageLayout) -> Ints:
        """More pages at the ends of segments, each from its own request's blocks."""
        taken = [np.zeros(0, np.int64)]
        for segment, count in zip(segments, counts, strict=True):
            kind, row = divmod(int(segment), self.rows)
            cells = self.owners[row // len(self.options)].take(int(count), layout.page_cells)
            self.pages[kind][row] = np.concatenate([self.pages[kind][row], cells])
            taken.append(cells)
        return np.concatenate(taken)
