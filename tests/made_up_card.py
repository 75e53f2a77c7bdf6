"""A made-up card whose every kernel follows a known law, to put steps together from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.kernel_table import KernelRow, Point
from kvtune.profiles.models import find_model
from kvtune.simulator.latency.kernels import Kernels
from kvtune.simulator.latency.parts import layer_matrices

LLAMA, H100, H200 = find_model("llama-8b"), find_gpu("h100"), find_gpu("h200")
BANDWIDTH, RATE, FLOOR_S = 3.0e12, 700e12, 2e-6
BATCHES, LENGTHS = (1, 4, 16), (1024, 4096, 16384, 65536)


def law(bytes_: float, flops: float = 0.0) -> float:
    """Seconds of any kernel of the made-up card."""
    return FLOOR_S + max(bytes_ / BANDWIDTH, flops / RATE)


def row(point: Point, bytes_: int, flops: int = 0, seconds: float | None = None) -> KernelRow:
    us = 1e6 * (law(bytes_, flops) if seconds is None else seconds)
    return KernelRow(point, "test", bytes_, flops, us, us, us, 3)


def table() -> Iterator[KernelRow]:
    sizes = (*layer_matrices(LLAMA), (LLAMA.vocab_size, LLAMA.hidden_size), (1024, 1024))
    for rows in (1, 4, 16, 8192):
        for out, wide in sizes:
            point = Point("linear", "k", rows=rows, width_in=wide, width_out=out)
            yield row(point, 2 * out * wide, 2 * rows * out * wide)
        for op in ("rms_norm", "rope", "gated", "residual", "argmax", "embedding"):
            yield row(Point(op, "k", rows=rows, width_in=4096, l2="warm"), 4 * rows * 4096)
    for batch in BATCHES:
        heads: dict[str, Any] = {"query_heads": 32, "kv_heads": 8, "head_dim": 128}
        yield row(Point("append", "k", batch=batch, **heads), 4096 * batch)
        for length in LENGTHS:
            point = Point("attention_decode", "k", batch=batch, length=length, **heads)
            yield row(point, 4096 * batch * length)
    for op in ("attention_prefill", "score_topk", "compact", "quantise"):
        for length in (1024, 8192, 32768):
            form = "int4" if op == "quantise" else "bf16"
            point = Point(op, "k", number_format=form, batch=1, length=length, query_heads=32,
                          kv_heads=8, head_dim=128)  # fmt: skip
            yield row(point, 4096 * length, 8192 * length * length)
    for size in (2**12, 2**28):
        point = Point("host_to_device", "pinned", "eager", width_in=size)
        yield row(point, size, seconds=1e-5 + size / 50e9)


ROWS = tuple(table())
KERNELS = Kernels(ROWS)


def paged_rows() -> Iterator[KernelRow]:
    """Attention over pages: int4 takes twice what its bytes say."""
    heads: dict[str, Any] = {"query_heads": 32, "kv_heads": 8, "head_dim": 128}
    for form, bits, slower in (("bf16", 16, 1.0), ("int4", 4, 2.0)):
        for batch in (1, 8):
            for length in (1024, 65536):
                point = Point("attention_paged", "k", number_format=form, batch=batch,
                              length=length, **heads)  # fmt: skip
                size = 2048 * batch * length * bits // 8
                yield row(point, size, seconds=slower * law(size))
