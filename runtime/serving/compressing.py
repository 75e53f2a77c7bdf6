"""What a plan makes of a prompt: tokens are chosen, and written into the request's pages.

Heads with one option and one budget are a group, and every operation is one of a whole group or of
all heads, so that a prompt costs the host about the same whatever number of layers it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.policies.parts import Part
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.backend import Backend, Writing
from kvtune.runtime.cache.segments import CODED, GROWN, Ints, runs
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.cache.storing import Records, fp8_scales
from kvtune.runtime.serving.blocks import Alike
from kvtune.runtime.serving.held import KINDS, Stored
from kvtune.runtime.serving.pages import RequestPages


def compress(
    groups: Sequence[Alike],
    signals: Signals,
    heads: int,
    pages: RequestPages,
    memory: Tensor,
    backend: Backend,
) -> Stored:
    """Put layers that lie side by side in ``signals`` into pages.

    Args:
        groups: their heads, each in one group.
        signals: of all of them.
        heads: KV heads of a layer.
        pages: of the request, taken as far as they are needed.
        memory: the engine's, ``[bytes]`` uint8; written to in these pages alone.
        backend: who writes them.
    """
    laid = _lay_out(groups, len(signals.keys), signals.keys.shape[-1], pages)
    layouts = {each.layout.code: each.layout for each in groups} | {laid.grows.code: laid.grows}
    tables = [laid.records(layout) for layout in layouts.values()]
    order, sizes, *records = sent([laid.order, laid.sizes, *tables], memory.device)
    chosen, keys, values = _choose(groups, signals, order)
    scales = torch.ones(KINDS, len(keys), 2, device=memory.device)
    if any("fp8" in (layout.keys, layout.values) for layout in layouts.values()):
        listed = torch.repeat_interleave(order, sizes.long(), output_size=len(chosen)).long()
        magnitudes = torch.stack([x.abs().amax(-1) for x in (keys, values)])
        scales[CODED] = fp8_scales(magnitudes, chosen.long(), listed)
    for layout, pages_of_it in zip(layouts.values(), records, strict=True):
        if len(pages_of_it):
            writing = Writing(layout, keys, values, chosen, pages_of_it, scales.view(-1, 2))
            backend.write(memory, writing)
    return laid.stored(heads, scales)


def _choose(
    groups: Sequence[Alike], signals: Signals, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tokens, group by group, as int32; keys and values, merged where a method merges."""
    keys, values = signals.keys, signals.values
    parts: dict[object, Part] = {}
    found, first = [], 0
    for each in groups:
        asked = each.option.method, each.budget
        if asked not in parts:
            (parts[asked],) = each.option.method.parts(signals, each.budget)
        part, rows = parts[asked], order[first : first + len(each.heads)]
        first += len(each.heads)
        tokens = part.tokens.index_select(0, rows)
        if part.keys is not None and part.values is not None:
            at = rows.long()[:, None], tokens
            keys, values = keys.clone(), values.clone()
            keys[at], values[at] = part.keys[at[0][:, 0]], part.values[at[0][:, 0]]
        found.append(tokens.flatten())
    return torch.cat(found).int(), keys, values


@dataclass(frozen=True)
class _Laid:
    """Where the tokens of n heads lie.

    Args:
        grows: the layout of growing pages.
        order: heads as their tokens are listed.
        sizes: tokens of each, in that order.
        first: of each head, where its tokens begin in the list.
        exact: of them, how many lie in growing pages: the first ones.
        coded: and how many in pages of the option's format.
        layouts: of these.
        coded_pages: of each head.
        coded_cells: first cells of these pages, head after head.
        grown_pages: of each head.
        grown_cells: likewise.
    """

    grows: PageLayout
    order: Ints
    sizes: Ints
    first: Ints
    exact: Ints
    coded: Ints
    layouts: list[PageLayout]
    coded_pages: Ints
    coded_cells: Ints
    grown_pages: Ints
    grown_cells: Ints

    def records(self, layout: PageLayout) -> Records:
        """``Writing.records`` of all pages of one layout."""
        mine = np.array([each.code == layout.code for each in self.layouts])
        listed = [self._listed(layout, CODED, np.flatnonzero(mine & (self.coded > 0)))]
        if layout.code == self.grows.code:
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
        columns = head, first, count, cells[runs(mine, starts)], kind * len(self.first) + head
        return np.stack(columns, axis=1)

    def stored(self, heads: int, fp8_scales: Tensor) -> Stored:
        """The same as a request holds it, layer by layer."""
        most = max(int(self.grown_pages.max()), 1)
        cells = np.zeros((len(self.grown_pages), most), np.int64)
        at = np.repeat(np.arange(len(cells)), self.grown_pages), runs(self.grown_pages)
        cells[at] = self.grown_cells
        return Stored(
            self.coded.reshape(-1, heads),
            self.coded_pages.reshape(-1, heads),
            self.coded_cells,
            self.exact.reshape(-1, heads),
            cells.reshape(-1, heads, most),
            self.grown_pages.reshape(-1, heads),
            fp8_scales.view(KINDS, -1, heads, 2).transpose(0, 1),
        )


def _lay_out(groups: Sequence[Alike], heads: int, head_dim: int, pages: RequestPages) -> _Laid:
    """Take pages for all of ``heads`` heads."""
    grows = PageLayout(head_dim)
    order = np.concatenate([np.array(each.heads) for each in groups])
    exact, coded, coded_pages, page_cells = (np.zeros(heads, np.int64) for _ in range(4))
    layouts = [grows] * heads
    for each in groups:
        exact[each.heads], coded[each.heads] = each.exact, each.coded
        coded_pages[each.heads] = each.layout.pages_for(each.coded)
        page_cells[each.heads] = each.layout.page_cells
        for head in each.heads:
            layouts[head] = each.layout
    sizes = (exact + coded)[order]
    first = np.zeros(heads, np.int64)
    first[order] = sizes.cumsum() - sizes
    of_page = np.repeat(page_cells, coded_pages)
    coded_cells = np.zeros(len(of_page), np.int64)
    for size in np.unique(of_page).tolist():
        mine = of_page == size
        coded_cells[mine] = pages.take(int(mine.sum()), size)
    grown_pages = -(-exact // grows.page_tokens)
    grown_cells = pages.take(int(grown_pages.sum()), grows.page_cells)
    return _Laid(
        grows, order, sizes, first, exact, coded, layouts,
        coded_pages, coded_cells, grown_pages, grown_cells,
    )  # fmt: skip
