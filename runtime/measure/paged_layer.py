"""One layer in pages that hold random bytes: what its decode attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.kernels.launch import Paged, Scratch
from kvtune.runtime.kernels.tiles import TABLE_AHEAD, Segments, plan_tiles
from kvtune.runtime.measure.plain_model import random_tensor


@dataclass(frozen=True)
class Run:
    """Tokens of one row in one format.

    Args:
        row: whose they are.
        layout: of their pages.
        tokens: how many.
    """

    row: int
    layout: PageLayout
    tokens: int

    @property
    def pages(self) -> int:
        """How many pages these tokens take."""
        return self.layout.pages_for(self.tokens)


@dataclass(frozen=True)
class RandomLayer:
    """A layer with a query for each of its rows.

    Args:
        query: ``[rows, G, D]``.
        paged: the pages, in a random order.
        scratch: as much as its tiles need.
    """

    query: Tensor
    paged: Paged
    scratch: Scratch

    @property
    def scale(self) -> float:
        """The factor that logits are multiplied with before the softmax."""
        return float(self.query.shape[2] ** -0.5)


def random_layer(
    runs: Sequence[Run], group: int, device: str, programs: int | None = None
) -> RandomLayer:
    """Pages of these runs; one head dimension.

    Args:
        runs: rows are counted from 0, and each has one or more.
        group: query heads a row.
        device: where.
        programs: tiles to cut it into; ``tiles.PROGRAMS`` unless given.
    """
    row, pages, tokens, code, cells = (
        np.array(column)
        for column in zip(
            *((r.row, r.pages, r.tokens, r.layout.code, r.layout.page_cells) for r in runs),
            strict=True,
        )
    )
    head_dim, rows = runs[0].layout.head_dim, int(row.max()) + 1
    table = _shuffled(np.repeat(cells, pages))
    tiles = plan_tiles(Segments(row, code, pages.cumsum() - pages, pages, tokens), table, programs)
    pool = random_tensor(int((cells * pages).sum()) * 2 * head_dim, device=device, scale=1.0)

    def ints(values: np.ndarray) -> Tensor:
        return torch.tensor(values.astype(np.int32), device=device)

    looked_at = np.append(table, np.zeros(TABLE_AHEAD, np.int64))
    paged = Paged(
        pool.view(torch.uint8), ints(looked_at), ints(tokens),
        torch.ones(len(runs), 2, device=device), ints(tiles.records), tiles.pairs, head_dim,
    )  # fmt: skip
    query = random_tensor(rows, group, head_dim, device=device, scale=1.0)
    return RandomLayer(query, paged, Scratch.fits(tiles, rows, group, head_dim, device))


def _shuffled(cells: np.ndarray) -> np.ndarray:
    """First cells of pages of these sizes, which lie in a random order."""
    order = np.random.default_rng(0).permutation(len(cells))
    starts = np.empty(len(cells), np.int64)
    starts[order] = cells[order].cumsum() - cells[order]
    return starts
