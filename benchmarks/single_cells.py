"""Each head of a solved plan alone, predicted beside live: which cell is lost on the way.

    python benchmarks/single_cells.py --device cuda --out benchmarks/results/single-cells-h200.json
    python benchmarks/single_cells.py --device cpu --tiny --out FILE        # that it runs

Tables are made of a few samples in the model's dtype on this device and solved at --share of the
bf16 bytes. On the very samples that the tables are made of, so that nothing has to generalise, run
live: the plan, the plan with one head after another given its whole prompt back (``without``), and
one head after another of the plan with all others whole (``alone``). A cell whose live loss is far
from its entry in the tables is at fault, or is one that the first order does not see. ``floor`` is
the loss of a policy that keeps everything in 16 bits: rounding alone.

``--dtype`` names another dtype than the device's own. Cells come worst first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recorded_parts import say

from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import traced_prompt
from kvtune.simulator.quality.build import build_tables
from kvtune.simulator.quality.tables import Tables
from kvtune.traces.capture import capture
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.trace import Trace
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.exchange import Choice
from kvtune.tuner.options import LAPTOP, Menu
from kvtune.tuner.solver import policy_of
from kvtune.tuner.sources import queries_of, signals_of

ROWS = {"cpu": 6, "cuda": 16}  # policies a batch
LITTLE = Menu((StreamingLLM(),), (1 / 16, 1 / 4), ((Bf16(), Bf16()),))


def captured(loaded: LoadedModel, workload: Workload, menu: Menu, folder: Path) -> Trace:
    """A trace of the workload as a search on it takes it."""
    return capture(
        loaded,
        build(workload, loaded.tokenizer),
        folder,
        probes=4,
        signals=signals_of(menu.needs),
        queries=queries_of(menu.needs, workload.observed),
    )


def variants(plan: Policy) -> Iterator[tuple[str, int, Policy]]:
    """The plan's heads one by one: kept alone, and taken away."""
    whole, planned = Option(), list(plan.options())

    def policy(options: Sequence[Option]) -> Policy:
        per_layer = plan.kv_heads
        rows = (options[at : at + per_layer] for at in range(0, len(options), per_layer))
        return Policy("one head", tuple(tuple(row) for row in rows))

    for head, option in enumerate(planned):
        alone = [whole] * len(planned)
        alone[head] = option
        yield "alone", head, policy(alone)
        yield "without", head, policy([*planned[:head], whole, *planned[head + 1 :]])


class Bench:
    """The model, its trace and tables, and the loss of policies on the trace's own samples."""

    def __init__(self, loaded: LoadedModel, trace: Trace, menu: Menu) -> None:
        self.loaded, self.trace = loaded, trace
        self.tables: Tables = build_tables(trace, menu.options(), device=loaded.device)

    def solved(self, share: float, shrinkage: float) -> Choice:
        tables = self.tables
        footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
        budget = int(share * tables.heads * tables.prompt_tokens * tables.head_dim * 4)
        return solve(Problem.of(tables, footprint, shrinkage=shrinkage), budget)

    def live(self, policies: Sequence[Policy], sample: int) -> list[float]:
        """KL of each policy on one sample, nats/token."""
        record = self.trace.samples[sample]
        prompt = traced_prompt(self.trace, record, self.loaded.device, probes=False)
        full = full_cache(self.loaded, record, prompt)
        rows = ROWS[self.loaded.device.split(":")[0]]
        batches = (policies[at : at + rows] for at in range(0, len(policies), rows))
        return [
            float(run.kl.mean())
            for batch in batches
            for run in run_live(self.loaded, record, prompt, batch, full)
        ]

    def row(self, head: int, option: int) -> dict[str, Any]:
        return {
            "layer": head // self.tables.kv_heads,
            "head": head % self.tables.kv_heads,
            "option": self.tables.options[option].label,
        }


def measured(bench: Bench, choice: Choice, sample: int, heads: int) -> dict[str, Any]:
    """One sample: the plan, and each head of it alone and taken away, worst excess first."""
    tables, plan = bench.tables, policy_of(bench.tables, choice, "solved")
    whole = Policy.uniform(Option(), tables.layers, tables.kv_heads)
    some = [each for each in variants(plan) if each[1] < heads]
    losses = bench.live([whole, plan, *(policy for _, _, policy in some)], sample)
    predicted = tables.loss[sample, np.arange(tables.heads), choice]
    cells: list[dict[str, Any]] = [
        bench.row(head, int(choice[head])) | {"predicted": float(predicted[head])}
        for head in range(heads)
    ]
    for (name, head, _), loss in zip(some, losses[2:], strict=True):
        cells[head][name] = loss
    cells.sort(key=lambda cell: cell["predicted"] - cell["alone"])
    return {
        "kind": bench.trace.samples[sample].kind,
        "floor": losses[0],
        "plan": {
            "predicted": float(tables.by_sample(choice)[sample]),
            "own terms": float(predicted.sum()),
            "live": losses[1],
        },
        "cells": cells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="the device's own unless given")
    parser.add_argument("--tiny", action="store_true", help="that it runs, in two minutes")
    parser.add_argument("--share", type=float, default=0.12, help="of the prompt's bf16 bytes")
    parser.add_argument("--seconds", type=float, default=120, help="begin no sample after so many")
    arguments = parser.parse_args()
    begun = time.monotonic()
    menu = LITTLE if arguments.tiny else LAPTOP
    kinds = ("retrieval",) if arguments.tiny else ("retrieval", "prose", "code")
    tokens = 512 if arguments.tiny else 1024
    workload = Workload({"search": dict.fromkeys(kinds, 1)}, tokens=tokens, observed=128)
    loaded = load_model("smollm2-135m", device=arguments.device, dtype=arguments.dtype)
    found: dict[str, Any] = {"torch": torch.__version__, "dtype": loaded.dtype, "samples": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(loaded, captured(loaded, workload, menu, Path(folder)), menu)
        say("tables", f"{time.monotonic() - begun:.0f} s")
        choice = bench.solved(arguments.share, 0.4)
        heads = 4 if arguments.tiny else bench.tables.heads
        for sample in range(len(bench.trace.samples)):
            if time.monotonic() - begun > arguments.seconds:
                say("out of time")
                break
            found["samples"].append(measured(bench, choice, sample, heads))
            arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            last = found["samples"][-1]
            say(last["kind"], last["plan"], "floor", last["floor"], *last["cells"][:3])


if __name__ == "__main__":
    main()
