"""Capture by many processes or machines: one sample each, over an engine that is already there.

The engine is any ``concurrent.futures.Executor``: processes of this machine, one a GPU, or the
workers of a cluster (``dask.distributed.Client(...).get_executor()``). Workers and the caller
share the folder of the trace and the model's store. A sample is run as ``capture`` runs it, its
probes drawn from its own stream, so that the trace is the same to the bit.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvtune.common.files import write_json
from kvtune.common.lock import locked
from kvtune.common.processes import own_device
from kvtune.common.progress import Progress, Silent
from kvtune.common.stored import read_json
from kvtune.traces.manifest import MANIFEST
from kvtune.traces.samples import Sample
from kvtune.traces.trace import Trace, open_trace

if TYPE_CHECKING:
    from kvtune.traces.models import LoadedModel

PARTS = "parts"


@dataclass(frozen=True)
class CaptureJob:
    """The settings of a capture, which every worker receives.

    Args:
        model: name or path of the model, which every worker loads.
        dtype: that it runs in.
        samples: all of the trace's.
        folder: of the trace, which all workers reach.
        probes: S of each sample.
        seed: draws the probes.
        workload: goes into the manifest.
        queries: which queries to store.
        signals: what to record besides.
    """

    model: str
    dtype: str
    samples: tuple[Sample, ...]
    folder: Path
    probes: int
    seed: int = 0
    workload: str = ""
    queries: Literal["all", "observed"] | int = "all"
    signals: tuple[str, ...] = ()


def capture_on(
    engine: Executor,
    job: CaptureJob,
    device: str = "cpu",
    progress: Progress | None = None,
    *,
    trusted: bool = False,
) -> Trace:
    """Capture every sample on the engine, and join the samples to one trace.

    Args:
        engine: runs the samples.
        job: what is captured.
        device: of workers that were given none of their own (``common.processes``).
        progress: told of every sample.
        trusted: the workers are this process's own, so that what they have just hashed is not
            hashed again.
    """
    progress = progress or Silent()
    with locked(job.folder, wait=True, progress=progress):
        made = not (job.folder / MANIFEST).is_file()
        if made:
            waiting = [
                engine.submit(capture_part, job, index, device) for index in range(len(job.samples))
            ]
            for part in progress.track(waiting, "capturing attention", len(waiting)):
                part.result()
            _join(job)
    trace = open_trace(job.folder)
    return open_trace(job.folder, trace.files()) if made and trusted else trace


def capture_part(job: CaptureJob, index: int, device: str) -> None:
    """One sample, by a worker: it lies in a folder of its own until all are there."""
    from kvtune.traces.capture import capture_sample
    from kvtune.traces.writer import CaptureSettings, TraceWriter

    loaded = loaded_once(job.model, own_device(device), job.dtype)
    settings = CaptureSettings.of(
        loaded, job.samples, job.probes, job.seed, job.workload, job.queries, job.signals
    )
    writer = TraceWriter(_part(job, index), settings)
    if not writer.finished(job.samples[index]):
        capture_sample(loaded, job.samples[index], index, settings, writer)


@cache
def loaded_once(model: str, device: str, dtype: str) -> LoadedModel:
    """The worker's model: it stays for the next sample."""
    from kvtune.traces.models import choose_dtype, load_model

    usual = choose_dtype(device)[0] == dtype  # then the trace says for which reason
    return load_model(model, device=device, dtype=None if usual else dtype)


def _part(job: CaptureJob, index: int) -> Path:
    return job.folder / PARTS / f"{index:04d}"


def _join(job: CaptureJob) -> None:
    """Move the samples' folders together; the manifest, which makes them a trace, is last."""
    manifests = [read_json(_part(job, n) / MANIFEST) for n in range(len(job.samples))]
    entries = [entry for manifest in manifests for entry in manifest.pop("samples")]
    for index, entry in enumerate(entries):
        shutil.rmtree(job.folder / entry["folder"], ignore_errors=True)
        shutil.move(_part(job, index) / entry["folder"], job.folder / entry["folder"])
    write_json(job.folder / MANIFEST, {**manifests[0], "samples": entries})
    shutil.rmtree(job.folder / PARTS)
