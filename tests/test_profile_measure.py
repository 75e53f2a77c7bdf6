"""Measuring, without a GPU: every op on small data, with a timer that counts instead of timing."""

from __future__ import annotations

import dataclasses
import gc
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.kernel_table import KernelRow, Point, RowWriter, read_rows
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.measure import session
from kvtune.runtime.measure.grid import FULL, QUICK, Grid
from kvtune.runtime.measure.monitor import NoMonitor, NvmlMonitor, State, open_monitor, reasons
from kvtune.runtime.measure.operation import Operation, Setting, Wanted, Work, copies
from kvtune.runtime.measure.ops import all_operations, host_heads, paged, runtime
from kvtune.runtime.measure.runner import Bench, measure, plan
from kvtune.runtime.measure.timer import Timing

TINY = Grid(
    heads=((4, 2, 16), (2, 2, 16)),
    matrices=((64, 32), (32, 64)),
    more_matrices=((16, 16),),
    rows=(1, 2),
    more_rows=(4, 8),
    batches=(1, 2),
    more_batches=(3,),
    lengths=(64, 128, 256, 512),
    cache_bytes_most=2**20,
    prompts=(32, 64),
    depths=(3,),
    cache_tokens=256,
    hidden=64,
    intermediate=96,
    vocabulary=128,
    transfers=(1024,),
    rotation_bytes=2**16,
)
CPU = Setting("cpu", TINY)
H100 = find_gpu("h100")


def bytes_timer(work: Work, execution: str, watch: Callable[[], None]) -> Timing:
    """Runs every call once, and says what half the datasheet's bandwidth would."""
    for call in work.calls:
        call()
    watch()
    us = 1 + 2e6 * work.bytes / H100.bandwidth_bytes_per_s
    return Timing(0.9 * us, us, 1.1 * us, 3)


def bench(**changes: Any) -> Bench:
    return dataclasses.replace(Bench(H100, CPU, bytes_timer, "test 1"), **changes)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "kernels.csv"
    outcome = measure(path, all_operations(), bench())
    assert outcome.failed == []
    return path


def test_every_op_of_the_plan_runs_and_is_written(table: Path) -> None:
    rows = read_rows(table)
    assert {row.point for row in rows} == {point for _, point in plan(all_operations(), CPU)}
    assert {row.point.op for row in rows} >= {
        "attention_decode", "attention_prefill", "attention_prefill_scores", "append", "linear",
        "rms_norm", "rope", "gated", "residual", "argmax", "embedding", "decode_layers",
        "decode_step",
        "score_topk", "compact", "gather_pages", "quantise", "dequantise", "host_to_device",
        "device_to_host", "launch", "empty_step",
    }  # fmt: skip
    assert all(row.bytes > 0 for row in rows)


@pytest.mark.parametrize("spread", ["uniform", "ragged"])
@pytest.mark.parametrize("number_format", ["bf16", "fp8", "int8", "int4", "int2"])
def test_paged_layers_can_be_made_in_every_format(
    monkeypatch: pytest.MonkeyPatch, number_format: str, spread: Any
) -> None:
    """The kernel itself needs a GPU; that its arguments fit together does not."""
    caches: list[Any] = []
    monkeypatch.setattr(paged, "decode", lambda query, cache, *_: caches.append(cache))
    point = Point("attention_paged", "k", number_format=number_format, batch=2, query_heads=4,
                  kv_heads=2, head_dim=64, length=300, spread=spread)  # fmt: skip
    work = paged.OPERATIONS[0].prepare(point, CPU)
    for call in work.calls:
        call()
    assert len(caches) == len(work.calls)
    assert work.bytes == caches[0].pool.nbytes
    assert len(caches[0].lengths) == 4
    assert int(caches[0].lengths.sum()) == pytest.approx(4 * 300, rel=0.8)


def test_a_step_of_the_runtime_can_be_repeated_for_ever() -> None:
    """The kernels need a GPU; that a step ends where it began does not."""
    point = Point("runtime_step", "kvtune", batch=2, query_heads=4, kv_heads=2, head_dim=64,
                  length=70, rows=2, width_in=64, width_out=96)  # fmt: skip
    with pytest.warns(UserWarning, match="plain torch"):
        work = runtime.OPERATIONS[0].prepare(point, CPU)
    step = work.calls[0]
    assert isinstance(step, runtime.RepeatedStep)
    for _ in range(5):
        step()
    loop = step.loop
    lengths = [layer.paged.paged.lengths.tolist() for layer in loop.cache.layers]
    assert lengths == 2 * [4 * [70] + 8 * [0]]
    assert loop.positions.tolist() == [[70], [70]]
    layer = 64 * (4 * 64 + 2 * 2 * 64 + 4 * 64 + 3 * 96 + 2)
    heads = 2 * 2 * 2  # sequences, layers, KV heads: keys and values of 70 tokens, and a length
    assert work.bytes == 2 * (2 * layer + 128 * 64 + 64) + heads * (70 * 2 * 64 * 2 + 4)


