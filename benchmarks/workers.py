"""Processes that share one GPU: small models leave it idle between launches, several fill it.

Every task takes one sample and gives plain arrays back.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proxies import predictions

from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import LiveRun, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.build import build_tables
from kvtune.simulator.tables import Tables
from kvtune.traces.capture import capture
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.trace import open_trace

ROWS = 18  # policies a batch beside the full cache


@dataclass(frozen=True)
class Place:
    """What a worker needs to begin: the model, the device, and room for traces."""

    model: str
    device: str
    scratch: Path


_here: dict[str, Any] = {}


def _begin(place: Place, converted: Any) -> None:
    torch.set_num_threads(2)
    torch.backends.cuda.matmul.allow_tf32 = False
    if place.device != "cpu":
        torch.zeros(1, device=place.device)  # the context takes seconds: start it meanwhile
    converted.wait()
    _here["place"] = place
    _here["loaded"] = load_model(place.model, device=place.device, dtype="float32")


def _loaded() -> LoadedModel:
    loaded: LoadedModel = _here["loaded"]
    return loaded


@contextmanager
def workers(place: Place, count: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """A pool, and the event that tells it that the model store holds the model."""
    spawn = multiprocessing.get_context("spawn")
    converted = spawn.Event()
    with ProcessPoolExecutor(count, spawn, _begin, (place, converted)) as pool:
        for _ in range(count):
            pool.submit(_nothing)  # processes start when there is work
        yield pool, converted


def _nothing() -> None:
    pass


def capture_one(sample: Sample, probes: int) -> int:
    """Trace a sample into a folder of its own."""
    folder = _here["place"].scratch / sample.id
    signals = ("column_sums",)
    capture(
        _loaded(), [sample], folder, probes=probes, signals=signals, queries=sample.observed + 64
    )
    return len(sample.token_ids)


def tables_of(sample: Sample, options: Sequence[Option]) -> Tables:
    """Tables of one captured sample."""
    trace = open_trace(_here["place"].scratch / sample.id)
    return build_tables(trace, options, device=_here["place"].device)


def live(sample: Sample, policies: Sequence[Policy]) -> list[LiveRun]:
    """One sample under every policy."""
    prompt = fresh_prompt(_loaded(), sample, Needs(window=64, column_sums=True))
    runs: list[LiveRun] = []
    for first in range(0, len(policies), ROWS):
        runs += run_live(_loaded(), sample, prompt, policies[first : first + ROWS])
    return runs


def predicted(sample: Sample, policies: Sequence[Policy]) -> dict[str, np.ndarray]:
    """The three predictions of every policy on one captured sample."""
    trace = open_trace(_here["place"].scratch / sample.id)
    return predictions(trace, trace.samples, policies, _here["place"].device)


def everywhere(
    pool: ProcessPoolExecutor, task: Any, samples: Sequence[Sample], *arguments: Any
) -> list[Any]:
    """The task on every sample, answers in order."""
    futures: list[Future[Any]] = [pool.submit(task, sample, *arguments) for sample in samples]
    return [future.result() for future in futures]
