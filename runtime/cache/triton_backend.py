"""Reads and writes pages of the KV cache by Triton kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kvtune.policies.page_formats import is_blocks
from kvtune.runtime.cache.backend import AttentionSeen, Fetching, Growing, Moves, Writing
from kvtune.runtime.cache.block_pages import write_blocks
from kvtune.runtime.cache.fitted_pages import write_fitted
from kvtune.runtime.cache.host_pool import HostPool
from kvtune.runtime.cache.token_bytes import Copies
from kvtune.runtime.kernels.launch import Paged, Scratch, Seating, decode, decode_seated
from kvtune.runtime.rotation import Rotation


class TritonBackend:
    """The backend in Triton kernels; each of its methods is one launch."""

    has_kernels: ClassVar[bool] = True

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
        """Append rotated keys and return rotated queries by one kernel: half its programs append,
        the others rotate queries."""
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
        self,
        q: Tensor,
        layer: Paged,
        scratch: Scratch,
        scale: float,
        seen: AttentionSeen | None = None,
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


def _appending(layer: Paged, growing: Growing, keys: Tensor, values: Tensor) -> tuple[Any, ...]:
    """Arguments of ``append_token``."""
    window = 0 if growing.places is None else growing.places.shape[1]
    return (
        keys, values, keys.stride()[:2], values.stride()[:2], growing.segments, growing.tables_at,
        layer.table, layer.lengths, layer.typed[1], keys.shape[1],
        layer.head_dim, growing.places, growing.entered, window,
    )  # fmt: skip
