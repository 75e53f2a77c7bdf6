"""A run of ``quality.py`` or ``compaction.py``: its model, samples, processes and figures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workers
from divisions import KINDS, Division
from outcomes import Outcome

from kvtune.policies.policy import Policy
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample


@dataclass
class Bench:
    """One run: what it measured so far, written after every step."""

    out: Path
    loaded: LoadedModel
    crew: workers.Crew
    division: Division
    started: float = field(default_factory=time.monotonic)
    figures: dict[str, Any] = field(default_factory=dict)
    file: str = "quality.json"

    def record(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self.figures["seconds"] = round(time.monotonic() - self.started, 1)
        (self.out / self.file).write_text(json.dumps(self.figures, indent=1) + "\n")
        print(f"[{self.figures['seconds']:7.1f} s] {name}", flush=True)

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.division.plain

    def of(self, split: str) -> list[Sample]:
        return self.division.of(split)

    def first(self, each: int, split: str) -> list[Sample]:
        """The first samples of every kind."""
        return self.of(split)[: each * len(KINDS)]

    def run(self, policies: Sequence[Policy], samples: Sequence[Sample]) -> list[Outcome]:
        """Every policy live on every sample."""
        outcomes = [Outcome() for _ in policies]
        answers = self.crew.everywhere(workers.live, samples, list(policies))
        for sample, runs in zip(samples, answers, strict=True):
            for outcome, run in zip(outcomes, runs, strict=True):
                outcome.add(sample, run, self.full_bytes)
        return outcomes

    @property
    def prompt(self) -> int:
        return self.samples[0].prompt

    @property
    def shape(self) -> tuple[int, int, int]:
        geometry = self.loaded.geometry
        return geometry.layers, geometry.kv_heads, geometry.head_dim

    @property
    def full_bytes(self) -> int:
        layers, heads, head_dim = self.shape
        return 4 * layers * heads * head_dim * self.prompt
