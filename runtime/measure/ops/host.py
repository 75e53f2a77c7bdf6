"""What the host costs: copies to and from it, a launch, an empty step; and plain reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtune.profiles.kernel_table import Point
from kvtune.runtime.measure.grid import Grid
from kvtune.runtime.measure.operation import Operation, Setting, Wanted, Work, copies
from kvtune.runtime.measure.plain_model import random_tensor

EMPTY_STEP_KERNELS = 500
READ_BYTES = (2**28, 2**31)


def _transfer_points(grid: Grid) -> Iterator[Wanted]:
    for direction in ("host_to_device", "device_to_host"):
        for kernel in ("pinned", "pageable"):
            for size in grid.transfers:
                yield Wanted(1, Point(direction, kernel, "eager", width_in=size))


def _prepare_transfer(point: Point, setting: Setting) -> Work:
    pinned = point.kernel == "pinned" and setting.device == "cuda"
    host = torch.zeros(point.width_in, dtype=torch.uint8, pin_memory=pinned)
    device = torch.zeros(point.width_in, dtype=torch.uint8, device=setting.device)
    source, target = (host, device) if point.op == "host_to_device" else (device, host)
    calls = 4 if point.width_in > 2**22 else 32
    return Work([lambda: target.copy_(source, non_blocking=True)], point.width_in, 0, calls)


def _launch_points(grid: Grid) -> Iterator[Wanted]:
    yield Wanted(0, Point("launch", "torch-add", "eager", rows=1, l2="warm"))
    yield Wanted(0, Point("launch", "torch-add", "graph", rows=1, l2="warm"))
    yield Wanted(0, Point("empty_step", "torch-add", "graph", rows=EMPTY_STEP_KERNELS, l2="warm"))


def _prepare_launch(point: Point, setting: Setting) -> Work:
    """One kernel that does nothing to speak of; of the empty step, many of them are one call."""
    number = torch.zeros(1, device=setting.device)

    def call() -> None:
        for _ in range(point.rows):
            number.add_(1)

    return Work([call], 8 * point.rows, most_calls=1 if point.rows > 1 else 512)


def _read_points(grid: Grid) -> Iterator[Wanted]:
    for size in READ_BYTES:
        if size <= grid.cache_bytes_most:
            yield Wanted(0, Point("read", "torch-sum", width_in=size))


def _prepare_read(point: Point, setting: Setting) -> Work:
    count = copies(setting.grid, point, point.width_in)
    data = [
        random_tensor(point.width_in // 2, device=setting.device).view(torch.float32)
        for _ in range(count)
    ]
    return Work([lambda d=d: d.sum() for d in data], point.width_in, most_calls=16)  # type: ignore[misc]


OPERATIONS = (
    Operation(
        "host_to_device",
        lambda grid: (w for w in _transfer_points(grid) if w.point.op == "host_to_device"),
        _prepare_transfer,
    ),
    Operation(
        "device_to_host",
        lambda grid: (w for w in _transfer_points(grid) if w.point.op == "device_to_host"),
        _prepare_transfer,
    ),
    Operation(
        "launch",
        lambda grid: (w for w in _launch_points(grid) if w.point.op == "launch"),
        _prepare_launch,
    ),
    Operation(
        "empty_step",
        lambda grid: (w for w in _launch_points(grid) if w.point.op == "empty_step"),
        _prepare_launch,
    ),
    Operation("read", _read_points, _prepare_read),
)
