"""One measurement of the GPU of this machine, from the first look at it to its profile."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

import kvtune
from kvtune.common.errors import KvtuneError
from kvtune.common.files import write_text
from kvtune.common.progress import Progress
from kvtune.profiles.gpus import GpuProfile, detect_gpu, find_gpu
from kvtune.profiles.kernel_table import KernelRow, read_rows
from kvtune.profiles.measured import (
    GPU_FILE,
    KERNEL_FILE,
    UNITS,
    Capture,
    parse_measured_gpu,
)
from kvtune.runtime.measure.grid import FULL, QUICK, Grid
from kvtune.runtime.measure.memory import MemoryReading, read_memory
from kvtune.runtime.measure.monitor import SERIOUS, Monitor, open_monitor
from kvtune.runtime.measure.operation import Setting
from kvtune.runtime.measure.runner import Bench, Outcome, measure
from kvtune.runtime.measure.tune_session import tune_kernels

TUNING_SHARE = 0.25
"""Of a bounded run's time, at most."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        out: folder of the profile, made or gone on with.
        gpu: name of the card's datasheet profile; None to ask the driver.
        minutes: time bound; None for none.
        quick: fewer points.
        shared: measure though others use the GPU.
        command: as it was typed, for the profile's provenance.
    """

    out: Path
    gpu: str | None
    minutes: float | None
    quick: bool
    shared: bool
    command: str


def profile_gpu(request: Request, progress: Progress) -> Outcome:
    """Measure this machine's GPU and write its profile; finished rows are kept whatever happens.

    Raises:
        KvtuneError: no GPU, one without a datasheet profile, one that others use, or one that is
            throttled by heat before anything runs.
    """
    monitor = open_monitor()
    gpu = this_gpu(request.gpu)
    refuse_busy(monitor, request.shared)
    request.out.mkdir(parents=True, exist_ok=True)
    progress.note(f"measuring {gpu.name} into {request.out}")
    memory = read_memory()
    capture = _capture(request, monitor)
    _write_gpu(request, gpu, capture, memory)
    seconds = None if request.minutes is None else 60 * request.minutes
    begun = time.monotonic()
    dims = [width for _, _, width in _grid(request).heads]
    bound = TUNING_SHARE * (seconds or math.inf)
    tuned = tune_kernels(request.out, gpu.slug, dims, capture, bound, progress)
    left = None if seconds is None else seconds - (time.monotonic() - begun)
    outcome = _measure(request, gpu, monitor, progress, left)
    _write_gpu(request, gpu, capture, memory)
    return replace(outcome, tuned=tuned)


def this_gpu(name: str | None) -> GpuProfile:
    """The datasheet of the GPU that torch sees.

    Raises:
        KvtuneError: there is none, or none of that name.
    """
    import torch

    if not torch.cuda.is_available():
        raise KvtuneError(
            "there is no GPU here that PyTorch can use, so there is nothing to measure",
            hint="run it on the machine with the GPU; nvidia-smi must list it there.",
        )
    if name is not None:
        return find_gpu(name)
    return detect_gpu() or find_gpu(torch.cuda.get_device_name())


def refuse_busy(monitor: Monitor, shared: bool) -> None:
    """Refuse a GPU whose times would not be its own.

    Raises:
        KvtuneError: other processes are on it, or it is already slowed down.
    """
    others = monitor.other_processes()
    if others and not shared:
        raise KvtuneError(
            f"{others} other process{'es are' if others > 1 else ' is'} using this GPU; "
            "times would not be its own",
            hint="end them, or measure all the same with --shared.",
        )
    state = monitor.state()
    serious = [reason for reason in state.throttle.split("+") if reason in SERIOUS]
    if serious:
        raise KvtuneError(
            f"this GPU is slowed down before anything runs: {', '.join(serious)} "
            f"({state.celsius} C, {state.sm_mhz} MHz)",
            hint="let it cool down or look at its power and cooling, then try again.",
        )


def _grid(request: Request) -> Grid:
    return QUICK if request.quick else FULL


def _measure(
    request: Request,
    gpu: GpuProfile,
    monitor: Monitor,
    progress: Progress,
    seconds: float | None,
) -> Outcome:
    import torch

    from kvtune.runtime.measure.ops import all_operations
    from kvtune.runtime.measure.timer import cuda_timer

    torch.cuda.empty_cache()
    grid = _grid(request)
    free = torch.cuda.mem_get_info()[0]
    # A larger card gets longer caches: a layer's share of what the whole model's cache could take.
    grid = dataclasses.replace(grid, cache_bytes_most=max(grid.cache_bytes_most, free // 30))
    bench = Bench(
        gpu, Setting("cuda", grid), cuda_timer, f"torch {torch.__version__}", monitor, progress,
        release=torch.cuda.empty_cache,
    )  # fmt: skip
    return measure(request.out / KERNEL_FILE, all_operations(), bench, seconds)


def _capture(request: Request, monitor: Monitor) -> Capture:
    import torch

    return Capture(
        kvtune=kvtune.__version__,
        torch=str(torch.__version__),
        cuda=str(torch.version.cuda),
        driver=monitor.driver(),
        device=torch.cuda.get_device_name(),
        command=request.command,
        date=datetime.date.today().isoformat(),
    )


def _write_gpu(request: Request, gpu: GpuProfile, capture: Capture, memory: MemoryReading) -> None:
    table = request.out / KERNEL_FILE
    rows = read_rows(table) if table.is_file() else ()
    text = gpu_document(gpu.slug, vars(capture), figures(memory, rows))
    parse_measured_gpu(text, GPU_FILE)
    write_text(request.out / GPU_FILE, text)


def figures(memory: MemoryReading, rows: tuple[KernelRow, ...]) -> dict[str, float]:
    """Figures of a profile by name, those that could be measured."""
    found: dict[str, float | None] = {
        "memory_visible": memory.visible,
        "context": memory.context,
        "libraries": memory.libraries,
        "workspace": memory.workspace,
        "read_bandwidth": _most(rows, "read", "torch-sum"),
        "launch": _least(rows, "launch", "eager"),
        "graph_kernel": _least(rows, "launch", "graph"),
        "host_to_device": _most(rows, "host_to_device", "pinned"),
        "device_to_host": _most(rows, "device_to_host", "pinned"),
    }
    return {name: value for name, value in found.items() if value is not None and value > 0}


def gpu_document(slug: str, capture: dict[str, str], values: dict[str, float]) -> str:
    """The text of ``gpu.yaml``."""
    source = f"measured with torch {capture['torch']}, driver {capture['driver']}"
    records = {
        name: {
            "value": float(np.format_float_positional(value, 5, fractional=False)),
            "unit": UNITS[name],
            "kind": "measured",
            "source": source,
            "date": capture["date"],
        }
        for name, value in values.items()
    }
    document = {"gpu": slug, "capture": capture, "figures": records}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def digest(folder: Path) -> str:
    """Of a kernel table, so that predictions can name the one they were made from."""
    return hashlib.sha256((folder / KERNEL_FILE).read_bytes()).hexdigest()


def _most(rows: tuple[KernelRow, ...], op: str, kernel: str) -> float | None:
    found = [r.bytes_per_s / 1e9 for r in rows if (r.point.op, r.point.kernel) == (op, kernel)]
    return max(found, default=None)


def _least(rows: tuple[KernelRow, ...], op: str, execution: str) -> float | None:
    found = [r.median_us for r in rows if (r.point.op, r.point.execution) == (op, execution)]
    return min(found, default=None)
