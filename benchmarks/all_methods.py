"""What the tuned plan gains when a head may have any method: three methods against all of them.

    python benchmarks/all_methods.py --device cuda --workload full

One trace, one set of tables: both menus have the same shares and formats, and the small one is
the large one's columns. Plans are solved at 3 / 6 / 12 % of the bf16 bytes on the search samples,
how much of the terms between heads counts is picked on the selection samples, and both run live in
float32 on evaluation samples that neither step has seen. The gain is how many times the large
menu's loss the small one's is, with a bootstrap interval over samples, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outcomes import Outcome, used

from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.runtime.live import run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.build import build_tables
from kvtune.simulator.tables import Tables
from kvtune.traces.capture import capture
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build, named_workload
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.options import FULL, METHODS, Menu, every_method
from kvtune.tuner.quality import bootstrap
from kvtune.tuner.sources import queries_of, signals_of
from kvtune.tuner.validate import union_of_needs

SHARES = (0.03, 0.06, 0.12)
CROSS_TERMS = (0.0, 0.2, 0.4)
PROBES = {"small": 4, "full": 16}
REDUCED = Menu(
    METHODS,
    (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
    (
        (Bf16(), Bf16()),
        (Int4(exact_first=4), Int4(exact_first=4)),
        (Int4(exact_first=4), Int2(exact_first=4)),
    ),
)
MENUS = {"small": REDUCED, "full": FULL}


def workload_of(arguments: argparse.Namespace) -> Workload:
    """The named one, with more held-out samples if asked: they are only run, never traced."""
    workload = named_workload(arguments.workload, arguments.seed)
    counts = {split: dict(kinds) for split, kinds in workload.counts.items()}
    if arguments.evaluate:
        counts["evaluate"] = dict.fromkeys(counts["evaluate"], arguments.evaluate)
    return replace(workload, counts=counts)


def tables_of(loaded: LoadedModel, samples: Sequence[Sample], menu: Menu, probes: int) -> Tables:
    """Every option of the menu replayed on a trace, which is not kept."""
    with tempfile.TemporaryDirectory() as scratch:
        trace = capture(
            loaded,
            samples,
            Path(scratch) / "trace",
            probes=probes,
            signals=signals_of(menu.needs),
            queries=queries_of(menu.needs, samples[0].observed),
        )
        return build_tables(trace, menu.options(), device=loaded.device)


def plans_of(tables: Tables) -> list[tuple[Policy, float]]:
    """At every share the plan of three methods, then that of all."""
    of_three = [option.method in (*METHODS, Full()) for option in tables.options]
    three = tables.with_options(np.flatnonzero(of_three).tolist())
    menus = (("three methods", three), ("all methods", tables))
    return [plan(menu, share, name) for share in SHARES for name, menu in menus]


def plan(tables: Tables, share: float, name: str) -> tuple[Policy, float]:
    """The best plan within a share of the bf16 bytes, and its loss predicted on selection."""
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    full = 4 * tables.heads * tables.head_dim * tables.prompt_tokens
    room = int(share * full) - footprint_of_lengths(1, tables.heads)
    problem, check = Problem.of(tables.of_split("search"), footprint), tables.of_split("select")
    found = [solve(problem.shrunk(cross), room) for cross in CROSS_TERMS]
    predicted = [float(check.sample_weights() @ check.by_sample(choice)) for choice in found]
    best = int(np.argmin(predicted))
    rows = found[best].reshape(-1, tables.kv_heads)
    heads = tuple(tuple(tables.options[option] for option in row) for row in rows)
    return Policy(f"{name} at {share:.0%}", heads), predicted[best]


def by_turns(samples: Sequence[Sample]) -> list[Sample]:
    """One of every kind, then another of every kind: what is there when time is up is balanced."""
    return sorted(samples, key=lambda sample: (sample.id.rsplit("-", 1)[-1], sample.kind))


def run_sample(
    loaded: LoadedModel, sample: Sample, policies: Sequence[Policy], outcomes: Sequence[Outcome]
) -> None:
    """All policies in one batch on one held-out sample."""
    geometry = loaded.geometry
    full = 4 * geometry.layers * geometry.kv_heads * geometry.head_dim * sample.prompt
    prompt = fresh_prompt(loaded, sample, union_of_needs(policies))
    runs = run_live(loaded, sample, prompt, policies)
    for outcome, run in zip(outcomes, runs, strict=True):
        outcome.add(sample, run, full)


def compared(policies: Sequence[Policy], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Both plans of every share, and what the larger menu gains."""
    found = {}
    for place, share in enumerate(SHARES):
        pair = slice(2 * place, 2 * place + 2)
        three, every = outcomes[pair]
        plans = (described(*each) for each in zip(policies[pair], outcomes[pair], strict=True))
        names = ("three", "every")
        found[f"{share:.0%}"] = dict(zip(names, plans, strict=True)) | {"gain": gain(three, every)}
    return found


def gain(three: Outcome, every: Outcome) -> dict[str, Any]:
    """The small menu's loss beside the large one's; the same samples are drawn for both."""
    theirs, ours = (bootstrap(outcome.kl, outcome.kinds) for outcome in (three, every))
    return {
        "times": three.mean_kl / every.mean_kl,
        "times_interval": [float(x) for x in np.percentile(theirs / ours, [2.5, 97.5])],
        "samples_better": int(np.sum(np.array(three.kl) > np.array(every.kl))),
        "samples": len(every.kl),
    }


def described(policy: Policy, outcome: Outcome) -> dict[str, Any]:
    methods = Counter(option.method.label for option in policy.options())
    return {
        **outcome.summary(),
        "heads_of_methods": dict(methods.most_common()),
        "options": used(policy),
    }


class Record:
    """What was found so far, written after every step."""

    def __init__(self, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out, self.started, self.found = out, time.monotonic(), dict[str, Any]()

    def __call__(self, **figures: Any) -> None:
        self.found |= {**figures, "seconds": round(time.monotonic() - self.started, 1)}
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"[{self.found['seconds']:7.1f} s] {', '.join(figures)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workload", choices=("small", "full"), default="small")
    parser.add_argument("--evaluate", type=int, help="held-out samples of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/all-methods.json"))
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    measure(arguments, Record(arguments.out))


def measure(arguments: argparse.Namespace, record: Record) -> None:
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    workload = workload_of(arguments)
    menu = replace(MENUS[arguments.workload], methods=every_method())
    record(
        model=loaded.name,
        device="cpu" if loaded.device == "cpu" else torch.cuda.get_device_name(),
        dtype=loaded.dtype,
        workload=workload.describe(),
        methods=[method.label for method in menu.methods],
        options=len(menu.options()),
    )
    samples = build(workload, loaded.tokenizer)
    fitted = [sample for sample in samples if sample.split != "evaluate"]
    tables = tables_of(loaded, fitted, menu, PROBES[arguments.workload])
    record(tables_of_samples=len(fitted))
    plans = plans_of(tables)
    record(predicted_on_selection={policy.name: predicted for policy, predicted in plans})
    policies = [policy for policy, _ in plans]
    outcomes = [Outcome() for _ in policies]
    for sample in by_turns([sample for sample in samples if sample.split == "evaluate"]):
        run_sample(loaded, sample, policies, outcomes)
        record(at=compared(policies, outcomes))


if __name__ == "__main__":
    main()
