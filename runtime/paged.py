"""One layer's cache in pages: each (sequence, KV head) with its own length and format.

Life of a layer: ``store`` for every sequence, ``seal`` once, then ``append`` and ``attend`` for
every new token; ``reserve``, ``leave`` and ``free`` between steps. A row is a (sequence, KV head);
it has two segments, what its option made of the prompt, and a growing one in 16 bits with the
prompt's exact tokens and all new ones. Entries leave a growing segment alone, and its last ones
take their places: attention knows no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.option import Option
from kvtune.runtime.backend import Backend, Growing, Moves, Seen, Writing
from kvtune.runtime.kernels.launch import Paged, Scratch
from kvtune.runtime.kernels.layout import PAGE, PageLayout, exact_tokens, layout_of
from kvtune.runtime.kernels.reference import fp8_scale
from kvtune.runtime.kernels.tiles import Segments, plan_tiles
from kvtune.runtime.pool import Pool

Ints = NDArray[np.int64]

NO_END = np.iinfo(np.int64).max // 2
"""Of a row that only grows: the most entries that it may hold."""


@dataclass(frozen=True)
class Leaving:
    """Entries that leave growing segments: the last ones move to where they were.

    Args:
        rows: whose, ``[n]``.
        moves: likewise.
        counts: entries that leave each, ``[n]``.
        on_device: the same as int32 on the device, so that nobody waits.
    """

    rows: Ints
    moves: Moves
    counts: Ints
    on_device: Tensor


class PagedLayer:
    """The pages of one layer, and the tables by which kernels find them.

    Args:
        number: the layer's, for messages.
        options: one a KV head.
        head_dim: D.
        batch: sequences.
        pool: where pages come from; shared by all layers.
        backend: who works on them.
    """

    def __init__(
        self,
        number: int,
        options: Sequence[Option],
        head_dim: int,
        batch: int,
        pool: Pool,
        backend: Backend,
    ) -> None:
        self.number, self.options, self.head_dim = number, options, head_dim
        self.pool, self.backend = pool, backend
        self.layouts = [layout_of(option, head_dim) for option in options] * batch
        self.growing_layout = PageLayout(head_dim)
        self.coded: list[Ints] = [np.zeros(0, np.int64) for _ in self.layouts]
        self.grown: list[Ints] = [np.zeros(0, np.int64) for _ in self.layouts]
        self.lengths = np.zeros((2, len(self.layouts)), np.int64)  # coded, growing
        self.kept: list[int] = [0] * len(self.layouts)
        self.most = np.full(len(self.layouts), NO_END)  # entries of a growing segment, at any time
        self.evicted = np.zeros(len(self.layouts), np.int64)
        device = pool.memory.device
        self._fp8_scales = torch.ones(2 * len(self.layouts), 2, device=device)
        self._paged: Paged | None = None

    @property
    def rows(self) -> int:
        """Sequences times KV heads."""
        return len(self.layouts)

    def store(self, sequence: int, keys: Tensor, values: Tensor, kept: Sequence[Tensor]) -> None:
        """Put a sequence's kept prompt tokens into pages. Once a sequence, before ``seal``.

        Rows that may hold no more than so many entries (``most``) keep all in growing segments.

        Args:
            sequence: its place in the batch.
            keys: ``[H, P, D]`` after RoPE, as the model gave them.
            values: ``[H, P, D]``, laid out as the keys.
            kept: token indices of each head, ascending.

        Raises:
            KvtuneError: a key or value that is not a number; the pool is full.
        """
        self._refuse_nan(keys, values)
        first = sequence * len(kept)
        chosen = torch.cat(list(kept)).int()
        before = np.cumsum([0, *map(len, kept)])
        heads = range(len(kept))
        first_ones = [
            NO_END if self.most[first + head] < NO_END else exact_tokens(option.keys)
            for head, option in enumerate(self.options)
        ]
        exact = [min(n, len(k)) for n, k in zip(first_ones, kept, strict=True)]
        for head in heads:
            self._set_scales(first + head, keys[head], values[head], kept[head])
        self.kept[first : first + len(kept)] = [len(indices) for indices in kept]
        for which, pages in enumerate((self.coded, self.grown)):
            records: dict[PageLayout, list[NDArray[np.int64]]] = {}
            for head in heads:
                row = first + head
                skip = exact[head] if which == 0 else 0
                count = len(kept[head]) - exact[head] if which == 0 else exact[head]
                layout = self.layouts[row] if which == 0 else self.growing_layout
                pages[row] = self.pool.take(-(-count // PAGE), layout.page_cells)
                self.lengths[which, row] = count
                some = _records(head, before[head] + skip, count, pages[row], which, row, self.rows)
                records.setdefault(layout, []).append(some)
            for layout, parts in records.items():
                table = np.concatenate(parts).astype(np.int32)
                if len(table):
                    writing = Writing(layout, keys, values, chosen, table, self._fp8_scales)
                    self.backend.write(self.pool.memory, writing)

    def seal(self, new_tokens: int) -> None:
        """Lay out tables and tiles with room for so many tokens a row. Again to make more room."""
        ends = np.where(self.most < NO_END, self.most, self.lengths[1] + new_tokens)
        room = -(-int(ends.max()) // PAGE)
        pages = np.array([len(x) for x in self.coded] + [room] * self.rows)
        starts = pages.cumsum() - pages
        pairs = [x.code for x in self.layouts] + [self.growing_layout.code] * self.rows
        row = np.tile(np.arange(self.rows), 2)
        table = np.zeros(int(pages.sum()) + 1, np.int64)  # the kernel looks one entry ahead
        for at, cells in zip(starts, [*self.coded, *self.grown], strict=True):
            table[at : at + len(cells)] = cells
        tokens = np.concatenate([self.lengths[0], np.full(self.rows, -1)])
        tiles = plan_tiles(Segments(row, np.array(pairs), starts, pages, tokens), table)
        device = self.pool.memory.device

        def ints(array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
            return torch.as_tensor(array.astype(np.int32), device=device)

        self._tables_at = starts[self.rows :]
        self.growing = Growing(ints(np.arange(self.rows, 2 * self.rows)), ints(starts[self.rows :]))
        self._paged = Paged(
            self.pool.memory, ints(table), ints(self.lengths.ravel()), self._fp8_scales,
            ints(tiles.records), tiles.pairs, self.head_dim, room,
        )  # fmt: skip
        self.slots = len(tiles.records)

    def reserve(self, tokens: int) -> None:
        """Give every row pages for so many more tokens. Changes tables in place, if they have room.

        Raises:
            KvtuneError: the pool is full.
        """
        wanted = -(-np.minimum(self.lengths[1] + tokens, self.most) // PAGE)
        if wanted.max() > self.paged.growing_pages:
            self.seal(2 * PAGE * int(wanted.max()))
        at, cells = [], []
        for row in np.flatnonzero(wanted > [len(x) for x in self.grown]):
            have = len(self.grown[row])
            more = self.pool.take(int(wanted[row]) - have, self.growing_layout.page_cells)
            self.grown[row] = np.concatenate([self.grown[row], more])
            at.append(self._tables_at[row] + have + np.arange(len(more)))
            cells.append(more)
        if at:
            table, device = self.paged.table, self.pool.memory.device
            where = torch.as_tensor(np.concatenate(at), device=device)
            table[where] = torch.as_tensor(np.concatenate(cells), device=device).int()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add one token a sequence, ``[B, H, D]``; its page must have been reserved."""
        self.backend.append(self.paged, self.growing, keys, values)

    def count_appended(self, tokens: int = 1) -> None:
        """Note on the host that the device has appended; a captured graph cannot."""
        self.lengths[1] += tokens

    def attend(self, q: Tensor, scratch: Scratch, scale: float) -> Tensor:
        """Attention of one query a query head, ``[rows, G, D]``, over all that is kept."""
        return self.backend.attend(q, self.paged, scratch, scale)

    def attend_seeing(self, q: Tensor, scratch: Scratch, scale: float) -> tuple[Tensor, Tensor]:
        """The same, and its weights on growing segments ``[rows, G, places]``, zero beyond them."""
        rows, group, _ = q.shape
        paged = self.paged
        logits = q.new_empty(group, PAGE * len(paged.table), dtype=torch.float32)
        seen = Seen(logits, q.new_empty(rows, group, dtype=torch.float32))
        output = self.backend.attend(q, paged, scratch, scale, seen)
        places = PAGE * paged.growing_pages
        first = PAGE * int(self._tables_at[0])  # growing segments lie side by side in the table
        mine = logits[:, first : first + rows * places].view(group, rows, places).transpose(0, 1)
        real = torch.arange(places, device=q.device) < paged.lengths[rows:, None, None]
        return output, (mine - seen.lse[..., None]).exp().where(real, 0)

    def leave(self, leaving: Leaving) -> None:
        """Let entries go, in place; pages that not even the next token needs are given back."""
        rows = leaving.rows
        self.backend.move(self.paged, self.growing, leaving.moves)
        segments = self.growing.segments[leaving.moves.rows]
        self.paged.lengths.index_add_(0, segments, leaving.on_device, alpha=-1)
        self.lengths[1, rows] -= leaving.counts
        self.evicted[rows] += leaving.counts
        for row, needed in zip(rows, -(-(self.lengths[1, rows] + 1) // PAGE), strict=True):
            self.pool.give(self.grown[row][needed:], self.growing_layout.page_cells)
            self.grown[row] = self.grown[row][:needed]

    def free(self, sequence: int) -> None:
        """Give back a sequence's pages; its rows then attend to nothing."""
        heads = len(self.options)
        rows = range(sequence * heads, (sequence + 1) * heads)
        for row in rows:
            if len(self.coded[row]):
                self.pool.give(self.coded[row], self.layouts[row].page_cells)
            if len(self.grown[row]):
                self.pool.give(self.grown[row], self.growing_layout.page_cells)
            self.coded[row] = self.grown[row] = np.zeros(0, np.int64)
        self.lengths[:, rows.start : rows.stop] = 0
        self.paged.lengths.view(2, -1)[:, rows.start : rows.stop] = 0
        tiles = self.paged.tiles
        theirs = (tiles[:, 0] >= rows.start) & (tiles[:, 0] < rows.stop)
        tiles[:, 8] = tiles[:, 8].where(~theirs, -1)  # to be looked up, and found to be none
        tiles[:, 9] = tiles[:, 9].where(~theirs, -1)

    @property
    def paged(self) -> Paged:
        """The tables; the pool's memory as it is now.

        Raises:
            RuntimeError: not sealed yet.
        """
        if self._paged is None:
            raise RuntimeError("the layer has no prompt yet: store and seal it first")
        return self._paged

    def prompt_bytes(self) -> int:
        """Bytes of the stored prompt as formats count them, a length a head included."""
        options = list(self.options) * (self.rows // len(self.options))
        kept = zip(options, self.kept, strict=True)
        return sum(4 + option.footprint(count, self.head_dim) for option, count in kept)

    def page_bytes(self) -> int:
        """Bytes of the pages held, slack at their ends included."""
        coded = sum(len(x) * y.page_bytes for x, y in zip(self.coded, self.layouts, strict=True))
        return coded + sum(map(len, self.grown)) * self.growing_layout.page_bytes

    def _refuse_nan(self, keys: Tensor, values: Tensor) -> None:
        fine = keys.isfinite().all(-1).all(-1) & values.isfinite().all(-1).all(-1)
        if not bool(fine.all()):
            head = int((~fine).nonzero()[0])
            raise KvtuneError(f"layer {self.number}, KV head {head}: a key or value is not finite")

    def _set_scales(self, row: int, keys: Tensor, values: Tensor, kept: Tensor) -> None:
        layout = self.layouts[row]
        for n, (name, tensor) in enumerate(((layout.keys, keys), (layout.values, values))):
            if name == "fp8" and len(kept):
                self._fp8_scales[row, n] = fp8_scale(tensor[kept])


def _records(
    head: int, first: int, count: int, cells: Ints, which: int, row: int, rows: int
) -> NDArray[np.int64]:
    """``Writing.records`` of one segment."""
    start = np.arange(len(cells)) * PAGE
    columns = (head, first + start, np.minimum(count - start, PAGE), cells, which * rows + row)
    return np.stack(np.broadcast_arrays(*columns), axis=1)
