"""What is written down of a run: times of every request, and the engine's state over time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.requests import Requests
from kvtune.simulator.serving.sequence import Sequence
from kvtune.simulator.serving.step import Counts, Step

SAMPLES = 512  # of the state over time; above it every other one is dropped


@dataclass(frozen=True)
class Sample:
    """The engine's state at one moment.

    Args:
        at_s: seconds since the start.
        used_blocks: that sequences hold.
        running: sequences that are read or answered.
        waiting: requests in the queue.
    """

    at_s: float
    used_blocks: int
    running: int
    waiting: int


class Record:
    """Times of every request; infinite until they have come.

    Args:
        requests: that arrive.
        memory: that their sequences hold blocks of.
        counts: of what happened so far, kept by the scheduler.
    """

    def __init__(self, requests: Requests, memory: Memory, counts: Counts) -> None:
        count = len(requests)
        self.requests, self.memory, self.counts = requests, memory, counts
        self.started_s, self.first_s, self.finished_s = ([math.inf] * count for _ in range(3))
        self.arrived_s: list[float] = requests.arrival_s.tolist()
        self.refused: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.peak_blocks = self.peak_waiting = self.peak_running = 0
        self.block_seconds = self.running_seconds = self.waiting_seconds = 0.0
        self.busy_s = 0.0
        self._every_s = self._next_s = 0.0

    def refuse(self, sequence: Sequence, reason: str) -> None:
        """A request is turned away."""
        self.refused[reason] += 1

    def begin(self, step: Step, now: float, running: int, waiting: int) -> None:
        """A step begins with its blocks taken, while so many sequences run and requests wait."""
        for sequence in step.admitted:
            if self.started_s[sequence.index] == math.inf:
                self.started_s[sequence.index] = now
        used = self.memory.used
        self.peak_blocks = max(self.peak_blocks, used)
        self.peak_running = max(self.peak_running, running)
        self.peak_waiting = max(self.peak_waiting, waiting)
        self.block_seconds += used * step.seconds
        self.running_seconds += running * step.seconds
        self.waiting_seconds += waiting * step.seconds
        self.busy_s += step.seconds
        if now >= self._next_s:
            self._sample(Sample(now, used, running, waiting))

    def end(self, step: Step, done: list[Sequence], now: float) -> None:
        """A step has ended."""
        for sequence in step.read:
            if self.first_s[sequence.index] == math.inf:
                self.first_s[sequence.index] = now
        for sequence in done:
            self.finished_s[sequence.index] = now

    def _sample(self, sample: Sample) -> None:
        self.samples.append(sample)
        if len(self.samples) > SAMPLES:
            self.samples = self.samples[::2]
            self._every_s = sample.at_s / (SAMPLES // 2)
        self._next_s = sample.at_s + self._every_s
