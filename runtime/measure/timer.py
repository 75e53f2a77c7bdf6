"""Times calls on a GPU: replays of a CUDA graph, or launches one by one, between events."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvtune.profiles.kernel_table import Execution
from kvtune.runtime.measure.operation import Call, Work

SAMPLE_S = 0.8e-3  # a sample lasts at least so long, so that its launch does not count
SAMPLES = 15
STEADY_S = 0.6  # of replays before steady samples: the power limit takes its time to act
REST_S = 3e-3  # between samples, so that one kernel repeated does not run into the power limit


class Timing(NamedTuple):
    """Microseconds of one call."""

    p10_us: float
    median_us: float
    p90_us: float
    runs: int


class Timer(Protocol):
    """Times the calls of one point."""

    def __call__(self, work: Work, execution: Execution, watch: Callable[[], None]) -> Timing:
        """``watch`` is called while the calls run."""
        ...


def cuda_timer(work: Work, execution: Execution, watch: Callable[[], None]) -> Timing:
    """Time on the current GPU. All calls run once before, outside of the graph."""
    import torch

    for call in work.calls:
        call()
    torch.cuda.synchronize()
    count = _calls_a_sample(work)
    if execution == "graph":
        replay = _graph(work.calls, count)
        if work.steady:
            settle(replay)
        sampled = samples if work.steady else bursts
        return summary(sampled(replay, SAMPLES, watch) / count)
    return summary(samples(_eager(work.calls, count), SAMPLES, watch) / count)


def samples(run: Call, count: int, watch: Callable[[], None] = lambda: None) -> np.ndarray:
    """Microseconds of each of ``count`` runs after two that do not count.

    Runs are queued without waiting, so that the host is ahead and only the GPU is timed.
    """
    import torch

    for _ in range(2):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    watch()
    torch.cuda.synchronize()
    return np.array([a.elapsed_time(b) * 1e3 for a, b in pairwise(events)])


def settle(run: Call) -> None:
    """Run for so long that clocks and power have found their level."""
    import torch

    end = time.perf_counter() + STEADY_S
    while time.perf_counter() < end:
        run()
        torch.cuda.synchronize()


def bursts(run: Call, count: int, watch: Callable[[], None]) -> np.ndarray:
    """Microseconds of each of ``count`` runs, each behind one that does not count, then a rest.

    A kernel that is repeated alone can draw more power than the steps it is part of, and slow the
    GPU down as those do not.
    """
    import torch

    times = []
    for index in range(count):
        time.sleep(REST_S)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        begin.record()
        run()
        end.record()
        if index == count - 1:
            watch()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return np.array(times)


def summary(times_us: np.ndarray) -> Timing:
    """Percentiles of samples."""
    p10, median, p90 = np.percentile(times_us, (10, 50, 90))
    return Timing(float(p10), float(median), float(p90), len(times_us))


def capture(run: Call) -> Call:
    """A CUDA graph of ``run``, which runs twice before it; calling it replays.

    The first run is on the stream that will replay, as any prefill is. On an H100, replays on a
    stream that had not run these kernels in the open took 0.4 us more between kernels: a quarter of
    a millisecond of a Llama-8B step. All captures share one stream: the libraries keep a workspace
    for each that they see.
    """
    import torch

    run()
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@functools.cache
def _capture_stream() -> Any:
    import torch

    return torch.cuda.Stream()


def _graph(calls: Sequence[Call], count: int) -> Call:
    return capture(_eager(calls, count))


def _eager(calls: Sequence[Call], count: int) -> Call:
    def run() -> None:
        for index in range(count):
            calls[index % len(calls)]()

    return run


def _calls_a_sample(work: Work) -> int:
    """Whole rotations, as many as make a sample long enough."""
    import torch

    torch.cuda.synchronize()
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    host = time.perf_counter()
    begin.record()
    for call in work.calls:
        call()
    end.record()
    host = time.perf_counter() - host
    torch.cuda.synchronize()
    on_gpu = begin.elapsed_time(end) * 1e-3
    # Small kernels wait for the host here; in a graph they do not, and take a few microseconds.
    each = on_gpu / len(work.calls) if on_gpu > 1.5 * host else 3e-6
    rotations = max(1, -(-int(SAMPLE_S / each) // len(work.calls)))
    return max(1, min(rotations * len(work.calls), max(work.most_calls, len(work.calls))))
