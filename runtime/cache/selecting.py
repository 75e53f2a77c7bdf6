"""Reading less than is held: before every step a reader says which pages attention goes to.

A row with a reader has its coded pages in a table of its own. The selected pages' cells are written
into the layer's page table, where kernels find them, and the segment's length is set to what they
hold; both happen on the device, so that a captured graph goes on selecting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.common.errors import KvtuneError
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout, has_pages
from kvtune.policies.placement import ranks_without_newest, reads_pages
from kvtune.policies.reader import BlockReader


@dataclass(frozen=True)
class Indexed:
    """Rows of a layer that share a reader, and what it remembers of their pages.

    Args:
        reader: selects.
        rows: of the layer.
        index: the reader's, ``[R, pages, ...]``.
        counts: tokens of each row's coded segment, ``[R]`` int64.
    """

    reader: BlockReader
    rows: list[int]
    index: Tensor
    counts: Tensor

    def choose(self, q: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """What each row reads at a step.

        Args:
            q: of these rows, ``[R, G, D]``.
            wanted: blocks to name of each.

        Returns:
            Numbers of blocks ``[R, wanted]``, first those that are read, the row's last one the
            last of them; and how many tokens those hold, ``[R]``.
        """
        chosen = self.reader.select(self.index, self.counts, q[:, :, None])[:, 0]
        last = chosen[:, -1:]
        missing = wanted - chosen.shape[1] + 1
        blocks = torch.cat([chosen[:, :-1], last.expand(-1, missing)], 1)
        tokens = ((chosen[:, :-1] != last).sum(1) - last[:, 0]) * PAGE + self.counts
        return blocks, tokens

    def among(self, rows: NDArray[np.bool_]) -> Indexed:
        """Those of its rows that are among some, flags ``[rows of the layer]``."""
        if rows[self.rows].all():
            return self
        at = np.flatnonzero(rows[self.rows]).tolist()
        left = [self.rows[n] for n in at]
        return Indexed(self.reader, left, self.index[at], self.counts[at])

    def forget(self, rows: range) -> None:
        """Nothing is read of these rows any more. In place, so that a captured graph sees it."""
        gone = torch.tensor([row in rows for row in self.rows], device=self.counts.device)
        self.counts.masked_fill_(gone, 0)

    def by_page(self, layouts: Sequence[PageLayout]) -> list[Indexed]:
        """The rows apart by how many tokens their pages hold; ``layouts`` are of all rows."""
        parts = []
        for tokens in dict.fromkeys(layouts[row].page_tokens for row in self.rows):
            at = [n for n, row in enumerate(self.rows) if layouts[row].page_tokens == tokens]
            rows = [self.rows[n] for n in at]
            parts.append(Indexed(self.reader, rows, self.index[at], self.counts[at]))
        return parts


@dataclass(frozen=True)
class Selection:
    """Rows that share a reader, and where their pages are listed.

    Args:
        indexed: the rows.
        at: the same rows, ``[R]`` int64.
        cells: of each row's pages, block by block, ``[R, blocks, pages of a block]`` int32.
        places: entries of the layer's page table that are the row's to write, ``[R, k]`` int64.
    """

    indexed: Indexed
    at: Tensor
    cells: Tensor
    places: Tensor

    @staticmethod
    def of(
        indexed: Indexed, cells: Sequence[Tensor], tables_at: Sequence[int], layout: PageLayout
    ) -> Selection:
        """Look up where the rows' pages are.

        Args:
            indexed: the rows, whose pages hold equally many tokens.
            cells: of every row of the layer, those of its coded pages, int32.
            tables_at: each row's first entry in the page table.
            layout: of one of the rows.
        """
        device, rows, each = indexed.index.device, indexed.rows, PAGE // layout.page_tokens
        wide = pad_sequence([cells[row] for row in rows], batch_first=True)
        blocks = F.pad(wide, (0, -wide.shape[1] % each)).unflatten(1, (-1, each))
        starts = torch.tensor([tables_at[row] for row in rows], device=device)
        listed = pages_read(indexed.reader, blocks.shape[1], layout)
        read = torch.arange(listed, device=device)
        return Selection(indexed, torch.tensor(rows, device=device), blocks, starts[:, None] + read)

    def select(self, q: Tensor, table: Tensor, lengths: Tensor) -> None:
        """Write the pages of one step. Changes the page table and the segments' lengths.

        Args:
            q: ``[rows of the layer, G, D]``.
            table: the layer's page table.
            lengths: of its segments, of which a row's coded one has the row's number.
        """
        blocks, tokens = self.indexed.choose(
            q[self.at], self.places.shape[1] // self.cells.shape[2]
        )
        cells = self.cells[torch.arange(len(blocks), device=q.device)[:, None], blocks]
        table.index_copy_(0, self.places.flatten(), cells.flatten())
        lengths.index_copy_(0, self.at, tokens.to(lengths.dtype))


def check_reader(option: Option, head_dim: int) -> None:
    """Refuse a reader of pages that would not see all of a prompt.

    Raises:
        KvtuneError: there are no pages of the option's formats, or they leave the newest tokens in
            16 bits, in other pages than those that are ranked.
    """
    if reads_pages(option.method.reader(PAGE)) and not has_pages(option, head_dim):
        raise KvtuneError(
            f"{option.label!r} would find no pages to choose among, and read all that it stores",
            hint=f"take formats that have pages, or blocks of fewer tokens than {PAGE}.",
        )
    if ranks_without_newest(option):
        raise KvtuneError(
            f"{option.label!r} would rank only the pages of quantised tokens, and read the newest "
            "tokens, which stay in 16 bits, beside its budget",
            hint="take residual: 0, or a format that quantises the newest tokens too; load_cache's "
            "residual= keeps generated ones in 16 bits.",
        )


def pages_read(reader: BlockReader, blocks: int, layout: PageLayout) -> int:
    """Table entries that a row of so many blocks needs."""
    return min(reader.blocks, blocks) * (PAGE // layout.page_tokens)


def indexed(readers: Mapping[int, BlockReader], keys: Mapping[int, Tensor]) -> list[Indexed]:
    """One index for each reader of some rows of a layer that have coded pages.

    Args:
        readers: by row.
        keys: likewise, ``[n, D]`` as the row's coded pages hold them.
    """
    found = []
    for reader in dict.fromkeys(readers.values()):
        rows = [row for row, each in readers.items() if each == reader and len(keys[row])]
        if rows:
            held = [keys[row] for row in rows]
            counts = torch.tensor([len(own) for own in held], device=held[0].device)
            index = reader.index(pad_sequence(held, batch_first=True), counts)
            found.append(Indexed(reader, rows, index, counts))
    return found
