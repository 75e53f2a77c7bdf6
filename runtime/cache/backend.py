"""Who works on pages: Triton kernels on a GPU, plain torch elsewhere. Same pages, same answers."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvtune.policies.page_formats import BF16_PAGE, is_blocks
from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.block_pages import write_blocks
from kvtune.runtime.cache.fitted_pages import Fitted, write_fitted
from kvtune.runtime.cache.host_pool import HostPool
from kvtune.runtime.cache.plain_pages import append_rows, attend_pages, records_in_order
from kvtune.runtime.cache.token_bytes import Copies, copy_tokens
from kvtune.runtime.kernels.launch import Paged, Scratch, Seating, decode, decode_seated
from kvtune.runtime.kernels.reference import rotate, write_page
from kvtune.runtime.rotation import Rotation


@dataclass(frozen=True)
class Writing:
    """Kept tokens of several heads on their way into pages of one layout.

    Args:
        layout: of the pages.
        keys: ``[H, P, D]``.
        values: ``[H, P, D]``.
        chosen: int32 token indices, one list after another.
        records: ``[pages, 5]`` int32: head, first place in ``chosen``, tokens, cell, segment.
        fp8_scales: ``[segments, 2]`` float32.
        fitted: of pages that are read by tables, where these go; else None.
    """

    layout: PageLayout
    keys: Tensor
    values: Tensor
    chosen: Tensor
    records: Tensor
    fp8_scales: Tensor
    fitted: Fitted | None = None


class Backend(Protocol):
    """Writes, appends and attends; every method changes pages only where it says so.

    Attributes:
        reads_packed: whether it reads packed buffers where they lie (``packed_parts``).
    """

    reads_packed: ClassVar[bool]

    def write(self, pool: Tensor, writing: Writing) -> None:
        """Gather, quantise and pack whole pages."""

    def append(self, layer: Paged, growing: Growing, keys: Tensor, values: Tensor) -> None:
        """Put one token a sequence, ``[B, H, D]``, into growing segments; counts their lengths."""

    def append_rotated(
        self, layer: Paged, growing: Growing, rotation: Rotation, values: Tensor
    ) -> Tensor:
        """The same of keys that are rotated first; the rotated queries, ``[B, Hq, 1, D]``."""

    def move(self, layer: Paged, growing: Growing, moves: Moves) -> None:
        """Move tokens within growing segments; lengths are the caller's."""

    def attend(
        self, q: Tensor, layer: Paged, scratch: Scratch, scale: float, seen: Seen | None = None
    ) -> Tensor:
        """Output ``[rows, G, D]`` of ``q`` like it; fills in ``seen`` where it is given."""

    def append_seated(self, layer: Paged, seating: Seating, keys: Tensor, values: Tensor) -> None:
        """Put one token, ``[B, H, D]``, into the growing segments of each sequence with a seat."""

    def attend_seated(
        self, q: Tensor, layer: Paged, seating: Seating, scratch: Scratch, scale: float, out: Tensor
    ) -> None:
        """Fill in ``out`` ``[B, Hq, D]`` where a sequence has a seat, of ``q`` like it."""

    def fetch(self, pool: Tensor, host: HostPool, fetching: Fetching) -> None:
        """Copy blocks from the host into the pool."""

    def copy_tokens(self, copies: Copies) -> None:
        """Copy single tokens between pages whose tokens share no scale."""


@dataclass(frozen=True)
class Fetching:
    """Blocks of 64 tokens on their way from the host to the device.

    Args:
        places: in the host's pool, ``[n]`` int64; -1 copies nothing.
        cells: first ones of the pool, ``[n]`` int32.
        layout: of the blocks' pages, which lie side by side.
    """

    places: Tensor
    cells: Tensor
    layout: PageLayout


@dataclass(frozen=True)
class Moves:
    """Tokens of some rows that take other places of their growing segments.

    Args:
        rows: ``[n]`` int32.
        sources: ``[n, m]`` int32 places; where it is the target too, nothing moves.
        targets: ``[n, m]`` int32 places, none of which is another's source.
    """

    rows: Tensor
    sources: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Seen:
    """What attention looked at: ``exp(logits - lse)`` are its weights.

    Args:
        lse: ``[rows, G]`` float32, natural log-sum-exp.
        logits: ``[G, tokens that there are pages for]`` float32, scaled, segment by segment; beyond
            a segment's tokens anything. None where they are not wanted.
    """

    lse: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Growing:
    """Each row's segment of new tokens.

    Args:
        segments: ``[rows]`` int32; negative where the row's sequence has ended.
        tables_at: ``[rows]`` int32, its first entry in the page table.
        places: of a sliding layer, ``[rows, window]`` int32: where the g-th new token goes.
        entered: likewise, ``[rows]`` int32 new tokens so far.
    """

    segments: Tensor
    tables_at: Tensor
    places: Tensor | None = None
    entered: Tensor | None = None


