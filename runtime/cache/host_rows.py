"""Rows of a layer whose prompt lies in host memory: what a step selects of it comes over.

A step chooses pages from an index on the device, a side stream copies them into the pool while the
main one attends to what lies on the device, and attention over what has come is joined to that by
its log-sum-exp. Nothing asks the host, so that a graph may capture it. Layers take turns at the
places where pages land. On a CPU the same code runs without a side stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.attention import merge
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.reader import BlockReader
from kvtune.runtime.cache.backend import AttentionSeen, Backend, Fetching
from kvtune.runtime.cache.host_pool import HostPool, Places
from kvtune.runtime.cache.pool import PageMemory
from kvtune.runtime.cache.segments import Ints
from kvtune.runtime.cache.selecting import Indexed
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.kernels.launch import Paged, Scratch, shape_for
from kvtune.runtime.kernels.tiles import TABLE_AHEAD, Segments, plan_tiles


@dataclass(frozen=True)
class EveryPage(BlockReader):
    """Reads every page: of heads on the host whose method reads all that it holds."""

    def index(self, keys: Tensor, counts: Tensor) -> Tensor:
        """Nothing but one place a page."""
        return keys[:, :: self.block, :0]

    def score(self, index: Tensor, queries: Tensor) -> Tensor:
        """All are worth the same."""
        return queries.new_zeros(len(index), queries.shape[2], index.shape[1])

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """Nothing is remembered."""
        return 0


class Landing:
    """Places on the device for pages that come over, shared by all layers of a cache."""

    def __init__(self, pool: PageMemory) -> None:
        self.pool = pool
        self._cells: dict[int, Ints] = {}

    def cells(self, count: int, block_cells: int) -> Ints:
        """First cells of so many blocks of pages; the same ones for every layer that asks.

        Raises:
            PoolFullError: the pool is full.
        """
        known = self._cells.get(block_cells, np.zeros(0, np.int64))
        if len(known) < count:
            known = np.concatenate([known, self.pool.take(count - len(known), block_cells)])
            self._cells[block_cells] = known
        return known[:count]


@dataclass(frozen=True)
class Arrival:
    """Rows that share a reader and a layout, and where what they select comes from and goes to.

    Args:
        indexed: the rows.
        at: the rows' numbers in the layer, ``[R]`` int64.
        first: number of the first of them among the layer's rows on the host.
        places: of each row's blocks on the host, ``[R, blocks]`` int64.
        cells: where they land, ``[R, k]`` int32.
        layout: of the pages.
    """

    indexed: Indexed
    at: Tensor
    first: int
    places: Tensor
    cells: Tensor
    layout: PageLayout

    def choose(self, q: Tensor) -> tuple[Fetching, Tensor]:
        """The blocks that the rows read at this step, and how many tokens those hold, ``[R]``.

        Of a row with fewer blocks than the others nothing comes to the last places.
        """
        blocks, tokens = self.indexed.choose(q[self.at], self.cells.shape[1])
        begins = PAGE * torch.arange(blocks.shape[1], device=blocks.device)
        places = self.places.gather(1, blocks).where(begins < tokens[:, None], -1)
        return Fetching(places.flatten(), self.cells.flatten(), self.layout), tokens


class HostRows:
    """What one layer has on the host, and attention over what comes over.

    Life: ``take`` while prompts are stored, ``seal`` with the layer; then ``begin`` and ``finish``
    around the attention over what lies on the device, once a step.

    Args:
        pool: of host memory, shared by all layers.
        landing: where pages land, shared likewise.
        backend: copies and attends.
    """

    def __init__(self, pool: HostPool, landing: Landing, backend: Backend) -> None:
        self.pool, self.landing, self.backend = pool, landing, backend
        self.blocks: dict[int, Places] = {}  # by row of the layer
        self.indexed: list[tuple[PageLayout, Indexed]] = []  # set before ``seal``
        self.arrivals: list[Arrival] = []
        self.stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
        self._paged: Paged | None = None

    @property
    def tiles(self) -> int:
        """Tiles of attention over what comes over."""
        return 0 if self._paged is None else len(self._paged.tiles)

    def take(self, row: int, count: int, layout: PageLayout) -> Places:
        """Host memory for a row's blocks."""
        self.blocks[row] = self.pool.take(count, layout.block_bytes)
        return self.blocks[row]

    def free(self, rows: range, layouts: Sequence[PageLayout]) -> None:
        """Give rows' pages back; they then read nothing."""
        for row in rows:
            if (blocks := self.blocks.pop(row, None)) is not None:
                self.pool.give(blocks, layouts[row].block_bytes)
        for arrival in self.arrivals:
            arrival.indexed.forget(rows)

    def seal(self, layouts: Sequence[PageLayout], fp8_scales: Tensor) -> None:
        """Lay out where pages land, and tiles over them. Again when the device's pool has moved.

        Args:
            layouts: of every row of the layer.
            fp8_scales: of every row's coded segment, ``[rows, 2]``.
        """
        rows = [row for _, each in self.indexed for row in each.rows]
        if not rows:
            return
        read = np.concatenate([self._most_read(each) for _, each in self.indexed])
        mine = [layouts[row] for row in rows]
        codes = np.array([layout.code for layout in mine])
        pages = read * np.array([layout.block_pages for layout in mine])
        landed, table = self._landed(mine, read)
        starts = pages.cumsum() - pages
        segments = Segments(np.arange(len(rows)), codes, starts, pages, np.full(len(rows), -1))
        shape = shape_for(tuple(sorted(set(codes.tolist()), reverse=True)), layouts[0].head_dim)
        tiles = plan_tiles(segments, table, shape.programs)
        none = np.zeros(len(rows), np.int64)
        tables: list[NDArray[np.integer]] = [table, none, tiles.records, landed]
        listed, lengths, records, cells = sent(tables, self.pool.device)
        self.at = torch.tensor(rows, device=self.pool.device)
        self._paged = Paged(
            self.landing.pool.memory, listed, lengths, fp8_scales[self.at], records, tiles.pairs,
            layouts[0].head_dim,
        )  # fmt: skip
        self.arrivals, first, at = [], 0, 0
        for layout, each in self.indexed:
            end = at + int(read[first : first + len(each.rows)].sum())
            theirs = cells[at:end].view(len(each.rows), -1)
            self.arrivals.append(self._arrival(each, layout, first, theirs))
            first, at = first + len(each.rows), end
        _ = self.pool.addresses  # made now: a captured graph could not

    def begin(self, q: Tensor) -> None:
        """Choose pages and bring them over, beside whatever the device does next.

        Args:
            q: ``[rows of the layer, G, D]``; must be kept until ``finish``.
        """
        paged = self._sealed
        with self._aside():
            for arrival in self.arrivals:
                fetching, tokens = arrival.choose(q)
                mine = slice(arrival.first, arrival.first + len(tokens))
                paged.lengths[mine].copy_(tokens)
                self.backend.fetch(paged.pool, self.pool, fetching)

    def finish(
        self, q: Tensor, near: tuple[Tensor, Tensor], scratch: Scratch, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention over the device's part and over what came, as output and log-sum-exp.

        Args:
            q: as ``begin`` was given it.
            near: output ``[rows, G, D]`` and log-sum-exp ``[rows, G]`` over the device's part.
            scratch: free again.
            scale: multiplies the logits.
        """
        if self.stream is not None:
            torch.cuda.current_stream(self.pool.device).wait_stream(self.stream)
        asking = q[self.at]
        lse = asking.new_empty(asking.shape[:2], dtype=torch.float32)
        far = (
            self.backend.attend(asking, self._sealed, scratch, scale, AttentionSeen(lse)).float(),
            lse,
        )
        # A row whose sequence has ended reads nothing anywhere, and no share may become NaN.
        least = torch.finfo(near[1].dtype).min
        own = near[0][self.at].float(), near[1][self.at].clamp_min(least)
        output = near[0].index_copy(0, self.at, merge(own, far).to(near[0].dtype))
        return output, near[1].index_copy(0, self.at, torch.logaddexp(own[1], lse))

    @property
    def _sealed(self) -> Paged:
        if self._paged is None:
            raise RuntimeError("the layer has no prompt yet: store and seal it first")
        return self._paged

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the side stream, behind all that the device was given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.pool.device))
        with torch.cuda.stream(self.stream):
            yield

    def _most_read(self, indexed: Indexed) -> Ints:
        """Blocks that each of its rows reads at most, ``[R]``: as many of every one."""
        longest = max(1, *(len(self.blocks.get(row, ())) for row in indexed.rows))
        return np.full(len(indexed.rows), min(indexed.reader.blocks, longest))

    def _landed(self, layouts: Sequence[PageLayout], read: Ints) -> tuple[Ints, Ints]:
        """First cells of where all rows' blocks land, row by row, and the table of their pages.

        Raises:
            PoolFullError: the pool is full.
        """
        landed = np.zeros(int(read.sum()), np.int64)
        size = np.repeat([layout.block_cells for layout in layouts], read)
        for each in np.unique(size):
            mine = np.flatnonzero(size == each)
            landed[mine] = self.landing.cells(len(mine), int(each))
        ends = read.cumsum()
        pages = [
            landed[end - count : end, None] + layout.page_cells * np.arange(layout.block_pages)
            for layout, count, end in zip(layouts, read, ends, strict=True)
        ]
        ahead = np.zeros(TABLE_AHEAD, np.int64)
        return landed, np.concatenate([*(each.ravel() for each in pages), ahead])

    def _arrival(self, indexed: Indexed, layout: PageLayout, first: int, cells: Tensor) -> Arrival:
        device = self.pool.device
        none = np.zeros(1, np.int64)  # of a row that was given back
        blocks = [torch.from_numpy(self.blocks.get(row, none)) for row in indexed.rows]
        places = pad_sequence(blocks, batch_first=True).to(device)
        return Arrival(
            indexed, torch.tensor(indexed.rows, device=device), first, places, cells, layout
        )
