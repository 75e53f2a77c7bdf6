"""What a run comes to: latencies of requests, throughput, goodput, queue and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtune.common.estimate import Estimate, Tier
from kvtune.simulator.latency.front_end import NOTHING, FrontEnd
from kvtune.simulator.serving.record import Record, Sample
from kvtune.simulator.serving.step_times import End

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Goals:
    """Service-level objectives: the most that a request may take; None for no limit.

    Args:
        ttft_s: seconds until its first token.
        tpot_s: mean seconds a token after the first.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is an objective."""
        return self.ttft_s is not None or self.tpot_s is not None


@dataclass(frozen=True)
class Served:
    """What serving all requests under one policy comes to.

    Args:
        name: of the policy.
        figures: by name; intervals span the runs with all times at their low and high ends.
        requests, finished: that arrived, and that were answered.
        refused: requests turned away, by reason.
        preemptions, swaps: sequences that gave their blocks back; those of them that moved to
            the host.
        shared_tokens: prompt tokens that were held already when they were needed.
        prompt_tokens: that were asked for, again after every preemption.
        steps: of the engine.
        blocks, block_bytes, host_blocks: on the card, bytes of one, on the host.
        peak_blocks, peak_running, peak_waiting: the most at any time.
        timeline: state of the engine over time.
        tiers: of the times of each part of a step, by what it does.
    """

    name: str
    figures: dict[str, Estimate]
    requests: int
    finished: int
    refused: dict[str, int]
    preemptions: int
    swaps: int
    shared_tokens: int
    prompt_tokens: int
    steps: int
    blocks: int
    block_bytes: int
    host_blocks: int
    peak_blocks: int
    peak_running: int
    peak_waiting: int
    timeline: list[Sample]
    tiers: Mapping[str, Tier]


def served(
    name: str,
    records: Mapping[End, Record],
    goals: Goals,
    tier: Tier,
    front: FrontEnd = NOTHING,
    tiers: Mapping[str, Tier] | None = None,
) -> Served:
    """The report of a policy's runs.

    Args:
        name: of the policy.
        records: of the run with likely times, and of those with all times at either end.
        goals: that goodput is counted under.
        tier: of the least certain time, which every figure has.
        front: what a first token takes beside the engine's steps.
        tiers: of each part of a step.
    """
    runs = {end: measures(record, goals, front) for end, record in records.items()}
    record = records["value"]
    memory, counts = record.memory, record.counts
    return Served(
        name=name,
        figures={
            key: _estimate(
                [run[key][0] for run in runs.values()],
                value,
                unit,
                tier,
                front.within if key.startswith("ttft") else 1.0,
            )
            for key, (value, unit) in runs["value"].items()
        },
        requests=len(record.requests),
        finished=int(np.isfinite(record.finished_s).sum()),
        refused=dict(record.refused),
        preemptions=counts.preemptions,
        swaps=counts.swaps,
        shared_tokens=counts.shared_tokens,
        prompt_tokens=counts.prompt_tokens,
        steps=counts.steps,
        blocks=memory.pool.total,
        block_bytes=memory.block_bytes,
        host_blocks=memory.host.total,
        peak_blocks=record.peak_blocks,
        peak_running=record.peak_running,
        peak_waiting=record.peak_waiting,
        timeline=record.samples,
        tiers=tiers or {},
    )


def measures(
    record: Record, goals: Goals, front: FrontEnd = NOTHING
) -> dict[str, tuple[float, str]]:
    """Every figure of one run with its unit; nan where no request was answered."""
    first, finished, started = (
        np.asarray(each) for each in (record.first_s, record.finished_s, record.started_s)
    )
    done = np.isfinite(finished)
    arrival, outputs = np.asarray(record.arrived_s)[done], record.requests.output_tokens[done]
    first, finished, started = first[done], finished[done], started[done]
    long = outputs > 1
    tpot = (finished - first)[long] / (outputs[long] - 1)
    prompts = record.requests.prompt_tokens[done]
    span = float(finished.max()) - record.arrived_s[0] if done.any() else np.nan
    running = record.running_seconds / span
    beside = front.seconds(prompts, tpot.mean() if len(tpot) else 0.0, running)
    ttft, waited, whole = first - arrival + beside, started - arrival, finished - arrival + beside
    found: dict[str, tuple[float, str]] = {}
    for name, values in (
        ("ttft", ttft),
        ("tpot", tpot),
        ("queue_time", waited),
        ("latency", whole),
    ):
        found |= _spread(name, values)
    found["requests_per_second"] = (done.sum() / span, "requests/s")
    found["tokens_per_second"] = (outputs.sum() / span, "tokens/s")
    if goals.any:
        good = _good(ttft, (finished - first) / np.maximum(outputs - 1, 1), goals)
        found["goodput"] = (good.sum() / span, "requests/s")
        found["share_within_slo"] = (good.sum() / len(record.requests), "share")
    memory = record.memory
    found["mean_memory"] = (record.block_seconds / span * memory.block_bytes, "B")
    found["peak_memory"] = (float(record.peak_blocks * memory.block_bytes), "B")
    found["mean_running"] = (running, "sequences")
    found["mean_waiting"] = (record.waiting_seconds / span, "requests")
    found["busy"] = (record.busy_s / span, "share")
    return found


def _spread(name: str, values: NDArray[np.float64]) -> dict[str, tuple[float, str]]:
    """Mean and percentiles of seconds."""
    if not len(values):
        values = np.array([np.nan])
    points = np.percentile(values, PERCENTILES)
    at = {f"{name}_p{q}": (float(p), "s") for q, p in zip(PERCENTILES, points, strict=True)}
    return {f"{name}_mean": (float(values.mean()), "s"), **at}


def _good(ttft: NDArray[np.float64], tpot: NDArray[np.float64], goals: Goals) -> NDArray[np.bool_]:
    """Which requests met every objective."""
    good = np.ones(len(ttft), bool)
    for values, most in ((ttft, goals.ttft_s), (tpot, goals.tpot_s)):
        if most is not None:
            good &= values <= most
    return good


def _estimate(values: list[float], value: float, unit: str, tier: Tier, within: float) -> Estimate:
    """One figure; its interval takes in the runs with other times, and is a factor at least."""
    low, high = min(*values, value / within), max(*values, value * within)
    return Estimate(float(value), float(low), float(high), unit, tier)
