"""Processes that share one GPU: small models leave it idle between launches, several fill it.

Every task takes one item, mostly a sample, and gives plain arrays back.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from proxies import predictions

from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import LiveRun, full_cache, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.quality.build import build_tables
from kvtune.simulator.quality.tables import Tables
from kvtune.traces.capture import capture
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.trace import open_trace
from kvtune.tuner.sources import queries_of, signals_of
from kvtune.tuner.validate import union_of_needs

ROWS = 18  # policies a batch beside the full cache
TRIES = 3  # of a sample whose process died or ran out of memory


@dataclass(frozen=True)
class Place:
    """What a worker needs to begin: the model, the device, and room for traces."""

    model: str
    device: str
    scratch: Path


class Named(Protocol):
    """What a task is about."""

    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Named)

_here: dict[str, Any] = {}


def _begin(place: Place, count: int, converted: Any) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // count, 1))
    torch.backends.cuda.matmul.allow_tf32 = False
    if place.device != "cpu":
        torch.zeros(1, device=place.device)  # the context takes seconds: start it meanwhile
    converted.wait()
    _here["place"] = place
    _here["loaded"] = load_model(place.model, device=place.device, dtype="float32")


def loaded() -> LoadedModel:
    """The process's model."""
    found: LoadedModel = _here["loaded"]
    return found


class Crew:
    """The processes, and what they are asked; one that dies is replaced.

    A context manager: on leaving, what still runs is ended.
    """

    def __init__(self, place: Place, count: int) -> None:
        self.place, self.count = place, count
        self.failures: list[str] = []
        self._spawn = multiprocessing.get_context("spawn")
        self._converted = self._spawn.Event()
        self._start()

    def _start(self) -> None:
        begin = (self.place, self.count, self._converted)
        self._pool = ProcessPoolExecutor(self.count, self._spawn, _begin, begin)
        for _ in range(self.count):
            self._pool.submit(_nothing)  # processes start when there is work

    def model_is_stored(self) -> None:
        """Let the processes load the model: the model store holds it."""
        self._converted.set()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()

    def everywhere(self, task: Any, items: Sequence[Named], *arguments: Any) -> list[Any]:
        """The task on every item, answers in order; fails with the first that does."""
        futures: list[Future[Any]] = [self._pool.submit(task, each, *arguments) for each in items]
        return [future.result() for future in futures]

    def until(
        self, deadline: float, task: Any, items: Sequence[Item], *arguments: Any
    ) -> Iterator[tuple[Item, Any]]:
        """The task on items in order, as answers come, as long as ``time.monotonic()`` allows.

        One is begun only if, at the pace of the last ones, it would end in time. An item whose
        task fails or whose process dies is tried again, and in the end left out: see ``failures``.
        """
        waiting, tried = deque(items), Counter[str]()
        pace = deque[float](maxlen=self.count)
        running: dict[Future[Any], tuple[Item, float]] = {}
        while True:
            while (
                waiting and len(running) < self.count and _now() + max(pace, default=0) < deadline
            ):
                item = waiting.popleft()
                running[self._submit(task, item, *arguments)] = item, _now()
            left = None if math.isinf(deadline) else max(deadline - _now(), 0)
            done, _ = wait(running, left, FIRST_COMPLETED)
            if not done:
                return
            for future in done:
                item, begun = running.pop(future)
                if (error := future.exception()) is None:
                    pace.append(_now() - begun)
                    yield item, future.result()
                    continue
                self.failures.append(f"{item.id}: {type(error).__name__}: {error}"[:200])
                tried[item.id] += 1
                if tried[item.id] < TRIES:
                    waiting.appendleft(item)

    def _submit(self, task: Any, item: Any, *arguments: Any) -> Future[Any]:
        """Begin a task, in new processes and one less of them where some died."""
        try:
            return self._pool.submit(task, item, *arguments)
        except BrokenProcessPool:
            self.count = max(self.count - 1, 1)
            self._start()
            return self._pool.submit(task, item, *arguments)


def _now() -> float:
    return time.monotonic()


def _nothing() -> None:
    pass


def capture_one(sample: Sample, needs: Needs, probes: int) -> Path:
    """Trace a sample into a folder of its own."""
    folder: Path = _here["place"].scratch / sample.id
    queries = queries_of(needs, sample.observed)
    capture(loaded(), [sample], folder, probes=probes, signals=signals_of(needs), queries=queries)
    return folder


def tables_of(sample: Sample, options: Sequence[Option]) -> Tables:
    """Tables of one captured sample."""
    trace = open_trace(_here["place"].scratch / sample.id)
    return build_tables(trace, options, device=_here["place"].device)


def captured_tables(sample: Sample, options: Sequence[Option], needs: Needs, probes: int) -> Tables:
    """Tables of one sample, whose trace is not kept."""
    folder = _here["place"].scratch / sample.id
    shutil.rmtree(folder, ignore_errors=True)  # of a process that died over it
    try:
        capture_one(sample, needs, probes)
        torch.cuda.empty_cache()  # its backward pass takes most: leave room for the others
        return tables_of(sample, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def live(sample: Sample, policies: Sequence[Policy]) -> list[LiveRun]:
    """One sample under every policy."""
    prompt = fresh_prompt(loaded(), sample, union_of_needs(policies))
    full = full_cache(loaded(), sample, prompt)
    runs: list[LiveRun] = []
    for first in range(0, len(policies), ROWS):
        runs += run_live(loaded(), sample, prompt, policies[first : first + ROWS], full)
    return runs


@dataclass(frozen=True)
class Share:
    """Some of the policies that one sample runs under, for one process of several."""

    sample: Sample
    policies: Sequence[Policy]

    @property
    def id(self) -> str:
        """The name of the sample."""
        return self.sample.id


def live_share(share: Share) -> list[LiveRun]:
    """The sample under its share of the policies."""
    return live(share.sample, share.policies)


def predicted(sample: Sample, policies: Sequence[Policy]) -> dict[str, np.ndarray]:
    """The three predictions of every policy on one captured sample."""
    trace = open_trace(_here["place"].scratch / sample.id)
    return predictions(trace, trace.samples, policies, _here["place"].device)
