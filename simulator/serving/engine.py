"""The engine on SimPy: one process lets requests arrive, one takes step after step.

An event is a step of the engine, or a row of steps between which nothing changes, so that the work
grows with requests and not with tokens.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import simpy

from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.record import Record
from kvtune.simulator.serving.report import Goals, Served, served
from kvtune.simulator.serving.requests import Requests
from kvtune.simulator.serving.scheduler import Scheduler
from kvtune.simulator.serving.sequence import Sequence
from kvtune.simulator.serving.server import Prepared
from kvtune.simulator.serving.step_times import End

Process = Generator[simpy.Event, None, None]


def serve(
    prepared: Prepared,
    requests: Requests,
    goals: Goals,
    ends: tuple[End, ...] = ("value", "low", "high"),
) -> Served:
    """Serve requests under a policy, with likely times and with those at both ends.

    Args:
        prepared: the server under the policy.
        requests: that arrive; those that it was prepared for.
        goals: that goodput is counted under.
        ends: of the times' intervals to run with; ``value`` among them.
    """
    server, size = prepared.server, prepared.block_bytes

    def run(end: End) -> Record:
        blocks, host = int(server.cache.value) // size, server.host_bytes // size
        memory = Memory(prepared.footprint, server.block_tokens, blocks, host)
        limits = prepared.limits or server.limits
        scheduler = Scheduler(memory, prepared.times[end], limits)
        return Engine(requests, scheduler, server.shape.max_context).run()

    tier, runs = prepared.times["value"].tier, {end: run(end) for end in ends}
    return served(prepared.name, runs, goals, tier, prepared.front, prepared.tiers)


class Engine:
    """Serves requests on one card.

    Args:
        requests: in the order of their arrival.
        scheduler: decides what each step does.
        longest: the most tokens that a prompt and its answer may have together.
    """

    def __init__(self, requests: Requests, scheduler: Scheduler, longest: int) -> None:
        self.scheduler, self.longest = scheduler, longest
        self.record = Record(requests, scheduler.memory, scheduler.counts)
        self.environment = simpy.Environment()
        self.next_arrival_s = 0.0
        self._arrived = self.environment.event()
        self._requests = requests
        self._queue = self._sequences()

    def run(self) -> Record:
        """Serve all requests; what was recorded of them."""
        if self._requests.at_once:
            self.next_arrival_s = math.inf
            self._arrive_now(self._requests.at_once)
        else:
            self.environment.process(self._arrive())
        self.environment.process(self._serve())
        self.environment.run()
        return self.record

    def _arrive(self) -> Process:
        """Let every request arrive at its time; those of one moment before a step is planned."""
        for at, sequence in self._queue:
            if at > self.environment.now:
                self.next_arrival_s = at
                yield self.environment.timeout(at - self.environment.now)
            if self._accept(sequence) and not self._arrived.triggered:
                self._arrived.succeed()
        self.next_arrival_s = math.inf
        if not self._arrived.triggered:
            self._arrived.succeed()

    def _arrive_now(self, count: int) -> None:
        """Let so many requests arrive that are not refused, or all that are left."""
        for _, sequence in self._queue:
            self.record.arrived_s[sequence.index] = self.environment.now
            count -= self._accept(sequence)
            if not count:
                return

    def _accept(self, sequence: Sequence) -> bool:
        """Queue a request, unless it can never be served."""
        if reason := self._refusal(sequence):
            self.record.refuse(sequence, reason)
            return False
        self.scheduler.waiting.append(sequence)
        return True

    def _serve(self) -> Process:
        """Take steps while there is anything to do, and wait for requests where there is not."""
        environment, scheduler, record = self.environment, self.scheduler, self.record
        while True:
            began = environment.now
            step = scheduler.plan(self.next_arrival_s - began)
            if step is None:
                if self.next_arrival_s == math.inf:
                    return
                self._arrived = environment.event()
                yield self._arrived
                continue
            record.begin(step, began, len(scheduler.running), len(scheduler.waiting))
            yield environment.timeout(step.seconds)
            done = scheduler.complete(step)
            record.end(step, done, environment.now)
            if done and self._requests.at_once:
                self._arrive_now(len(done))

    def _sequences(self) -> Iterator[tuple[float, Sequence]]:
        """Every request with its time of arrival."""
        asked = self._requests
        times, prompts, outputs = (
            each.tolist() for each in (asked.arrival_s, asked.prompt_tokens, asked.output_tokens)
        )
        prefixes = asked.prefixes or [None] * len(asked)
        for index, prefix in enumerate(prefixes):
            yield times[index], Sequence(index, prompts[index], outputs[index], prefix)

    def _refusal(self, sequence: Sequence) -> str | None:
        """Why a request can never be served, or None."""
        if sequence.prompt + sequence.output > self.longest:
            return "longer than the model's context"
        memory = self.scheduler.memory
        if memory.most(sequence.prompt, sequence.output) > memory.pool.total:
            return "needs more cache than there is"
        return None
