"""Measures point after point, the most useful first, until all are done or time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress, Silent
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.kernel_table import KernelRow, Point, RowWriter
from kvtune.profiles.tuned import Class, TunedShape
from kvtune.runtime.measure.monitor import Monitor, NoMonitor, State
from kvtune.runtime.measure.operation import Operation, Setting, Wanted
from kvtune.runtime.measure.timer import Timer

MOST_OF_DATASHEET = 1.02


@dataclass
class Outcome:
    """What a run did.

    Args:
        measured: rows written by this run.
        kept: rows that were there before.
        left: points that time did not suffice for.
        failed: points that could not be measured, each with the reason in one line.
        reasons: reasons for lower clocks that were seen.
        tuned: the best shapes of decode attention.
    """

    measured: int = 0
    kept: int = 0
    left: int = 0
    failed: list[tuple[Point, str]] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)
    tuned: Mapping[Class, TunedShape] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What a run measures with.

    Args:
        gpu: whose datasheet bounds what a cold row may say.
        setting: device and grid.
        timer: takes the times.
        version: of the library whose kernels run.
        monitor: reads the GPU's state.
        progress: is told what is under way.
        clock: seconds, for the time bound.
        release: gives memory back after a point.
    """

    gpu: GpuProfile
    setting: Setting
    timer: Timer
    version: str
    monitor: Monitor = field(default_factory=NoMonitor)
    progress: Progress = field(default_factory=Silent)
    clock: Callable[[], float] = time.monotonic
    release: Callable[[], object] = lambda: None


def plan(operations: Iterable[Operation], setting: Setting) -> list[tuple[Operation, Point]]:
    """Every point once, in the order of their turns."""
    wanted: list[tuple[Wanted, Operation]] = [
        (entry, operation)
        for operation in operations
        for entry in operation.points(setting.grid)
    ]  # fmt: skip
    wanted.sort(key=lambda pair: pair[0].turn)
    points = {entry.point: operation for entry, operation in reversed(wanted)}
    return [(points[p], p) for p in dict.fromkeys(entry.point for entry, _ in wanted)]


def measure(
    path: Path, operations: Sequence[Operation], bench: Bench, seconds: float | None = None
) -> Outcome:
    """Measure what the table does not hold yet; every finished row is on the disk at once.

    Args:
        path: the table, begun or gone on with.
        operations: what to measure.
        bench: what to measure with.
        seconds: bound; points whose turn does not come are left for the next run.
    """
    end = None if seconds is None else bench.clock() + seconds
    outcome = Outcome()
    with RowWriter(path) as writer:
        points = plan(operations, bench.setting)
        outcome.kept = sum(point in writer.done for _, point in points)
        missing = [(operation, point) for operation, point in points if point not in writer.done]
        for index, (operation, point) in enumerate(bench.progress.track(missing, "measuring")):
            if end is not None and bench.clock() > end:
                outcome.left = len(missing) - index
                break
            _one(operation, point, bench, writer, outcome)
    return outcome


def _one(
    operation: Operation, point: Point, bench: Bench, writer: RowWriter, outcome: Outcome
) -> None:
    """One point; what goes wrong with it is noted, and the next ones go on."""
    try:
        row = timed(operation, point, bench)
        refuse_impossible(row, bench.gpu)
    except Exception as error:  # kernels fail in many ways: no memory, no support, a bad launch
        outcome.failed.append((point, _reason(error)))
        bench.progress.note(f"not measured: {describe(point)}: {_reason(error)}")
    else:
        writer.write(row)
        outcome.measured += 1
        outcome.reasons.update(filter(None, row.throttle.split("+")))
    bench.release()


def timed(operation: Operation, point: Point, bench: Bench) -> KernelRow:
    """The row of one point."""
    work = operation.prepare(point, bench.setting)
    states: list[State] = []
    timing = bench.timer(work, point.execution, lambda: states.append(bench.monitor.state()))
    state = states[-1] if states else State()
    return KernelRow(
        point, bench.version, work.bytes, work.flops, *timing, sm_mhz=state.sm_mhz,
        memory_mhz=state.memory_mhz, watts=state.watts, throttle=state.throttle,
    )  # fmt: skip


def refuse_impossible(row: KernelRow, gpu: GpuProfile) -> None:
    """Refuse a cold row that is faster than the memory can be: its data was in the cache.

    Raises:
        KvtuneError: more than 1.02 times the datasheet's bandwidth.
    """
    share = row.bytes_per_s / gpu.bandwidth_bytes_per_s
    if row.point.l2 == "cold" and share > MOST_OF_DATASHEET:
        raise KvtuneError(
            f"{share:.2f} times the bandwidth of {gpu.name}'s datasheet; it was not cold"
        )


def describe(point: Point) -> str:
    """A point in a few words."""
    sizes = {
        "batch": point.batch, "length": point.length, "rows": point.rows, "in": point.width_in,
        "out": point.width_out,
    }  # fmt: skip
    words = [point.op, point.kernel, point.number_format]
    return " ".join([*words, *(f"{name} {value}" for name, value in sizes.items() if value)])


def _reason(error: Exception) -> str:
    """The first line; what torch says of memory is long."""
    if type(error).__name__ == "OutOfMemoryError":
        return "too little memory on the GPU for this point"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" if not isinstance(error, KvtuneError) else lines[0]
