"""A run of ``quality.py``, ``compaction.py`` and their like: model, samples, processes, figures."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import workers
from divisions import KINDS, Division, divided
from outcomes import Outcome

from kvtune.common.files import atomic
from kvtune.policies.policy import Policy
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.needles import UNASKED_END
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
        with atomic(self.out / self.file) as temporary:  # a run may be ended at any time
            temporary.write_text(json.dumps(self.figures, indent=1) + "\n")
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
        """Every policy live on every sample, which several processes share where it is few."""
        outcomes = [Outcome() for _ in policies]
        shares = max(self.crew.count // max(len(samples), 1), 1)
        each = max(-(-len(policies) // shares), 1)
        parts = [list(policies[at : at + each]) for at in range(0, len(policies), each)]
        work = [workers.Share(sample, part) for sample in samples for part in parts]
        answers = iter(self.crew.everywhere(workers.live_share, work))
        for sample in samples:
            runs = [run for _ in parts for run in next(answers)]
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


@contextmanager
def opened(
    arguments: argparse.Namespace,
    *,
    tokens: int,
    observed: int,
    per_kind: tuple[int, int, int],
    needles: int,
    **setting: Any,
) -> Iterator[Bench]:
    """A run whose processes and model are there, and that has said on which device and samples.

    Args:
        arguments: ``model``, ``device``, ``scratch``, ``workers`` and ``out``, a file.
        tokens: of each sample.
        observed: of those, after the prompt.
        per_kind: search, selection and evaluation samples of each kind of text.
        needles: evaluation samples of needles besides.
        setting: what else the result says of the run.
    """
    place = workers.Place(arguments.model, arguments.device, arguments.scratch)
    with workers.Crew(place, arguments.workers) as crew:
        loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
        crew.model_is_stored()
        division = divided(
            loaded.tokenizer, per_kind, select_needles=2, needles=needles, tokens=tokens,
            observed=observed,
        )  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments.out.parent, loaded, crew, division, file=arguments.out.name)
        cuda = arguments.device != "cpu"
        bench.record("device", torch.cuda.get_device_name() if cuda else "cpu")
        samples = {"workload": division.workload, "no needle in the last": UNASKED_END}
        bench.record("setting", samples | setting)
        yield bench
