"""Reading less than is held: before every step a reader says which pages attention goes to.

A row with a reader has its coded pages in a table of its own. The selected pages' cells are written
into the layer's page table, where kernels find them, and the segment's length is set to what they
hold; both happen on the device, so that a captured graph goes on selecting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.common.errors import KvtuneError
from kvtune.policies.pages import PAGE
from kvtune.policies.reader import BlockReader, Reader


def paged_reader(reader: Reader | None) -> BlockReader | None:
    """The reader, as one whose blocks are the runtime's pages.

    Raises:
        KvtuneError: it is none; says what would do.
    """
    if reader is None:
        return None
    if not isinstance(reader, BlockReader):
        raise KvtuneError(
            f"the paged runtime reads whole pages, and {type(reader).__name__} chooses entries",
            hint="replay, live runs, search and bench have it; here use quest or landmark.",
        )
    if reader.block != PAGE:
        raise KvtuneError(
            f"the paged runtime reads whole pages of {PAGE} tokens, not blocks of {reader.block}",
            hint=f"give the method block: {PAGE}.",
        )
    return reader


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
            wanted: pages to name of each.

        Returns:
            Numbers of pages ``[R, wanted]``, first those that are read, the row's last page the
            last of them; and how many tokens those hold, ``[R]``.
        """
        chosen = self.reader.select(self.index, self.counts, q[:, :, None])[:, 0]
        last = chosen[:, -1:]
        missing = wanted - chosen.shape[1] + 1
        pages = torch.cat([chosen[:, :-1], last.expand(-1, missing)], 1)
        tokens = ((chosen[:, :-1] != last).sum(1) - last[:, 0]) * PAGE + self.counts
        return pages, tokens


@dataclass(frozen=True)
class Selection:
    """Rows that share a reader, and where their pages are listed.

    Args:
        indexed: the rows.
        at: the same rows, ``[R]`` int64.
        cells: of each row's pages, ``[R, pages]`` int32.
        places: entries of the layer's page table that are the row's to write, ``[R, k]`` int64.
    """

    indexed: Indexed
    at: Tensor
    cells: Tensor
    places: Tensor

    @staticmethod
    def of(indexed: Indexed, cells: Sequence[Tensor], tables_at: Sequence[int]) -> Selection:
        """Look up where the rows' pages are.

        Args:
            indexed: the rows.
            cells: of every row of the layer, those of its coded pages, int32.
            tables_at: each row's first entry in the page table.
        """
        device, rows = indexed.index.device, indexed.rows
        wide = pad_sequence([cells[row] for row in rows], batch_first=True)
        starts = torch.tensor([tables_at[row] for row in rows], device=device)
        read = torch.arange(pages_read(indexed.reader, wide.shape[1]), device=device)
        return Selection(indexed, torch.tensor(rows, device=device), wide, starts[:, None] + read)

    def select(self, q: Tensor, table: Tensor, lengths: Tensor) -> None:
        """Write the pages of one step. Changes the page table and the segments' lengths.

        Args:
            q: ``[rows of the layer, G, D]``.
            table: the layer's page table.
            lengths: of its segments, of which a row's coded one has the row's number.
        """
        pages, tokens = self.indexed.choose(q[self.at], self.places.shape[1])
        table.index_copy_(0, self.places.flatten(), self.cells.gather(1, pages).flatten())
        lengths.index_copy_(0, self.at, tokens.to(lengths.dtype))


def pages_read(reader: BlockReader, pages: int) -> int:
    """Table entries that a row of so many coded pages needs."""
    return min(reader.blocks, pages)


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
