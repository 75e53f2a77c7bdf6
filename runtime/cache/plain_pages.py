"""Pages in plain torch, all of a layer at once: a few dozen operations for any number of pages.

A step's time on a CPU is that of its operations, not of its bytes: one page after another took
twenty operations a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtune.policies.page_formats import BF16_PAGE
from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.page_map import Pages, pages_with_tokens
from kvtune.runtime.kernels.launch import Paged, Seating
from kvtune.runtime.kernels.reference import read_pages
from kvtune.runtime.kernels.reference_signs import read_sign_pages

if TYPE_CHECKING:
    from kvtune.runtime.cache.backend import Growing, Seen


def attend_pages(q: Tensor, layer: Paged, scale: float, seen: Seen | None) -> Tensor:
    """Attention ``[rows, G, D]`` of ``q`` like it over every page of its row, in float32."""
    queries = q.float() * scale
    read = []
    for pages, tokens in pages_with_tokens(layer):
        keys, values = _read(layer, pages)
        logits = torch.bmm(queries[pages.rows], keys.mT)
        if seen is not None and seen.logits is not None:
            _note(seen.logits, logits, pages)
        places = torch.arange(pages.layout.page_tokens, device=q.device)
        beyond = places >= tokens[:, None, None]
        if beyond.any():
            logits.masked_fill_(beyond, -torch.inf)
            values = values.masked_fill(beyond.mT, 0)
        read.append((pages.rows, logits, values))
    output, lse = _merged(queries, read)
    if seen is not None:
        seen.lse.copy_(lse)
    return output.to(q.dtype)


def records_in_order(layer: Paged, seating: Seating, sequences: int) -> Tensor:
    """Tiles of a step's sequences, ``[n, 16]``, with rows as if there were no seats."""
    seats = seating.seats[:sequences].long()
    records = layer.tiles.view(seating.all_seats, seating.tiles, -1)[seats.clamp_min(0)]
    sequence = torch.arange(sequences, device=seats.device)[:, None]
    records[..., 0] = sequence * seating.heads + records[..., -1]
    records[seats < 0, :, 1] = -1  # no layout: of an empty seat
    return records.flatten(0, 1)


def _merged(queries: Tensor, read: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax a row over parts of its logits; zeros and minus infinity where there are none."""
    most = queries.new_full(queries.shape[:2], -torch.inf)
    for rows, logits, _ in read:
        largest = logits.amax(-1)
        most.scatter_reduce_(0, rows[:, None].expand_as(largest), largest, "amax")
    total, output = torch.zeros_like(most), torch.zeros_like(queries)
    for rows, logits, values in read:
        weights = (logits - most[rows][..., None]).exp_()
        total.index_add_(0, rows, weights.sum(-1))
        output.index_add_(0, rows, torch.bmm(weights, values))
    return output / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None], most + total.log()


def _read(layer: Paged, pages: Pages) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, tokens, D]`` float32."""
    layout = pages.layout
    if not layout.has_tables:
        return read_pages(_bytes(layer, pages), layout, layer.fp8_scales[pages.segments])
    inside = torch.arange(layout.tables.page_cells, device=layer.pool.device)
    cells = layer.pool.view(-1, layout.cell_bytes)
    tables = cells[pages.tables[:, None] + inside].flatten(1)
    return read_sign_pages(_bytes(layer, pages), tables, layout)


def _bytes(layer: Paged, pages: Pages) -> Tensor:
    """The pages' own bytes, ``[n, page_bytes]``."""
    cells = layer.pool.view(-1, pages.layout.cell_bytes)
    return cells[pages.cells].flatten(1)[:, : pages.layout.page_bytes]


def _note(all_logits: Tensor, logits: Tensor, pages: Pages) -> None:
    """Logits at their places, ``[G, places]``."""
    inside = torch.arange(pages.layout.page_tokens, device=logits.device)
    columns = pages.places[:, None] + inside
    all_logits[:, columns.flatten()] = logits.transpose(0, 1).flatten(1)


def append_rows(layer: Paged, growing: Growing, keys: Tensor, values: Tensor) -> None:
    """One token a sequence, ``[B, H, D]``, into the growing pages, and count it."""
    segments, tables_at = growing.segments.long(), growing.tables_at.long()
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    lengths = layer.lengths[segments].long()
    places = _places(growing, lengths)
    if (ended := segments < 0).any():
        every = segments, tables_at, keys, values, lengths, places
        segments, tables_at, keys, values, lengths, places = (x[~ended] for x in every)
    layout = PageLayout(layer.head_dim)
    cells = layer.table[tables_at + places // BF16_PAGE].long()
    pages = layer.typed[1].view(-1, layout.cell_bytes // 2)
    fresh = (places == lengths) & (places % BF16_PAGE == 0)
    if fresh.any():
        size = torch.arange(layout.page_cells, device=cells.device)
        pages[cells[fresh][:, None] + size] = 0
    flat = pages.view(-1)
    at = cells * pages.shape[1] + places % BF16_PAGE * layer.head_dim
    channels = at[:, None] + torch.arange(layer.head_dim, device=cells.device)
    flat[channels] = keys.to(flat.dtype)
    flat[channels + BF16_PAGE * layer.head_dim] = values.to(flat.dtype)
    layer.lengths[segments] = torch.maximum(lengths, places + 1).to(layer.lengths.dtype)


def _places(growing: Growing, lengths: Tensor) -> Tensor:
    """Where each row's next token goes: at the end, or where a sliding layer says; counts it."""
    if growing.places is None or growing.entered is None:
        return lengths
    turn = growing.entered.long() % growing.places.shape[1]
    growing.entered.add_(1)
    return growing.places.long().gather(1, turn[:, None])[:, 0]
