"""What processes of long_plans.py do: tables of a sample, and generations from several prompts."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workers

from kvtune.common.progress import Silent
from kvtune.runtime.generate import Generations
from kvtune.runtime.generation_run import GenerationRun
from kvtune.runtime.live_policies import LivePolicy
from kvtune.simulator.quality.decoding import build_decode_tables
from kvtune.simulator.quality.tables import Tables
from kvtune.traces.samples import Sample
from kvtune.tuner.long.live import capture_long, generate
from kvtune.tuner.long.menu import LongMenu

SHORT = 24  # tokens of a generation that only asks whether the bound holds
Part = dict[str, Any]


def tables_of(sample: Sample, menu: LongMenu) -> Tables:
    """One sample's tables, in a process of its own."""
    loaded = workers.loaded()
    options = menu.options(len(sample.token_ids))
    with tempfile.TemporaryDirectory() as folder:
        trace = capture_long(loaded, [sample], Path(folder) / "trace", menu, Silent())
        torch.cuda.empty_cache()  # the backward pass takes most: leave room for the others
        return build_decode_tables(
            trace, options, residual=menu.residual, device=loaded.device, block=16
        )


@dataclass(frozen=True)
class Batch:
    """Samples whose prompts generate side by side."""

    id: str
    samples: tuple[Sample, ...]


def generated(
    batch: Batch, policies: list[LivePolicy], prompt: int, tokens: int, until: float
) -> list[Part]:
    """Generations of a batch under all policies, as far as time allows."""
    started = time.monotonic()
    found = generate(
        workers.loaded(),
        [sample.token_ids[: prompt + 1] for sample in batch.samples],
        policies,
        tokens,
        seeds=[int(sample.id.rsplit("-", 1)[-1]) for sample in batch.samples],
        until=lambda: time.monotonic() > until,
    )
    steps = {
        "seconds": time.monotonic() - started, "replayed": found.replayed, "fault": found.fault,
    }  # fmt: skip
    return [
        {
            "prompt": sample.id,
            "kind": sample.kind,
            "tokens": len(runs[0].kl),
            "steps": steps,
            "runs": [outcome(run) for run in runs],
        }
        for sample, runs in zip(batch.samples, found.runs, strict=True)
    ]


def replayed_beside_plain(batch: Batch, policies: list[LivePolicy], prompt: int) -> Part:
    """A few steps replayed as a graph beside the same steps launched one by one."""
    found = []
    for captures in (True, False):
        loaded = workers.loaded()
        prompts = [sample.token_ids[: prompt + 1] for sample in batch.samples]
        both = Generations(loaded, prompts, policies, room=SHORT)
        both.steps.captures &= captures
        started = time.monotonic()
        both.advance(SHORT)
        runs = both.runs()  # waits for the device
        losses = np.array([[run.kl for run in each] for each in runs])
        found.append((losses, both.steps.replayed, (time.monotonic() - started) / SHORT))
    (ours, replayed, quick_s), (plain, _, plain_s) = found
    return {
        "replayed": replayed, "of": SHORT, "seconds_a_step": quick_s, "plain_s_a_step": plain_s,
        "largest_difference": float(abs(ours - plain).max()),
        "largest_kl": float(plain.max()),
    }  # fmt: skip


def outcome(run: GenerationRun) -> Part:
    """One policy on one prompt."""
    return {
        "name": run.name,
        "kl": float(run.kl.mean()),
        "kl_by_quarter": [float(q.mean()) for q in np.array_split(run.kl, 4)],
        "agreement": float(run.agrees.mean()),
        "mean_bytes": run.mean_bytes,
        "peak_bytes": run.peak_bytes,
        "evicted_least": int(run.evicted.min()),
        "evicted_mean": float(run.evicted.mean()),
    }
