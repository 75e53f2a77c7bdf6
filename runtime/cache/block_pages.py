"""Writing keys or values in blocks into pages: some pages at a time, in plain torch.

A token's codes need no other token, but their rules are the formats' own: none is written twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.policies.page_formats import is_blocks
from kvtune.runtime.cache.backend import Writing
from kvtune.runtime.kernels.reference_blocks import lay_blocks

_CODED_AT_ONCE = 2**23
"""Numbers that are coded at once; what this takes beside them is some ten times as many bytes."""


def write_blocks(pool: Tensor, writing: Writing) -> None:
    """Write the keys, the values, or both, of a layout where they lie in blocks."""
    layout = writing.layout
    for dim, (name, tensor, at) in enumerate(
        (
            (layout.keys, writing.keys, 0),
            (layout.values, writing.values, layout.value_codes),
        )
    ):
        if is_blocks(name):
            step = max(_CODED_AT_ONCE // (layout.page_tokens * layout.head_dim), 1)
            for start in range(0, len(writing.records), step):
                records = writing.records[start : start + step].long()
                _write(pool, writing, records, (name, tensor, at, dim))


def _write(
    pool: Tensor, writing: Writing, records: Tensor, part: tuple[str, Tensor, int, int]
) -> None:
    name, tensor, at, dim = part
    head, first, count, cell, segment = records.unbind(1)
    token = torch.arange(writing.layout.page_tokens, device=pool.device)
    place = first[:, None] + torch.minimum(token, count[:, None] - 1)
    rows = tensor[head[:, None], writing.chosen[place].long()]
    laid = lay_blocks(rows.float(), name, writing.fp8_scales[segment, dim], dim)
    start = cell * writing.layout.cell_bytes + at
    pool[start[:, None] + torch.arange(laid.shape[1], device=pool.device)] = laid
