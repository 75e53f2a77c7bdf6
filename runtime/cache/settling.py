"""Generated tokens that have become old take their head's own format, a page of 64 at a time.

As in Liu et al., "KIVI", ICML 2024, arXiv 2402.02750: the newest tokens stay in 16 bits, so that a
group of keys is quantised once and whole. Here a row's growing segment settles its oldest page as
soon as a residual window of newer tokens lies behind it; the exact tokens at its front stay. Codes
are written by what writes prompts: to it, the pool's own memory is a prompt.
"""

from __future__ import annotations

import numpy as np
import torch

from kvtune.common.errors import KvtuneError
from kvtune.policies.page_formats import BF16_PAGE, PAGE
from kvtune.policies.pages import PageLayout, exact_tokens
from kvtune.policies.policy import Policy
from kvtune.runtime.cache.backend import Moves, Writing
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.segments import GROWN, SETTLED, Ints
from kvtune.runtime.cache.sending import sent


def check_residual(policy: Policy, residual: int) -> None:
    """Refuse windows and formats that a page does not suit.

    Raises:
        KvtuneError: a negative window, or more exact tokens than a page has.
    """
    if residual < 0:
        raise KvtuneError(f"a residual window of {residual} tokens", hint="0 is the shortest.")
    most = max(exact_tokens(option.keys) for option in policy.options())
    if most > PAGE:
        raise KvtuneError(
            f"{most} exact tokens are more than a page of {PAGE}, beside which others settle",
            hint="use a smaller exact_first, or leave out residual=.",
        )


def settle(layer: PagedLayer) -> None:
    """Quantise whole pages that are older than the residual window. Changes tables in place.

    Raises:
        PoolFullError: the pool is full.
    """
    while len(due := _due(layer)):
        layout = layer.layouts[due[0]]
        rows = np.array([row for row in due if layer.layouts[row] == layout])
        held = max(len(layer.pages[SETTLED][row]) for row in rows)
        if held >= layer.rooms[SETTLED, rows].min():
            layer.seal(2 * PAGE * (held + 1))
        _write(layer, layout, rows)
        _move_exact(layer, rows)
        _shift(layer, rows)


def _due(layer: PagedLayer) -> Ints:
    """Rows whose oldest page is to be quantised now."""
    if layer.residual is None:
        return np.zeros(0, np.int64)
    quantised = np.array([layout.settles for layout in layer.layouts]) & ~layer.evicts_coded
    old = layer.lengths[GROWN] - layer.staying - layer.residual
    return np.flatnonzero(quantised & (old >= PAGE))


def _write(layer: PagedLayer, layout: PageLayout, rows: Ints) -> None:
    """The first 64 tokens after the exact ones, of rows of one format, become a page of it."""
    memory = layer.pool.memory
    tokens = memory.view(torch.bfloat16).view(1, -1, layer.head_dim)
    places = layer.staying[rows, None] + np.arange(PAGE)
    table = [layer.pages[GROWN][row] for row in rows]
    cells = np.stack([mine[at // BF16_PAGE] for mine, at in zip(table, places, strict=True)])
    chosen = (2 * cells + places % BF16_PAGE).ravel()  # a cell is two tokens of bf16
    segments = SETTLED * layer.rows + rows
    pages = layer.take(segments, np.ones_like(rows), layout)
    first = np.arange(len(rows)) * PAGE
    columns = np.broadcast_arrays(0, first, PAGE, pages, segments)
    at, records = sent([chosen, np.stack(columns, axis=1)], memory.device)
    values = tokens[:, BF16_PAGE:]  # of a page's keys, its values lie a page's tokens further on
    layer.backend.write(memory, Writing(layout, tokens, values, at, records, layer.fp8_scales))


def _move_exact(layer: PagedLayer, rows: Ints) -> None:
    """Exact tokens go 64 places further on, where others have just been read.

    The last 64 of them first: each goes where one that has gone already was, and none that is
    moved at the same time is.
    """
    most = int(layer.staying[rows].max())
    for first in reversed(range(0, most, PAGE)):
        places = np.tile(np.arange(first, min(first + PAGE, most)), (len(rows), 1))
        real = places < layer.staying[rows, None]
        moves = Moves(*sent([rows, places, places + PAGE * real], layer.pool.memory.device))
        layer.backend.move(layer.paged, layer.growing, moves)


def _shift(layer: PagedLayer, rows: Ints) -> None:
    """The first 64 tokens' pages of each growing segment are given back, and so its tables say."""
    grown, settled = layer.pages[GROWN], layer.pages[SETTLED]
    at, cells, count = [], [], PAGE // BF16_PAGE
    for row in rows:
        layer.pool.give(grown[row][:count], layer.growing_layout.page_cells)
        grown[row] = grown[row][count:]
        at.append(layer.tables_at[GROWN, row] + np.arange(len(grown[row])))
        at.append(layer.tables_at[SETTLED, row] + len(settled[row]) - np.ones(1, np.int64))
        cells += [grown[row], settled[row][-1:]]
    layer.write_table(np.concatenate(at), np.concatenate(cells))
    layer.lengths[GROWN, rows] -= PAGE
    layer.lengths[SETTLED, rows] += PAGE
    lengths = layer.paged.lengths.view(3, -1)
    where = torch.as_tensor(rows, device=lengths.device)
    lengths[GROWN, where] -= PAGE
    lengths[SETTLED, where] += PAGE