@pytest.mark.filterwarnings("ignore:kvtune's kernels need")
def test_parts_of_a_layer_with_heads_on_the_host_are_the_runtimes_own() -> None:
    """The kernels need a GPU; that the calls choose, copy and join what they say does not."""
    heads = {"query_heads": 4, "kv_heads": 2, "head_dim": 16}
    choose, fetch, join = host_heads.OPERATIONS
    work = choose.prepare(Point("host_choose", "k", **heads, length=400, rows=128), CPU)  # type: ignore[arg-type]
    chosen: Any = work.calls[0]()
    fetching, tokens = chosen
    assert len(fetching.places) == 2 * 2  # blocks of 64 tokens of each head
    assert tokens.tolist() == 2 * [64 + 400 % 64]  # the last block is not full
    assert work.bytes == 2 * 7 * 2 * 16 * 2  # a largest and a smallest key of 7 blocks, 16 bits
    work = fetch.prepare(Point("host_fetch", "k", head_dim=16, width_in=3 * 2 * 64 * 16 * 2), CPU)
    assert work.calls[0]() is None
    assert work.bytes == 3 * 2 * 64 * 16 * 2
    work = join.prepare(Point("host_join", "k", **heads, length=128, rows=400), CPU)  # type: ignore[arg-type]
    joined: Any = work.calls[0]()
    output, lse = joined
    assert (output.shape, lse.shape) == ((2, 2, 16), (2, 2))
    assert bool(output.isfinite().all() & lse.isfinite().all())


@pytest.mark.filterwarnings("ignore:kvtune's kernels need")
def test_a_prefill_of_the_runtime_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Point("runtime_prefill", "kvtune", "eager", batch=2, query_heads=4, kv_heads=2,
                  head_dim=64, length=70, rows=2, width_in=64, width_out=96)  # fmt: skip
    work = runtime.OPERATIONS[1].prepare(point, CPU)
    pools: list[Any] = []
    opened = PolicyCache.open

    def watched(cache: PolicyCache, *arguments: Any) -> None:
        opened(cache, *arguments)
        pools.append(weakref.ref(cache.pool))

    monkeypatch.setattr(PolicyCache, "open", watched)
    gc.disable()
    try:
        work.calls[0]()
    finally:
        gc.enable()
    assert [pool() for pool in pools] == [None]


def test_the_first_turn_comes_first_and_no_point_twice() -> None:
    points = [point for _, point in plan(all_operations(), CPU)]
    assert len(points) == len(set(points))
    turns = {wanted.point: wanted.turn for op in all_operations() for wanted in op.points(TINY)}
    assert [turns[p] for p in points] == sorted(turns[p] for p in points)


def test_a_killed_run_leaves_its_rows_and_the_next_goes_on(tmp_path: Path, table: Path) -> None:
    path = tmp_path / "kernels.csv"
    lines = table.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:9])  # killed within its sixth row
    outcome = measure(path, all_operations(), bench())
    assert (outcome.kept, outcome.measured) == (5, len(lines) - 6)
    assert path.read_text().splitlines()[:6] == [line.rstrip("\n") for line in lines[:6]]


def test_time_that_is_up_leaves_the_rest_for_the_next_run(tmp_path: Path) -> None:
    seconds = iter(range(1000))
    path = tmp_path / "kernels.csv"
    outcome = measure(path, all_operations(), bench(clock=lambda: next(seconds)), seconds=5)
    assert outcome.measured == 5
    assert outcome.left == len(plan(all_operations(), CPU)) - 5


def operation(prepare: Callable[[Point, Setting], Work], count: int = 3) -> Operation:
    def points(grid: Grid) -> Iterator[Wanted]:
        yield from (Wanted(0, Point("op", "k", rows=rows + 1)) for rows in range(count))

    return Operation("op", points, prepare)


def test_a_point_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    def prepare(point: Point, setting: Setting) -> Work:
        if point.rows == 2:
            raise RuntimeError("no kernel\nand a long story")
        return Work([lambda: None], 10)

    outcome = measure(tmp_path / "k.csv", [operation(prepare)], bench())
    assert outcome.measured == 2
    assert [(p.rows, why) for p, why in outcome.failed] == [(2, "RuntimeError: no kernel")]


