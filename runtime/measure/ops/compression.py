"""What a cache policy adds: scores and top-k, compaction, paged gathers, quantising and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvtune.profiles.kernel_table import Point
from kvtune.runtime.measure.grid import Grid
from kvtune.runtime.measure.operation import Operation, Setting, Wanted, Work, copies
from kvtune.runtime.measure.plain_model import random_tensor

WINDOW = 32  # queries that score a prompt, as SnapKV takes them
GROUP = 64  # numbers that share a scale and an offset
KEPT = 8  # one token in so many is kept
BITS = {"int8": 8, "int4": 4, "int2": 2}


def _points(
    op: str, kernel: str, formats: tuple[str, ...], turn: int
) -> Callable[[Grid], Iterator[Wanted]]:
    def points(grid: Grid) -> Iterator[Wanted]:
        queries, kv_heads, width = grid.heads[0]
        for number_format in formats:
            for length in grid.lengths[1::2]:
                yield Wanted(
                    turn,
                    Point(
                        op, kernel, number_format=number_format, batch=1, query_heads=queries,
                        kv_heads=kv_heads, head_dim=width, length=length,
                    ),
                )  # fmt: skip

    return points


def _layer(point: Point, setting: Setting, heads: int | None = None) -> list[Tensor]:
    """Keys or values ``[H, N, D]`` of one layer, as many as a cold call must rotate through."""
    size = (heads or point.kv_heads, point.length, point.head_dim)
    count = copies(setting.grid, point, 2 * size[0] * size[1] * size[2])
    return [random_tensor(*size, device=setting.device, scale=1.0) for _ in range(count)]


def _prepare_scores(point: Point, setting: Setting) -> Work:
    groups = point.query_heads // point.kv_heads
    query = random_tensor(
        point.kv_heads, groups * WINDOW, point.head_dim, device=setting.device, scale=1.0
    )
    layers = _layer(point, setting)
    kept = max(1, point.length // KEPT)

    def call(keys: Tensor) -> Tensor:
        weights = (query @ keys.transpose(1, 2)).float().softmax(-1)
        chosen: Tensor = weights.sum(1).topk(kept, dim=-1).indices
        return chosen

    moved = layers[0].nbytes + 10 * point.query_heads * WINDOW * point.length
    products = 2 * point.query_heads * WINDOW * point.length * point.head_dim
    return Work([lambda k=k: call(k) for k in layers], moved, products, 64)  # type: ignore[misc]


def _prepare_compaction(point: Point, setting: Setting) -> Work:
    """A random eighth of each head's tokens is moved together."""
    return _gathers(point, setting, max(1, point.length // KEPT), page=1)


def _prepare_pages(point: Point, setting: Setting) -> Work:
    """Random pages of 16 tokens are read, every token once."""
    return _gathers(point, setting, point.length, page=16)


def _gathers(point: Point, setting: Setting, kept: int, page: int) -> Work:
    layers = _layer(point, setting)
    order = torch.stack([
        torch.randperm(point.length // page, device=setting.device)[: -(-kept // page)]
        for _ in range(point.kv_heads)
    ])  # fmt: skip
    width = page * point.head_dim
    index = order[:, :, None].expand(-1, -1, width)
    paged = [part.view(point.kv_heads, point.length // page, width) for part in layers]
    return Work(
        [lambda p=p: p.gather(1, index) for p in paged],  # type: ignore[misc]
        4 * point.kv_heads * order.shape[1] * width,
        most_calls=64,
    )


def _grouped(part: Tensor) -> Tensor:
    """``[H, N, D]`` as ``[H, N, groups, numbers]``."""
    groups: Tensor = part.unflatten(-1, (-1, min(GROUP, part.shape[-1])))
    return groups


def quantise(numbers: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and offsets of groups along the last axis."""
    low, high = numbers.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((numbers - low) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, low


def dequantise(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The numbers that the codes stand for."""
    return codes.to(scale.dtype).mul_(scale).add_(low)


def _prepare_quantise(point: Point, setting: Setting) -> Work:
    layers = _layer(point, setting)
    if point.number_format == "fp8":
        return Work(
            [lambda p=p: p.to(torch.float8_e4m3fn) for p in layers],  # type: ignore[misc]
            layers[0].nbytes * 3 // 2,
        )
    bits = BITS[point.number_format]
    grouped = [_grouped(part) for part in layers]
    return Work(
        [lambda p=p: quantise(p, bits) for p in grouped],  # type: ignore[misc]
        layers[0].nbytes * 3 // 2 + layers[0].nbytes * 2 // GROUP,
        most_calls=64,
    )


def _prepare_dequantise(point: Point, setting: Setting) -> Work:
    layers = _layer(point, setting)
    moved = layers[0].nbytes * 3 // 2
    if point.number_format == "fp8":
        narrow = [part.to(torch.float8_e4m3fn) for part in layers]
        return Work([lambda p=p: p.to(torch.bfloat16) for p in narrow], moved)  # type: ignore[misc]
    bits = BITS[point.number_format]
    coded = [quantise(_grouped(part), bits) for part in layers]
    return Work(
        [lambda p=p: dequantise(*p) for p in coded],  # type: ignore[misc]
        moved + layers[0].nbytes * 2 // GROUP,
        most_calls=64,
    )


_FORMATS = ("fp8", "int8", "int4")

OPERATIONS = (
    Operation(
        "score_topk", _points("score_topk", "torch-matmul-topk", ("bf16",), 1), _prepare_scores
    ),
    Operation("compact", _points("compact", "torch-gather", ("bf16",), 1), _prepare_compaction),
    Operation(
        "gather_pages", _points("gather_pages", "torch-gather", ("bf16",), 2), _prepare_pages
    ),
    Operation("quantise", _points("quantise", "torch", _FORMATS, 1), _prepare_quantise),
    Operation("dequantise", _points("dequantise", "torch", _FORMATS, 1), _prepare_dequantise),
)
