"""Where the tokens that are kept of a step's prompts lie: pages of requests, in numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.segments import CODED, GROWN, Ints, runs
from kvtune.runtime.cache.storing import Records
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.held import KINDS, Held, Stored


@dataclass(frozen=True)
class Laid:
    """Places of the tokens of n prompts' heads: a table of one prompt's heads after another's.

    Args:
        planned: the plan.
        kinds: the option of each head, ``[n * heads]``, as all of these.
        heads: of one prompt.
        first: where its tokens begin in the list of all kept tokens.
        exact: of them, how many lie in growing pages: the first ones.
        coded: and how many in pages of the option's format.
        coded_pages: of each head.
        coded_cells: first cells of these pages, head after head.
        grown_pages: of each head.
        grown_cells: first cells of these, likewise.
        tables: first cells of the tables of each head's coded pages; 0 where they have none.
    """

    planned: PlannedBlocks
    kinds: Ints
    heads: int
    first: Ints
    exact: Ints
    coded: Ints
    coded_pages: Ints
    coded_cells: Ints
    grown_pages: Ints
    grown_cells: Ints
    tables: Ints

    @property
    def layouts(self) -> list[PageLayout]:
        """Of pages that occur."""
        known = self.planned.layouts
        found = [known[kind] for kind in np.unique(self.kinds).tolist()]
        grows = PageLayout(self.planned.head_dim)
        return list({each.code: each for each in (*found, grows)}.values())

    def records(self, layout: PageLayout) -> Records:
        """``Writing.records`` of all pages of one layout."""
        codes = np.array([each.code for each in self.planned.layouts])
        mine = (codes[self.kinds] == layout.code) & (self.coded > 0)
        listed = [self._listed(layout, CODED, np.flatnonzero(mine))]
        if layout.code == PageLayout(self.planned.head_dim).code:
            listed.append(self._listed(layout, GROWN, np.flatnonzero(self.exact > 0)))
        return np.concatenate(listed).astype(np.int32)

    def _listed(self, layout: PageLayout, kind: int, heads: Ints) -> Ints:
        """Of one kind of pages of some heads."""
        grown = kind == GROWN
        tokens, pages, cells = (
            (self.exact, self.grown_pages, self.grown_cells)
            if grown
            else (self.coded, self.coded_pages, self.coded_cells)
        )
        mine, starts = pages[heads], (pages.cumsum() - pages)[heads]
        head, before = np.repeat(heads, mine), layout.page_tokens * runs(mine)
        first = self.first[head] + (0 if grown else self.exact[head]) + before
        count = np.minimum(tokens[head] - before, layout.page_tokens)
        segment = kind * len(self.first) + head
        columns = head % self.heads, first, count, cells[runs(mine, starts)], segment
        return np.stack(columns, axis=1)

    def stored(self, number: int, fp8_scales: Tensor) -> Stored:
        """One prompt's part as its request holds it, layer by layer.

        Args:
            number: of the prompt.
            fp8_scales: of all heads, ``[kinds, n * heads, 2]``.
        """
        mine = slice(self.heads * number, self.heads * (number + 1))
        a_layer, coded = self.planned.policy.kv_heads, self.coded_pages
        grown = self.grown_pages[mine]
        cells = np.zeros((len(grown), max(int(grown.max()), 1)), np.int64)
        at = np.repeat(np.arange(len(grown)), grown), runs(grown)
        cells[at] = self.grown_cells[_of_rows(self.grown_pages, mine)]
        return Stored(
            self.coded[mine].reshape(-1, a_layer),
            coded[mine].reshape(-1, a_layer),
            self.coded_cells[_of_rows(coded, mine)],
            self.exact[mine].reshape(-1, a_layer),
            cells.reshape(-1, a_layer, cells.shape[-1]),
            grown.reshape(-1, a_layer),
            fp8_scales[:, mine].view(KINDS, -1, a_layer, 2).transpose(0, 1),
            self.tables[mine].reshape(-1, a_layer),
        )


def lay_out(
    planned: PlannedBlocks,
    kinds: Ints,
    budgets: Ints,
    requests: Sequence[Held],
    listed: tuple[Ints, Ints],
) -> Laid:
    """Take pages for everything that is kept.

    Args:
        planned: the plan.
        kinds: the option of each head of one prompt.
        budgets: tokens of each prompt's heads, ``[n, heads]``.
        requests: the n, whose pages are taken.
        listed: the table's heads in the order in which their tokens are listed, and how many of
            them; one that comes more than once has its tokens where it comes last.
    """
    each = [
        planned.entries(kinds, mine, request.prompt_tokens)
        for request, mine in zip(requests, budgets, strict=True)
    ]
    exact, coded = (np.concatenate(entries) for entries in zip(*each, strict=True))
    all_kinds = np.tile(kinds, len(requests))
    order, sizes = listed
    first = np.zeros(len(exact), np.int64)
    first[order] = sizes.cumsum() - sizes
    grows = PageLayout(planned.head_dim)
    page_tokens = np.array([layout.page_tokens for layout in planned.layouts])[all_kinds]
    page_cells = np.array([layout.page_cells for layout in planned.layouts])[all_kinds]
    table_cells = np.array([planned.table_cells(layout) for layout in planned.layouts])[all_kinds]
    tables = np.zeros_like(coded)
    read_by = (coded > 0) & (table_cells > 0)
    tables[read_by] = _taken(requests, read_by.astype(np.int64), table_cells)
    coded_pages, grown_pages = -(-coded // page_tokens), -(-exact // grows.page_tokens)
    return Laid(
        planned, all_kinds, len(kinds), first, exact, coded,
        coded_pages, _taken(requests, coded_pages, page_cells),
        grown_pages, _taken(requests, grown_pages, np.full_like(exact, grows.page_cells)), tables,
    )  # fmt: skip


def _taken(requests: Sequence[Held], pages: Ints, page_cells: Ints) -> Ints:
    """First cells of new pages of all heads, each out of its own request's blocks."""
    sizes = np.repeat(page_cells, pages)
    cells, at = np.zeros(len(sizes), np.int64), 0
    for request, count in zip(requests, pages.reshape(len(requests), -1).sum(1), strict=True):
        theirs = sizes[at : at + count]
        for size in np.unique(theirs).tolist():
            mine = np.flatnonzero(theirs == size)
            cells[at + mine] = request.pages.take(len(mine), size)
        at += count
    return cells


def _of_rows(pages: Ints, rows: slice) -> slice:
    """Where the pages of some rows lie in the list of all."""
    first = int(pages[: rows.start].sum())
    return slice(first, first + int(pages[rows].sum()))
