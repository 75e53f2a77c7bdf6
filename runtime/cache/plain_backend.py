"""Reads and writes pages of the KV cache in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from kvtune.policies.page_formats import BF16_PAGE, is_blocks
from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.backend import AttentionSeen, Fetching, Growing, Moves, Writing
from kvtune.runtime.cache.block_pages import write_blocks
from kvtune.runtime.cache.fitted_pages import write_fitted
from kvtune.runtime.cache.host_pool import HostPool
from kvtune.runtime.cache.plain_pages import append_rows, attend_pages, records_in_order
from kvtune.runtime.cache.token_bytes import Copies, copy_tokens
from kvtune.runtime.kernels.launch import Paged, Scratch, Seating
from kvtune.runtime.kernels.reference import rotate, write_page
from kvtune.runtime.rotation import Rotation


class PlainBackend:
    """The backend in plain torch: kernels are tested against it, and it serves where no GPU is."""

    has_kernels: ClassVar[bool] = False

    def write(self, pool: Tensor, writing: Writing) -> None:
        """Write one page after another; pages of signs, and of blocks alone, in one call."""
        layout = writing.layout
        if writing.fitted is not None:
            write_fitted(pool, writing, writing.fitted)
            return
        if is_blocks(layout.keys) and is_blocks(layout.values):
            write_blocks(pool, writing)
            return
        for head, first, count, cell, segment in writing.records.tolist():
            at = writing.chosen[first : first + count].long()
            page = write_page(
                writing.keys[head, at], writing.values[head, at], layout,
                writing.fp8_scales[segment],
            )  # fmt: skip
            pool[cell * layout.cell_bytes :][: layout.page_bytes] = page

    def append(self, layer: Paged, growing: Growing, keys: Tensor, values: Tensor) -> None:
        """Append one token to every row, all rows in one indexed write."""
        append_rows(layer, growing, keys, values)

    def append_rotated(
        self, layer: Paged, growing: Growing, rotation: Rotation, values: Tensor
    ) -> Tensor:
        """Rotate queries and keys in float32, append keys and values, and return the queries."""
        q, k = (rotate(x, rotation.cos, rotation.sin) for x in (rotation.q, rotation.k))
        self.append(layer, growing, k[:, :, 0], values)
        return q

    def move(self, layer: Paged, growing: Growing, moves: Moves) -> None:
        """Move one token after another to its new place in its row's growing pages."""
        for row, sources, targets in zip(*(x.tolist() for x in vars(moves).values()), strict=True):
            pages = self._growing_pages(layer, growing, row)
            for source, target in zip(sources, targets, strict=True):
                token = pages[source // BF16_PAGE][:, source % BF16_PAGE]
                pages[target // BF16_PAGE][:, target % BF16_PAGE] = token.clone()

    def attend(
        self,
        q: Tensor,
        layer: Paged,
        scratch: Scratch,
        scale: float,
        seen: AttentionSeen | None = None,
    ) -> Tensor:
        """Dequantise all pages of a layout at once, then attend in float32."""
        return attend_pages(q, layer, scale, seen)

    def append_seated(self, layer: Paged, seating: Seating, keys: Tensor, values: Tensor) -> None:
        """Append one token to every row of the sequences that have a seat, in one indexed write."""
        seats = seating.seats[: len(keys)].long()
        there, head = seats >= 0, torch.arange(seating.heads, device=seats.device)
        seat = seats[there][:, None]
        segments = seating.first_segment + seat * seating.heads + head
        tables_at = seat * seating.room + head * seating.growing
        growing = Growing(segments.flatten(), tables_at.flatten())
        append_rows(layer, growing, keys[there], values[there])

    def attend_seated(
        self, q: Tensor, layer: Paged, seating: Seating, scratch: Scratch, scale: float, out: Tensor
    ) -> None:
        """Attend for sequences that have a seat, over their tiles in the order of the sequences."""
        rows = q.reshape(len(q) * seating.heads, -1, q.shape[-1])
        tiles = records_in_order(layer, seating, len(q))
        found = attend_pages(rows, replace(layer, tiles=tiles), scale, None).view(q.shape)
        there = seating.seats[: len(q)] >= 0
        out[there] = found[there].to(out.dtype)

    def fetch(self, pool: Tensor, host: HostPool, fetching: Fetching) -> None:
        """Copy one block of 64 tokens after another from the host into the pool."""
        size, cell_bytes = fetching.layout.block_bytes, fetching.layout.cell_bytes
        pairs = zip(fetching.places.tolist(), fetching.cells.tolist(), strict=True)
        for place, cell in pairs:
            if place >= 0:
                pool[cell * cell_bytes :][:size] = host.view(place, size)

    def copy_tokens(self, copies: Copies) -> None:
        """Copy all tokens in one indexed write."""
        copy_tokens(copies)

    def _growing_pages(self, layer: Paged, growing: Growing, row: int) -> list[Tensor]:
        """Views ``[2, tokens, D]`` of a row's pages."""
        layout = PageLayout(layer.head_dim)
        first = int(growing.tables_at[row])
        last = first + layer.growing_pages
        return [
            layer.pool[c * layout.cell_bytes :][: layout.page_bytes]
            .view(torch.bfloat16)
            .view(2, BF16_PAGE, -1)
            for c in layer.table[first:last].tolist()
        ]
