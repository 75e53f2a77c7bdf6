"""Decode attention over heads of different lengths, as head-wise budgets leave them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kvtune.profiles.kernel_table import Point
from kvtune.runtime.measure.grid import Grid
from kvtune.runtime.measure.operation import Operation, Setting, Wanted, Work, copies
from kvtune.runtime.measure.plain_model import random_tensor

SHARES = (0.1, 0.2, 0.4, 0.6, 0.9, 1.2, 1.8, 2.8)  # of the mean; they sum to 8


def _points(grid: Grid) -> Iterator[Wanted]:
    queries, kv_heads, width = grid.heads[0]
    for kernel in ("sdpa-padded", "jagged-loop"):
        for batch in grid.batches[:1] + grid.batches[3:4]:
            for length in grid.lengths[::3]:
                yield Wanted(
                    2,
                    Point(
                        "attention_decode", kernel, batch=batch, query_heads=queries,
                        kv_heads=kv_heads, head_dim=width, length=length, spread="ragged",
                    ),
                )  # fmt: skip


def _prepare(point: Point, setting: Setting) -> Work:
    lengths = [max(1, int(point.length * SHARES[h % len(SHARES)])) for h in range(point.kv_heads)]
    padded = point.kernel == "sdpa-padded"
    held = point.kv_heads * max(lengths) if padded else sum(lengths)
    moved = 4 * point.batch * point.head_dim * sum(lengths)
    groups = point.query_heads // point.kv_heads
    query = random_tensor(
        point.batch, point.kv_heads, groups, point.head_dim, device=setting.device, scale=1.0
    )
    count = copies(setting.grid, point, 4 * point.batch * point.head_dim * held)
    make = _padded if padded else _loop
    return Work([make(point, setting, query, lengths) for _ in range(count)], moved, most_calls=64)


def _padded(point: Point, setting: Setting, query: torch.Tensor, lengths: list[int]):  # type: ignore[no-untyped-def]
    """All heads at the longest one's length, masked: what a kernel without lengths must do."""
    longest = -(-max(lengths) // 8) * 8
    size = (point.batch, point.kv_heads, longest, point.head_dim)
    keys, values = (random_tensor(*size, device=setting.device, scale=1.0) for _ in range(2))
    seen = torch.arange(longest, device=setting.device) < torch.tensor(
        lengths, device=setting.device
    ).unsqueeze(1)
    mask = seen[None, :, None].expand(point.batch, -1, query.shape[2], -1)
    return lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def _loop(point: Point, setting: Setting, query: torch.Tensor, lengths: list[int]):  # type: ignore[no-untyped-def]
    """One call a head, each at its own length."""
    pairs = [
        [
            random_tensor(point.batch, 1, n, point.head_dim, device=setting.device, scale=1.0)
            for _ in range(2)
        ]
        for n in lengths
    ]

    def call() -> None:
        for head, (keys, values) in enumerate(pairs):
            F.scaled_dot_product_attention(query[:, head : head + 1], keys, values)

    return call


OPERATIONS = (Operation("attention_decode", _points, _prepare),)
