"""Reading less than is held: before every step a reader says which pages attention goes to.

A row with a reader has its coded pages in a table of its own. The selected pages' cells are written
into the layer's page table, where kernels find them, and the segment's length is set to what they
hold; both happen on the device, so that a captured graph goes on selecting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.reader import Reader
from kvtune.runtime.kernels.layout import PAGE


def check_reader(reader: Reader | None) -> None:
    """Refuse a reader whose blocks are not the runtime's pages.

    Raises:
        KvtuneError: says which block would do.
    """
    if reader is not None and reader.block != PAGE:
        raise KvtuneError(
            f"the paged runtime reads whole pages of {PAGE} tokens, not blocks of {reader.block}",
            hint=f"give the method block: {PAGE}.",
        )


@dataclass(frozen=True)
class Selection:
    """Rows of a layer that share a reader.

    Args:
        reader: selects.
        rows: of the layer, ``[R]`` int64.
        index: the reader's, of the rows' pages.
        counts: tokens of each row's coded segment, ``[R]`` int64.
        cells: of each row's pages, ``[R, pages]`` int32.
        places: entries of the layer's page table that are the row's to write, ``[R, k]`` int64.
    """

    reader: Reader
    rows: Tensor
    index: Tensor
    counts: Tensor
    cells: Tensor
    places: Tensor

    def select(self, q: Tensor, table: Tensor, lengths: Tensor) -> None:
        """Write the pages of one step. Changes the page table and the segments' lengths.

        Args:
            q: ``[rows of the layer, G, D]``.
            table: the layer's page table.
            lengths: of its segments, of which a row's coded one has the row's number.
        """
        chosen = self.reader.select(self.index, self.counts, q[self.rows, :, None].float())[:, 0]
        wanted = self.places.shape[1]
        last = chosen[:, -1:]
        pages = torch.cat([chosen[:, :-1], last.expand(-1, wanted - chosen.shape[1] + 1)], 1)
        earlier = (chosen[:, :-1] != last).sum(1)
        table.index_copy_(0, self.places.flatten(), self.cells.gather(1, pages).flatten())
        read = earlier * PAGE + self.counts - last[:, 0] * PAGE
        lengths.index_copy_(0, self.rows, read.to(lengths.dtype))


def pages_read(reader: Reader, pages: int) -> int:
    """Table entries that a row of so many coded pages needs."""
    return min(reader.blocks, pages)


def selections(
    readers: Sequence[Reader | None],
    keys: Sequence[Tensor | None],
    cells: Sequence[Tensor],
    tables_at: Sequence[int],
    device: torch.device,
) -> list[Selection]:
    """One selection for each reader of a layer.

    Args:
        readers: of the layer's rows.
        keys: of the rows with a reader, ``[n, D]`` as their coded pages hold them.
        cells: of the rows' coded pages, ``[pages]`` int32.
        tables_at: each row's first entry in the page table.
        device: of the pages.
    """
    from torch.nn.utils.rnn import pad_sequence

    found = []
    for reader in dict.fromkeys(each for each in readers if each is not None):
        rows = [row for row, each in enumerate(readers) if each == reader and len(cells[row])]
        if not rows:
            continue
        theirs = [held for row in rows if (held := keys[row]) is not None]
        counts = torch.tensor([len(held) for held in theirs], device=device)
        index = reader.index(pad_sequence(theirs, batch_first=True).float(), counts)
        wide = pad_sequence([cells[row] for row in rows], batch_first=True)
        read = pages_read(reader, wide.shape[1])
        starts = torch.tensor([tables_at[row] for row in rows], device=device)
        places = starts[:, None] + torch.arange(read, device=device)
        at = torch.tensor(rows, device=device)
        found.append(Selection(reader, at, index, counts, wide, places))
    return found
