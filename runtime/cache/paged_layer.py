"""One layer's cache in pages: each (sequence, KV head) with its own length and format.

Life of a layer: ``store_prompts`` once for each row, ``seal`` once, then ``append`` and ``attend``
for every new token; between steps ``reserving.py`` takes pages and ``leaving.py`` gives them back.
A row is a (sequence, KV head); it has segments: what its option made of the prompt, and a growing
one in 16 bits with the prompt's exact tokens and new ones; with a residual window also a settled
one, of new tokens that became old and took the option's format. Entries leave a growing segment
alone, and its last ones take their places: attention knows no order. Rows that evict from fewer
bits (``coded_evicting``) also let entries leave the first one, which then grows too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.option import Option
from kvtune.policies.pages import PageLayout
from kvtune.policies.placement import chooses_entries, pages_of
from kvtune.policies.reader import BlockReader
from kvtune.runtime.cache.backend import AttentionSeen, Backend, Growing
from kvtune.runtime.cache.beside import Beside, joined
from kvtune.runtime.cache.entry_rows import EntryRows
from kvtune.runtime.cache.host_rows import HostRows
from kvtune.runtime.cache.pool import PageMemory
from kvtune.runtime.cache.sealing import tables_of
from kvtune.runtime.cache.segments import (
    CODED,
    GROWN,
    NO_END,
    NOWHERE,
    SETTLED,
    Ints,
)
from kvtune.runtime.cache.selecting import Indexed, Selection
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.cache.sliding import Ring
from kvtune.runtime.kernels.launch import Paged, Scratch
from kvtune.runtime.rotation import Rotation


class PagedLayer:
    """The pages of one layer, and the tables by which kernels find them.

    Args:
        number: the layer's, for messages.
        options: one a KV head.
        head_dim: D.
        batch: sequences.
        pool: where pages come from; shared by all layers.
        backend: who works on them.
        residual: newest tokens that stay in 16 bits where older ones settle; None if all stay.
        window: tokens in 16 bits, at most, of rows that evict from fewer bits.
    """

    def __init__(
        self,
        number: int,
        options: Sequence[Option],
        head_dim: int,
        batch: int,
        pool: PageMemory,
        backend: Backend,
        residual: int | None = None,
        window: int = 0,
    ) -> None:
        self.number, self.options, self.head_dim = number, options, head_dim
        self.pool, self.backend, self.residual = pool, backend, residual
        self.window = window
        self.layouts = [pages_of(option, head_dim) for option in options] * batch
        here = [option.on_host and not chooses_entries(option) for option in options]
        self.on_host = np.array(here * batch)  # rows whose pages lie there
        self.growing_layout = PageLayout(head_dim)
        self.pages: list[list[Ints]] = [
            [np.zeros(0, np.int64) for _ in self.layouts] for _ in (CODED, GROWN, SETTLED)
        ]
        self.codes = np.array(
            [[self.layout(k, n).code for n in range(self.rows)] for k in range(3)]
        )
        self.tables = np.full(len(self.layouts), NOWHERE)  # first cells, where pages have some
        self.lengths = np.zeros((3, len(self.layouts)), np.int64)
        self.exact = np.zeros(len(self.layouts), np.int64)  # first tokens of a growing segment
        self.staying = np.zeros(len(self.layouts), np.int64)  # of these, which never settle
        self.kept: list[int] = [0] * len(self.layouts)
        self.held_bytes: list[int] = [0] * len(self.layouts)  # as formats count them
        self.most = np.full(len(self.layouts), NO_END)  # entries of a growing segment, at any time
        self.evicted = np.zeros(len(self.layouts), np.int64)
        self.evicts_coded = np.zeros(len(self.layouts), bool)  # set before prompts are stored
        self.ended = np.zeros(len(self.layouts), bool)  # rows of sequences that were freed
        self.ring: Ring | None = None  # of a sliding layer; set before ``seal``
        self.beside: Beside | None = None  # what pages cannot hold
        self.searched: list[EntryRows] = []  # rows whose readers choose no pages
        self.host: HostRows | None = None  # what lies on the host; set before prompts are stored
        self.readers: dict[
            int, BlockReader
        ] = {}  # of rows that do not read all; set before ``seal``
        self.indexed: list[Indexed] = []  # likewise
        self.selections: list[Selection] = []
        device = pool.memory.device
        # Whether the prompts' keys and values are, row by row.
        self.finite = torch.ones(len(self.layouts), dtype=torch.bool, device=device)
        self.fp8_scales = torch.ones(3 * len(self.layouts), 2, device=device)
        self._paged: Paged | None = None

    @property
    def rows(self) -> int:
        """Sequences times KV heads."""
        return len(self.layouts)

    def layout(self, kind: int, row: int) -> PageLayout:
        """Of a segment's pages."""
        return self.growing_layout if kind == GROWN else self.layouts[row]

    def take(self, segments: Ints, counts: Ints, layout: PageLayout) -> Ints:
        """More pages at the ends of segments of one layout; their cells, segment by segment.

        Raises:
            PoolFullError: the pool is full.
        """
        cells = self.pool.take(int(counts.sum()), layout.page_cells)
        ends = counts.cumsum()
        for segment, start, end in zip(segments, ends - counts, ends, strict=True):
            kind, row = divmod(segment, self.rows)
            self.pages[kind][row] = np.concatenate([self.pages[kind][row], cells[start:end]])
        return cells

    def page_counts(self, kinds: int = 3) -> Ints:
        """Pages that segments of the first kinds have, ``[kinds, rows]``."""
        return np.array([[len(cells) for cells in rows] for rows in self.pages[:kinds]])

    def seal(self, new_tokens: int) -> None:
        """Lay out tables and tiles with room for so many tokens a row. Again to make more room."""
        made = tables_of(self, new_tokens)
        self.rooms, self.tables_at, self.places = made.rooms, made.starts, made.places
        segments = np.where(self.ended, NOWHERE, GROWN * self.rows + np.arange(self.rows))
        ring = self.ring.tables() if self.ring else ()
        host = [
            made.cells, self.lengths.ravel(), made.tiles.records, made.segments.table_at,
            made.segments.places, segments, self.tables_at[GROWN], *ring,
        ]  # fmt: skip
        pages_at, lengths, records, *others = sent(host, self.pool.memory.device)
        self._entries, self.columns, *growing = others
        self.growing = Growing(*growing)
        self._keep_counted(lengths)
        self._paged = Paged(
            self.pool.memory, pages_at, lengths, self.fp8_scales, records, made.tiles.pairs,
            self.head_dim, int(self.rooms[GROWN].max()),
        )  # fmt: skip
        if self.indexed:
            self._select_again()
        if self.host is not None:
            self.host.seal(self.layouts, self.fp8_scales[: self.rows])

    def _keep_counted(self, lengths: Tensor) -> None:
        """Put into new lengths what only the device has counted."""
        if self._paged is not None and self.evicts_coded.any():
            rows = np.flatnonzero(self.evicts_coded)
            at = torch.as_tensor(np.r_[CODED * self.rows + rows, GROWN * self.rows + rows])
            at = at.to(lengths.device)
            lengths[at] = self._paged.lengths[at]

    def entries_of(self, kind: int, rows: Tensor) -> Tensor:
        """First entries in the page table of some rows' segments of a kind, int32 like ``rows``."""
        return self._entries[kind * self.rows + rows]

    def _select_again(self) -> None:
        """Point selections at the tables as they are now."""
        device = self.pool.memory.device
        cells = [torch.as_tensor(x.astype(np.int32), device=device) for x in self.pages[CODED]]
        starts = self.tables_at[CODED].tolist()
        alive = [each.among(~self.ended) for each in self.indexed]
        parts = [part for each in alive for part in each.by_page(self.layouts)]
        self.selections = [
            Selection.of(part, cells, starts, self.layouts[part.rows[0]]) for part in parts
        ]

    def write_table(self, at: Ints, cells: Ints) -> None:
        """Set entries of the page table, in place."""
        where, what = sent([at, cells], self.pool.memory.device)
        self.paged.table.index_copy_(0, where.long(), what)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add one token a sequence, ``[B, H, D]``, but to those that have ended.

        Its page must have been reserved.
        """
        self.backend.append(self.paged, self.growing, keys, values)

    def append_rotated(self, rotation: Rotation, values: Tensor) -> Tensor:
        """Rotate queries and keys of one token a sequence, append keys and values, and return the
        rotated queries, ``[B, Hq, 1, D]``."""
        return self.backend.append_rotated(self.paged, self.growing, rotation, values)

    def count_appended(self, tokens: int = 1) -> None:
        """Note on the host that the device has appended; a captured graph cannot."""
        if self.ring is None:
            self.lengths[GROWN] += tokens * (~self.evicts_coded & ~self.ended)
            self.lengths[CODED] += tokens * (self.evicts_coded & ~self.ended)
        else:
            self.lengths[GROWN] = self.ring.after(self.lengths[GROWN], tokens) * ~self.ended
            self.ring.entered += tokens

    def attend(self, q: Tensor, scratch: Scratch, scale: float) -> Tensor:
        """Attention of one query a query head, ``[rows, G, D]``, over all that is kept."""
        if self.host is not None:
            self.host.begin(q)
        for selection in self.selections:
            selection.select(q, self.paged.table, self.paged.lengths)
        if self.beside is None and self.host is None and not self.searched:
            return self.backend.attend(q, self.paged, scratch, scale)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        output = self.backend.attend(q, self.paged, scratch, scale, AttentionSeen(lse))
        if self.host is not None:
            output, lse = self.host.finish(q, (output, lse), scratch, scale)
        return self.with_beside(q, output, lse, scale)

    def with_beside(self, q: Tensor, output: Tensor, lse: Tensor, scale: float) -> Tensor:
        """Attention over pages, joined to that over what lies beside them."""
        if self.searched:
            found = [each.attend(q, scale) for each in self.searched]
            wide, lse = joined(found, output, lse)
            output = wide.to(q.dtype)
        return output if self.beside is None else self.beside.merged(q, output, lse, scale)

    @property
    def paged(self) -> Paged:
        """The tables; the pool's memory as it is now.

        Raises:
            RuntimeError: not sealed yet.
        """
        if self._paged is None:
            raise RuntimeError("the layer has no prompt yet: store and seal it first")
        return self._paged

    @property
    def slots(self) -> int:
        """Tiles at once, each of which leaves its part of attention somewhere."""
        return max(len(self.paged.tiles), self.host.tiles if self.host else 0)

    def prompt_bytes(self) -> int:
        """Bytes of the stored prompt on the device as formats count them, and a length a head."""
        return sum(self.held_bytes) + 4 * self.rows

    def page_bytes(self) -> int:
        """Bytes of the pages held, slack at their ends included."""
        encoded = 0 if self.beside is None else self.beside.page_bytes
        return (
            encoded
            + sum(
                len(cells) * self.layout(kind, row).page_bytes
                for kind, rows in enumerate(self.pages)
                for row, cells in enumerate(rows)
            )
            + sum(
                self.layouts[row].tables.page_bytes
                for row in np.flatnonzero(self.tables != NOWHERE)
            )
        )