class TritonBackend:
    """Attention and pages by Triton kernels, a launch for each method."""

    reads_packed: ClassVar[bool] = True

    def write(self, pool: Tensor, writing: Writing) -> None:
        """Write pages by one kernel; blocks in plain torch, and rows of signs, since all of a
        head's tokens decide their codes."""
        from kvtune.runtime.kernels.pages import store_pages

        if writing.fitted is not None:
            write_fitted(pool, writing, writing.fitted)
            return
        write_blocks(pool, writing)
        keys, values, layout = writing.keys, writing.values, writing.layout
        if is_blocks(layout.keys) and is_blocks(layout.values):
            return
        store_pages[(len(writing.records),)](
            keys, values, keys.stride(0), keys.stride(1), writing.chosen,
            writing.records, writing.fp8_scales,
            pool, pool.view(torch.float16), pool.view(torch.bfloat16),
            pool.view(torch.float8_e4m3fn),
            layout.head_dim, *layout.codes,
        )  # fmt: skip

    def append(self, layer: Paged, growing: Growing, keys: Tensor, values: Tensor) -> None:
        """Append one token a sequence by one kernel, and count the lengths."""
        from kvtune.runtime.kernels.appending import append_token

        append_token[(len(growing.segments),)](*_appending(layer, growing, keys, values))

    def append_rotated(
        self, layer: Paged, growing: Growing, rotation: Rotation, values: Tensor
    ) -> Tensor:
        """One kernel, of which half of the programs append and the others rotate queries."""
        from kvtune.runtime.kernels.appending import append_rotated

        q, k, cos, sin = rotation.q, rotation.k, rotation.cos, rotation.sin
        rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        group = q.shape[1] // k.shape[1]
        members = 1 << (group - 1).bit_length()
        append_rotated[(len(growing.segments), 2)](
            q, rotated, cos, sin, q.stride()[:2], cos.stride(0) if len(cos) > 1 else 0,
            *_appending(layer, growing, k[:, :, 0], values), group, members,
            num_warps=max(1, members * layer.head_dim // 1024),
        )  # fmt: skip
        return rotated

    def move(self, layer: Paged, growing: Growing, moves: Moves) -> None:
        """Move tokens within growing segments by one kernel."""
        from kvtune.runtime.kernels.appending import move_tokens

        move_tokens[(moves.sources.numel(),)](
            moves.rows, moves.sources, moves.targets, moves.sources.shape[1], growing.tables_at,
            layer.table, layer.typed[1], layer.head_dim,
        )  # fmt: skip

    def attend(
        self, q: Tensor, layer: Paged, scratch: Scratch, scale: float, seen: Seen | None = None
    ) -> Tensor:
        """Attend to all pages by one kernel, whose last program of a row merges its parts."""
        if seen is None:
            return decode(q, layer, scratch, scale)
        return decode(q, layer, scratch, scale, lse=seen.lse, logits=seen.logits)

    def append_seated(self, layer: Paged, seating: Seating, keys: Tensor, values: Tensor) -> None:
        """Append one token to each sequence with a seat, by one kernel."""
        from kvtune.runtime.kernels.appending import append_seated

        append_seated[(len(keys), seating.heads)](
            keys, values, keys.stride()[:2], values.stride()[:2], seating.seats,
            layer.table, layer.lengths, layer.typed[1],
            seating.first_segment, seating.room, seating.growing, seating.heads, layer.head_dim,
            num_warps=1,
        )  # fmt: skip

    def attend_seated(
        self, q: Tensor, layer: Paged, seating: Seating, scratch: Scratch, scale: float, out: Tensor
    ) -> None:
        """Attend for the sequences with a seat by one kernel."""
        decode_seated(q, layer, seating, scratch, scale, out)

    def fetch(self, pool: Tensor, host: HostPool, fetching: Fetching) -> None:
        """Copy blocks by one kernel, which reads pinned memory over the bus without the host."""
        from kvtune.runtime.kernels.appending import FETCHED_AT_ONCE, fetch_blocks

        layout = fetching.layout
        words = layout.block_bytes // 8
        fetch_blocks[(len(fetching.places), -(-words // FETCHED_AT_ONCE))](
            host.addresses, fetching.places, fetching.cells, pool.view(torch.int64),
            host.slab_bytes, layout.cell_bytes // 8, words, FETCHED_AT_ONCE,
        )  # fmt: skip

    def copy_tokens(self, copies: Copies) -> None:
        """Copy tokens by one kernel."""
        from kvtune.runtime.kernels.token_copies import launch

        launch(copies)


class PlainBackend:
    """Plain torch: what the kernels are tested against, and what answers without a GPU."""

    reads_packed: ClassVar[bool] = False

    def write(self, pool: Tensor, writing: Writing) -> None:
        """Write a page at a time; pages of signs, and of blocks alone, all together."""
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
        """All rows at once."""
        append_rows(layer, growing, keys, values)

    def append_rotated(
        self, layer: Paged, growing: Growing, rotation: Rotation, values: Tensor
    ) -> Tensor:
        """Rotates all in float32, and appends."""
        q, k = (rotate(x, rotation.cos, rotation.sin) for x in (rotation.q, rotation.k))
        self.append(layer, growing, k[:, :, 0], values)
        return q

    def move(self, layer: Paged, growing: Growing, moves: Moves) -> None:
        """A token at a time."""
        for row, sources, targets in zip(*(x.tolist() for x in vars(moves).values()), strict=True):
            pages = self._growing_pages(layer, growing, row)
            for source, target in zip(sources, targets, strict=True):
                token = pages[source // BF16_PAGE][:, source % BF16_PAGE]
                pages[target // BF16_PAGE][:, target % BF16_PAGE] = token.clone()

    def attend(
        self, q: Tensor, layer: Paged, scratch: Scratch, scale: float, seen: Seen | None = None
    ) -> Tensor:
        """Dequantise all pages of a layout at once, then attend in float32."""
        return attend_pages(q, layer, scale, seen)

    def append_seated(self, layer: Paged, seating: Seating, keys: Tensor, values: Tensor) -> None:
        """All rows of sequences that have a seat at once."""
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
        """As ``attend``, over the tiles of the seats in the order of the sequences."""
        rows = q.reshape(len(q) * seating.heads, -1, q.shape[-1])
        tiles = records_in_order(layer, seating, len(q))
        found = attend_pages(rows, replace(layer, tiles=tiles), scale, None).view(q.shape)
        there = seating.seats[: len(q)] >= 0
        out[there] = found[there].to(out.dtype)

    def fetch(self, pool: Tensor, host: HostPool, fetching: Fetching) -> None:
        """A block at a time."""
        size, cell_bytes = fetching.layout.block_bytes, fetching.layout.cell_bytes
        pairs = zip(fetching.places.tolist(), fetching.cells.tolist(), strict=True)
        for place, cell in pairs:
            if place >= 0:
                pool[cell * cell_bytes :][:size] = host.view(place, size)

    def copy_tokens(self, copies: Copies) -> None:
        """All tokens at once."""
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


def _appending(layer: Paged, growing: Growing, keys: Tensor, values: Tensor) -> tuple[Any, ...]:
    """Arguments of ``append_token``."""
    window = 0 if growing.places is None else growing.places.shape[1]
    return (
        keys, values, keys.stride()[:2], values.stride()[:2], growing.segments, growing.tables_at,
        layer.table, layer.lengths, layer.typed[1], keys.shape[1],
        layer.head_dim, growing.places, growing.entered, window,
    )  # fmt: skip


def backend_type(device: Any) -> type[TritonBackend] | type[PlainBackend]:
    """Kernels where there is a GPU and Triton; else plain torch."""
    has_kernels = torch.device(device).type == "cuda" and importlib.util.find_spec("triton")
    return TritonBackend if has_kernels else PlainBackend


def backend_for(device: Any) -> Backend:
    """What ``backend_type`` says; with a warning where that is slow."""
    found = backend_type(device)
    if found is PlainBackend:
        warnings.warn(
            f"kvtune's kernels need a CUDA device and Triton; on {device} the cache answers "
            "rightly in plain torch, slowly",
            stacklevel=2,
        )
    return found()
