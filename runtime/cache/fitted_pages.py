"""Writing pages that are read by tables, which all of a head's tokens decide: in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.runtime.cache.backend import FittedTables, Writing
from kvtune.runtime.kernels.reference_signs import SignRows, write_sign_pages

_CODED_AT_ONCE = 2**23
"""Numbers of keys that are fitted at once; what this takes beside them is thirty times as many
bytes."""


def write_fitted(pool: Tensor, writing: Writing, fitted: FittedTables) -> None:
    """Pages of signs and their tables, some heads at a time; waits once for their lengths."""
    layout, chosen = writing.layout, writing.chosen.long()
    row, first, count, cell, segment = writing.records.long().unbind(1)
    segments, which, pages = segment.unique_consecutive(return_inverse=True, return_counts=True)
    ends = pages.cumsum(0)
    head, begin = row[ends - pages], first[ends - pages]
    tokens = torch.zeros_like(begin).index_add_(0, which, count)
    page_ends, lengths = torch.stack([ends, tokens]).tolist()
    tables_at, cells = fitted.cells.long()[segments], pool.view(-1, layout.cell_bytes)
    step = max(_CODED_AT_ONCE // (max(lengths) * layout.head_dim), 1)
    for start in range(0, len(lengths), step):
        some = slice(start, min(start + step, len(lengths)))
        mine = slice(page_ends[start - 1] if start else 0, page_ends[some.stop - 1])
        inside = torch.arange(max(lengths[some]), device=pool.device)
        listed = (begin[some, None] + inside).clamp_max(len(chosen) - 1)
        at = head[some, None], chosen[listed]
        weights = None if fitted.weights is None else fitted.weights[segments[some]].float()
        keys, values = writing.keys[at].float(), writing.values[at].float()
        every, tables = write_sign_pages(SignRows(keys, values, tokens[some], weights), layout)
        own = which[mine]
        laid = every[own - start, (first[mine] - begin[own]) // layout.page_tokens]
        _put(cells, cell[mine], laid)
        _put(cells, tables_at[some], tables)


def _put(cells: Tensor, first: Tensor, laid: Tensor) -> None:
    """Write bytes ``[n, bytes]`` into whole cells from each one's first on."""
    parts = laid.view(len(first), -1, cells.shape[1])
    cells[first[:, None] + torch.arange(parts.shape[1], device=cells.device)] = parts
