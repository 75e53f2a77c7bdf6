"""Where traces and tables are made besides this process: processes of this host, or a cluster.

dask.distributed and not Ray: it is Python alone, runs wherever kvtune does, joins clusters that are
there (Slurm, Kubernetes, SSH) and gives the plain ``Executor`` that processes of one host give too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError
from kvtune.common.kept import NOTHING_KEPT, Kept
from kvtune.common.processes import processes
from kvtune.common.progress import Progress

if TYPE_CHECKING:
    from kvtune.policies.option import Option
    from kvtune.simulator.quality.tables import Tables
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.shards import CaptureJob
    from kvtune.traces.trace import Trace
    from kvtune.tuner.beside import Beside

PROCESSES = "processes:"


def captured(
    job: CaptureJob,
    loaded: LoadedModel,
    engine: str | None,
    progress: Progress,
    beside: Beside | None = None,
) -> Trace:
    """The trace of a job, by this process's model unless an engine is named or it has helpers."""
    if engine is not None:
        from kvtune.traces.shards import capture_on

        with open_engine(engine, loaded.device) as workers:
            return capture_on(workers, job, loaded.device, progress)
    if beside is not None:
        from kvtune.traces.shards import capture_on

        made = beside.tried(
            lambda helpers: capture_on(helpers, job, loaded.device, progress, trusted=True),
            progress,
        )
        if made is not None:
            return made
    from kvtune.traces.capture import capture

    return capture(
        loaded,
        job.samples,
        job.folder,
        probes=job.probes,
        seed=job.seed,
        workload_description=job.workload,
        signals=job.signals,
        queries=job.queries,
        progress=progress,
    )


def built(
    trace: Trace,
    options: Sequence[Option],
    device: str,
    engine: str | None,
    progress: Progress,
    kept: Kept = NOTHING_KEPT,
    beside: Beside | None = None,
) -> Tables:
    """The tables of a trace, likewise; this process alone keeps layers as it replays them."""
    if engine is not None:
        from kvtune.simulator.quality.shards import build_tables_on

        with open_engine(engine, device) as workers:
            return build_tables_on(workers, trace, options, device=device, progress=progress)
    if beside is not None:
        from kvtune.simulator.quality.shards import build_tables_on

        made = beside.tried(
            lambda helpers: build_tables_on(
                helpers, trace, options, device=device, progress=progress, trusted=True
            ),
            progress,
        )
        if made is not None:
            return made
    from kvtune.simulator.quality.build import build_tables

    return build_tables(trace, options, device=device, progress=progress, kept=kept)


@contextmanager
def open_engine(name: str, device: str) -> Iterator[Executor]:
    """An engine; processes of this host have a device each, a cluster's workers see their own.

    Args:
        name: ``processes:4``, or a dask scheduler's address, ``tcp://host:8786``.
        device: the caller's; where it is a GPU, processes of this host share all GPUs out.

    Raises:
        KvtuneError: it is neither, dask is not installed, or nobody answers.
    """
    if name.startswith(PROCESSES):
        with processes(_count(name), _devices(device)) as engine:
            yield engine
        return
    with _client(name) as client:
        yield client.get_executor()


def check_engine(name: str) -> None:
    """Refuse what is neither processes of this host nor an address; no connection is made.

    Raises:
        KvtuneError: it is neither.
    """
    if name.startswith(PROCESSES):
        _count(name)
    elif "://" not in name:
        raise KvtuneError(
            f"{name!r} is no engine",
            where="--engine",
            hint="processes:4 for this host, tcp://HOST:8786 for a dask scheduler.",
        )


def _count(name: str) -> int:
    text = name.removeprefix(PROCESSES)
    if not text.isdecimal() or not 0 < int(text) <= 1024:
        raise KvtuneError(
            f"{text!r} is no number of processes", where="--engine", hint=f"{PROCESSES}4, say."
        )
    return int(text)


def _devices(device: str) -> Sequence[str]:
    if device == "cpu":
        return ("cpu",)
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


@contextmanager
def _client(address: str) -> Iterator[Any]:
    check_engine(address)
    try:
        from dask.distributed import Client

        client = Client(address, timeout=10)
    except ImportError:
        raise KvtuneError(
            "dask is not installed", where="--engine", hint="pip install 'kvtune[cluster]'."
        ) from None
    except (OSError, ValueError) as error:
        raise KvtuneError(
            f"no scheduler answers: {error}", where=address, hint="start it with dask scheduler."
        ) from error
    with client:
        yield client
