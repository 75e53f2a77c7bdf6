"""Decode and prefill attention in bf16, as torch's kernels do it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kvtune.profiles.kernel_table import Point
from kvtune.runtime.measure.grid import Grid, Heads
from kvtune.runtime.measure.operation import Operation, Setting, Wanted, Work, copies
from kvtune.runtime.measure.plain_model import append, attend, random_tensor

KERNEL = "sdpa-flash"
SCORES_BYTES_MOST = 5 * 10**9


def _decode(heads: Heads, batch: int, length: int, l2: str = "cold") -> Point:
    return Point(
        "attention_decode", KERNEL, batch=batch, query_heads=heads[0], kv_heads=heads[1],
        head_dim=heads[2], length=length, l2=l2,  # type: ignore[arg-type]
    )  # fmt: skip


def _decode_points(grid: Grid) -> Iterator[Wanted]:
    main, *others = grid.heads
    for turn, batches in ((0, grid.batches), (1, grid.more_batches)):
        for batch in batches:
            for length in grid.lengths:
                if grid.cache_fits(batch, length, main):
                    yield Wanted(turn, _decode(main, batch, length))
    for heads in others:
        for batch in grid.batches[::2]:
            for length in grid.lengths[::3]:
                if grid.cache_fits(batch, length, heads):
                    yield Wanted(2, _decode(heads, batch, length))
    for batch in grid.batches[:2]:
        yield Wanted(3, _decode(main, batch, grid.lengths[0], "warm"))


def _prepare_decode(point: Point, setting: Setting) -> Work:
    size = (point.batch, point.kv_heads, point.length, point.head_dim)
    cache = 4 * point.batch * point.kv_heads * point.length * point.head_dim
    query_size = (point.batch, point.query_heads, point.head_dim)
    query = random_tensor(*query_size, device=setting.device, scale=1.0)
    buffers = [
        tuple(random_tensor(*size, device=setting.device, scale=1.0) for _ in range(2))
        for _ in range(copies(setting.grid, point, cache))
    ]
    return Work(
        [lambda b=b: attend(query, b[0], b[1]) for b in buffers],  # type: ignore[misc]
        cache + 2 * query.nbytes,
        4 * point.batch * point.query_heads * point.length * point.head_dim,
    )


def _append_points(grid: Grid) -> Iterator[Wanted]:
    queries, kv_heads, width = grid.heads[0]
    for turn, batches in ((0, grid.batches), (1, grid.more_batches)):
        for batch in batches:
            yield Wanted(
                turn,
                Point(
                    "append", "torch-copy", batch=batch, query_heads=queries, kv_heads=kv_heads,
                    head_dim=width, length=1024, rows=batch, width_out=kv_heads * width,
                ),
            )  # fmt: skip


def _prepare_append(point: Point, setting: Setting) -> Work:
    size = (point.batch, point.kv_heads, point.length, point.head_dim)
    new = random_tensor(point.batch, point.kv_heads, point.head_dim, device=setting.device)
    caches = [random_tensor(*size, device=setting.device) for _ in range(4)]
    return Work([lambda c=c: append(c, new) for c in caches], 2 * new.nbytes)  # type: ignore[misc]


def _prefill_points(grid: Grid) -> Iterator[Wanted]:
    for index, heads in enumerate(grid.heads):
        for length in grid.prompts if index == 0 else grid.prompts[1::3]:
            for op in ("attention_prefill", "attention_prefill_scores"):
                scores = 2 * heads[0] * length * length
                if op == "attention_prefill" or 3 * scores <= SCORES_BYTES_MOST:
                    yield Wanted(1 if index == 0 else 3, _prefill(op, heads, length))


def _prefill(op: str, heads: Heads, length: int) -> Point:
    kernel = KERNEL if op == "attention_prefill" else "torch-matmul-softmax"
    return Point(
        op, kernel, batch=1, query_heads=heads[0], kv_heads=heads[1], head_dim=heads[2],
        length=length,
    )  # fmt: skip


def _prepare_prefill(point: Point, setting: Setting) -> Work:
    sizes = (point.query_heads, point.kv_heads, point.kv_heads)
    query, keys, values = (
        random_tensor(1, heads, point.length, point.head_dim, device=setting.device, scale=1.0)
        for heads in sizes
    )
    pairs = point.length * (point.length + 1) // 2
    groups = point.query_heads // point.kv_heads
    wide_keys, wide_values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    return Work(
        [lambda: F.scaled_dot_product_attention(query, wide_keys, wide_values, is_causal=True)],
        2 * query.nbytes + keys.nbytes + values.nbytes,
        4 * point.query_heads * point.head_dim * pairs,
        most_calls=8,
    )  # fmt: skip


def _prepare_scores(point: Point, setting: Setting) -> Work:
    """Every weight is made and summed over the queries, as eager attention with scores does."""
    width, length = point.head_dim, point.length
    query = random_tensor(point.query_heads, length, width, device=setting.device, scale=1.0)
    groups = point.query_heads // point.kv_heads
    keys, values = (
        random_tensor(point.kv_heads, length, width, device=setting.device, scale=1.0)
        .repeat_interleave(groups, 0)
        for _ in range(2)
    )  # fmt: skip
    later = torch.ones(length, length, dtype=torch.bool, device=setting.device).triu(1)

    def call() -> object:
        weights = (query @ keys.transpose(1, 2)).masked_fill_(later, float("-inf"))
        weights = (weights * width**-0.5).softmax(-1)
        return weights @ values, weights.sum(1)

    scores = 2 * point.query_heads * length * length
    return Work([call], 6 * scores, 4 * point.query_heads * width * length * length, most_calls=4)


OPERATIONS = (
    Operation("attention_decode", _decode_points, _prepare_decode),
    Operation("append", _append_points, _prepare_append),
    Operation(
        "attention_prefill",
        lambda grid: (w for w in _prefill_points(grid) if w.point.op == "attention_prefill"),
        _prepare_prefill,
    ),
    Operation(
        "attention_prefill_scores",
        lambda grid: (w for w in _prefill_points(grid) if w.point.op == "attention_prefill_scores"),
        _prepare_scores,
    ),
)
