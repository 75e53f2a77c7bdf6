"""Capture and tables by many processes are those of one, to the bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.processes import processes
from kvtune.common.progress import Silent
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.simulator.quality import build, shards
from kvtune.simulator.quality.build import build_tables
from kvtune.simulator.quality.shards import build_tables_on
from kvtune.traces.capture import capture
from kvtune.traces.models import load_model
from kvtune.traces.parts import PARTS
from kvtune.traces.shards import CaptureJob, capture_on, capture_part
from kvtune.traces.trace import Trace

OPTIONS = [Option(H2O(), Budget(share=0.3)), Option(SnapKV(), Budget(share=0.2), Int4(), Int4())]


@pytest.fixture
def job(
    make_network: Callable[..., Any],
    tiny_fields: dict[str, Any],
    tokenizer: Any,
    make_samples: Callable[..., list[Any]],
    tmp_path: Path,
) -> CaptureJob:
    from transformers import LlamaConfig

    make_network(LlamaConfig(**tiny_fields)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    samples = tuple(make_samples(3, splits=("search", "evaluate")))
    signals = ("column_sums",)
    return CaptureJob(
        str(tmp_path / "model"), "float32", samples, tmp_path / "shards", 2, signals=signals
    )


def alone(job: CaptureJob, folder: Path) -> Trace:
    loaded = load_model(job.model, device="cpu", dtype=job.dtype)
    return capture(loaded, job.samples, folder, probes=job.probes, signals=job.signals)


def same(engine: Executor, job: CaptureJob, folder: Path) -> None:
    one, many = alone(job, folder), capture_on(engine, job)
    assert [s.id for s in many.samples] == [s.id for s in one.samples]
    assert not (job.folder / PARTS).exists()
    for sample in one.samples:
        for layer in range(one.geometry.layers):
            ours, theirs = one.layer(sample.id, layer), many.layer(sample.id, layer)
            assert all((ours[name] == theirs[name]).all() for name in ours.tensors)
    tables = build_tables(one, OPTIONS, block=4)
    shared = build_tables_on(engine, many, OPTIONS, block=4)
    assert shared.factor.tobytes() == tables.factor.tobytes()
    assert np.array_equal(shared.loss, tables.loss)
    assert capture_on(engine, job).samples == many.samples  # what is there is not run


@pytest.fixture
def two() -> Iterator[Executor]:
    with processes(2, ("cpu", "cpu:0")) as engine:
        yield engine


@pytest.mark.full
def test_two_processes_make_the_trace_and_tables_of_one(
    two: Executor, job: CaptureJob, tmp_path: Path
) -> None:
    """Each has a device of its own, as two GPUs of one host would be shared out."""
    same(two, job, tmp_path / "one")


@pytest.mark.full
def test_a_dask_cluster_makes_the_trace_and_tables_of_one_process(
    job: CaptureJob, tmp_path: Path
) -> None:
    distributed = pytest.importorskip("dask.distributed")
    started = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**started, local_directory=str(tmp_path)) as cluster,
        distributed.Client(cluster) as client,
    ):
        same(client.get_executor(), job, tmp_path / "one")


class Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        from concurrent.futures import Future

        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_parts_are_joined_to_the_trace_of_one_process(job: CaptureJob, tmp_path: Path) -> None:
    same(Here(), job, tmp_path / "one")


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def interrupted_alone(job: CaptureJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample is captured by this process, which then stops."""
    capture_module = sys.modules[capture.__module__]
    run = capture_module._run
    ran: list[int] = []

    def once(*given: Any) -> Any:
        if ran:
            raise KeyboardInterrupt
        ran.append(1)
        return run(*given)

    with monkeypatch.context() as patched:
        patched.setattr(capture_module, "_run", once)
        with pytest.raises(KeyboardInterrupt):
            alone(job, job.folder)


def test_workers_go_on_where_one_process_was_interrupted(
    job: CaptureJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_alone(job, monkeypatch)
    first = (job.folder / "sample-0000" / "sample.json").stat().st_mtime_ns
    notes = Notes()
    trace = capture_on(Here(), job, progress=notes, trusted=True)
    assert notes.notes == ["1 samples are already captured"]
    assert (job.folder / "sample-0000" / "sample.json").stat().st_mtime_ns == first
    # What was hashed just now is not hashed again; what an earlier process has left is.
    assert {Path(path).parent.name for path in trace.checked} == {"sample-0001", "sample-0002"}
    same(Here(), job, tmp_path / "one")


def test_workers_refuse_to_go_on_with_another_trace(
    job: CaptureJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_alone(job, monkeypatch)
    with pytest.raises(KvtuneError, match=r"another trace \(different probes\)"):
        capture_on(Here(), replace(job, probes=3))


def test_one_process_removes_what_ended_workers_have_left(job: CaptureJob) -> None:
    capture_part(job, 0, "cpu")
    assert (job.folder / PARTS / "0000" / "manifest.json").is_file()
    alone(job, job.folder)
    assert not (job.folder / PARTS).exists()


def test_what_is_not_the_workers_stays(job: CaptureJob) -> None:
    mine = job.folder / PARTS / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    alone(job, job.folder)
    assert mine.read_text() == "keep"


def test_samples_that_one_process_replays_side_by_side_stay_together(
    job: CaptureJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where how many they are decides how sums are rounded."""
    monkeypatch.setattr(build, "_together", lambda *_: 2)
    replayed, replay = [], shards.replay_cell

    def counted(root: Path, cell: build.Cell, *rest: Any) -> Any:
        replayed.append(len(cell.samples))
        return replay(root, cell, *rest)

    monkeypatch.setattr(shards, "replay_cell", counted)
    same(Here(), job, tmp_path / "one")
    assert replayed == [2, 2, 2, 1, 1, 1]