def test_a_cold_row_above_the_datasheets_bandwidth_is_refused(tmp_path: Path) -> None:
    def fast(work: Work, execution: str, watch: Callable[[], None]) -> Timing:
        us = work.bytes / H100.bandwidth_bytes_per_s * 1e6 / 1.03
        return Timing(us, us, us, 3)

    made = operation(lambda point, setting: Work([lambda: None], 10**6), count=1)
    outcome = measure(tmp_path / "k.csv", [made], bench(timer=fast))
    assert outcome.measured == 0
    assert "1.03 times the bandwidth" in outcome.failed[0][1]
    assert read_rows(tmp_path / "k.csv") == ()


def test_the_state_that_is_seen_while_running_is_written(tmp_path: Path) -> None:
    class Hot(NoMonitor):
        def state(self) -> State:
            return State(1500, 2600, 690.5, "power")

    made = operation(lambda point, setting: Work([lambda: None], 10), count=1)
    outcome = measure(tmp_path / "k.csv", [made], bench(monitor=Hot()))
    (row,) = read_rows(tmp_path / "k.csv")
    assert (row.sm_mhz, row.memory_mhz, row.watts, row.throttle) == (1500, 2600, 690.5, "power")
    assert outcome.reasons == {"power"}


@pytest.mark.parametrize("bytes_each", [1, 1000, 2**15, 2**16, 2**20])
def test_cold_buffers_are_more_than_the_rotation_and_warm_ones_one(bytes_each: int) -> None:
    cold = copies(TINY, Point("op", "k"), bytes_each)
    assert (cold - 1) * bytes_each < TINY.rotation_bytes <= cold * bytes_each
    assert copies(TINY, Point("op", "k", l2="warm"), bytes_each) == 1


def test_the_shipped_grids_rotate_through_more_than_any_cache() -> None:
    for grid in (FULL, QUICK):
        assert grid.rotation_bytes >= 2 * H100.l2_bytes


def row(**changes: Any) -> KernelRow:
    base = KernelRow(Point("read", "torch-sum", width_in=10), "v", 10, 0, 1.0, 2.0, 3.0, 5)
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (",2.0000,", ",,", "the number of 'median_us' is missing"),
        (",2.0000,", ",-2,", "'median_us' must be above zero"),
        (",2.0000,", ",fast,", "'median_us' must be a number, not 'fast'"),
        (",cold,", ",tepid,", "'l2' must be cold or warm, not 'tepid'"),
        ("median_us", "median_ms", "'median_ms' is no column. Did you mean 'median_us'"),
        ("p90_us,", "", "the column 'p90_us' is missing"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    path = tmp_path / "kernels.csv"
    with RowWriter(path) as writer:
        writer.write(row())
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(KvtuneError) as caught:
        read_rows(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_point_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    with RowWriter(path) as writer:
        writer.write(row())
        writer.write(row(runs=9))
    with pytest.raises(KvtuneError, match="stands here twice") as caught:
        read_rows(path)
    assert caught.value.where == f"{path}:3"


def test_rows_survive_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    written = (row(), row(point=Point("copy", "k", "eager", batch=3), throttle="power+thermal"))
    with RowWriter(path) as writer:
        for one in written:
            writer.write(one)
    assert read_rows(path) == written


# --- what is refused before anything is measured ---------------------------------------------


def test_no_gpu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KvtuneError, match="no GPU here that PyTorch can use"):
        session.this_gpu(None)


class Shared(NoMonitor):
    def other_processes(self) -> int:
        return 2


class Slow(NoMonitor):
    def state(self) -> State:
        return State(sm_mhz=900, throttle="power+thermal", celsius=88)


def test_a_gpu_that_others_use_is_refused_unless_asked_for() -> None:
    with pytest.raises(KvtuneError, match="2 other processes are using this GPU") as caught:
        session.refuse_busy(Shared(), shared=False)
    assert "--shared" in (caught.value.hint or "")
    session.refuse_busy(Shared(), shared=True)
    assert Shared().other_processes() == 2


def test_a_gpu_that_is_slowed_down_by_heat_is_refused() -> None:
    with pytest.raises(KvtuneError, match=r"slowed down.*: thermal \(88 C, 900 MHz\)"):
        session.refuse_busy(Slow(), shared=True)


def test_the_drivers_bits_are_named_once_each() -> None:
    assert reasons(0) == reasons(1) == ""
    assert reasons(0x4 | 0x20 | 0x40) == "power+thermal"


@pytest.mark.parametrize(
    ("visible", "index", "driver"),
    [(None, 0, 0), ("", 1, 1), ("3,1", 0, 3), ("3, 1", 1, 1), ("GPU-5f", 0, 0)],
)
def test_the_driver_counts_all_gpus_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, driver: int
) -> None:
    asked: list[int] = []
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetHandleByIndex = asked.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert isinstance(open_monitor(index), NvmlMonitor)
    assert asked == [driver]
