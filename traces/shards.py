"""Capture by many processes or machines: one sample each, over an engine that is already there.

The engine is any ``concurrent.futures.Executor``: processes of this machine, one a GPU, or the
workers of a cluster (``dask.distributed.Client(...).get_executor()``). Workers and the caller
share the folder of the trace and the model's store. A sample is run as ``capture`` runs it, its
probes drawn from its own stream, so that the trace is the same to the bit.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvtune.common.files import write_json
from kvtune.common.lock import locked
from kvtune.common.processes import own_device
from kvtune.common.progress import Progress, Silent
from kvtune.common.stored import read_json
from kvtune.traces.manifest import ENTRY, MANIFEST, read_manifest
from kvtune.traces.parts import part_of, remove_parts
from kvtune.traces.samples import Sample
from kvtune.traces.trace import Trace, open_trace

if TYPE_CHECKING:
    from kvtune.traces.models import LoadedModel


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
    """Capture on the engine what is not captured yet, and join the samples to one trace.

    Args:
        engine: runs the samples.
        job: what is captured.
        device: of workers that were given none of their own (``common.processes``).
        progress: told of every sample.
        trusted: the workers are this process's own, so that what they have just hashed is not
            hashed again.
    """
    progress = progress or Silent()
    ran: set[str] = set()
    with locked(job.folder, wait=True, progress=progress):
        there = _captured(job)
        missing = [n for n, sample in enumerate(job.samples) if sample.id not in there]
        if there and missing:
            progress.note(f"{len(there)} samples are already captured")
        waiting = [engine.submit(capture_part, job, index, device) for index in missing]
        for part in progress.track(waiting, "capturing attention", len(waiting)):
            if folder := part.result():
                ran.add(folder)
        if missing:
            _join(job, there)
    trace = open_trace(job.folder)
    if not (ran and trusted):
        return trace
    return open_trace(job.folder, [path for path in trace.files() if path.parent.name in ran])


def capture_part(job: CaptureJob, index: int, device: str) -> str | None:
    """One sample, by a worker: it lies in a folder of its own until all are there.

    Returns:
        The name of the sample's folder; None where it was finished before.

    Raises:
        KvtuneError: the folder holds samples of another trace.
    """
    from kvtune.traces.capture import capture_sample
    from kvtune.traces.writer import CaptureSettings, TraceWriter

    loaded = loaded_once(job.model, own_device(device), job.dtype)
    settings = CaptureSettings.of(
        loaded, job.samples, job.probes, job.seed, job.workload, job.queries, job.signals
    )
    if (job.folder / MANIFEST).is_file():
        TraceWriter(job.folder, settings)  # refuses what is not the same trace; writes nothing
    sample, writer = job.samples[index], TraceWriter(part_of(job.folder, index), settings)
    if writer.finished(sample):
        return None
    capture_sample(loaded, sample, index, settings, writer)
    return str(writer.entries[sample.id]["folder"])


@cache
def loaded_once(model: str, device: str, dtype: str) -> LoadedModel:
    """The worker's model: it stays for the next sample."""
    from kvtune.traces.models import choose_dtype, load_model

    usual = choose_dtype(device)[0] == dtype  # then the trace says for which reason
    return load_model(model, device=device, dtype=None if usual else dtype)


def _captured(job: CaptureJob) -> dict[str, Any]:
    """The manifest's entries of samples whose files are there, by id; a capture may have stopped.

    Whether they are of the same trace is for the workers to say, who know the model.
    """
    path = job.folder / MANIFEST
    if not path.is_file():
        return {}
    places = read_manifest(read_json(path), str(path)).samples
    return {
        place.id: asdict(place) for place in places if (job.folder / place.folder / ENTRY).is_file()
    }


def _join(job: CaptureJob, there: dict[str, Any]) -> None:
    """Move the samples' folders together; the manifest, which makes them a trace, is last."""
    header: dict[str, Any] = {}
    entries = []
    for index, sample in enumerate(job.samples):
        if sample.id in there:
            entries.append(there[sample.id])
            continue
        header = read_json(part_of(job.folder, index) / MANIFEST)
        (entry,) = header.pop("samples")
        shutil.rmtree(job.folder / entry["folder"], ignore_errors=True)
        shutil.move(part_of(job.folder, index) / entry["folder"], job.folder / entry["folder"])
        entries.append(entry)
    write_json(job.folder / MANIFEST, {**header, "samples": entries})
    remove_parts(job.folder)
