"""The packaged tables' plans against the strongest baselines, live, without a GPU.

    python benchmarks/plan_against_rivals.py --per-kind 3 --out benchmarks/results

Plans are solved on the packaged tables' search samples, and among a few settings the one with the
least predicted loss on their selection samples is taken; then plans and baselines run live in
float32 on evaluation samples of the same workload. Baselines get sinks in 16 bits, as plans may.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import Outcome, used
from quality import KINDS, SHARES

from kvtune.common.progress import Bars
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.formats.grouped import Int3, Int4
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.tables import Tables
from kvtune.traces.models import load_model
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.baselines import fill
from kvtune.tuner.quality import bootstrap
from kvtune.tuner.sources import packaged_tables

PUBLISHED = (SnapKV(), H2O(), StreamingLLM())
RIVALS = (
    (AsGiven(), H2O(), Int3()),
    (AsGiven(), H2O(), Int3(exact_first=4)),
    (AsGiven(), H2O(), Int4(exact_first=4)),
    (AsGiven(), H2O(recent_share=0.1), Int3(exact_first=4)),
    (AsGiven(), SnapKV(), Int3(exact_first=4)),
    (AdaKV(), H2O(), Int3(exact_first=4)),
    (AdaKV(), SnapKV(), Int3(exact_first=4)),
)
ROWS = 12


def plans(tables: Tables) -> dict[float, Policy]:
    """One plan a share."""
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    full = 4 * tables.heads * tables.head_dim * tables.prompt_tokens
    fit, check = Problem.of(tables.of_split("search"), footprint), tables.of_split("select")
    three = np.flatnonzero(
        [o.budget.share is None or o.method in PUBLISHED for o in tables.options]
    )
    found = {}
    for share in SHARES:
        budget = int(share * full) - 4 * tables.heads
        tried = [
            columns[solve(fit.allowing(columns).shrunk(shrinkage), budget)]
            for columns in (three, np.arange(len(tables.options)))
            for shrinkage in (0.0, 0.2, 0.4)
        ]
        best = min(tried, key=lambda c: float(check.sample_weights() @ check.by_sample(c)))
        rows = best.reshape(-1, tables.kv_heads)
        heads = tuple(tuple(tables.options[o] for o in row) for row in rows)
        found[share] = Policy(f"plan at {share:.0%}", heads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--per-kind", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--name", default="plan-against-rivals")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    tables, _ = packaged_tables()
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    evaluate = {"prose": 8, "code": 8, "retrieval": 64}  # the workload the tables come from
    made = build(Workload({"evaluate": evaluate}), loaded.tokenizer)
    samples = [
        s
        for kind in arguments.kinds
        for s in [s for s in made if s.kind == kind][: arguments.per_kind]
    ]
    layers, heads, head_dim = tables.layers, tables.kv_heads, tables.head_dim
    full = 4 * tables.heads * head_dim * tables.prompt_tokens
    entrants: list[tuple[float, str, Policy]] = [(s, "plan", p) for s, p in plans(tables).items()]
    for share in SHARES:
        for allocator, method, form in RIVALS:
            option = Option(method, keys=form, values=form)
            shape = (tables.prompt_tokens, layers, heads, head_dim)
            if (policy := fill(option, allocator, int(share * full), *shape)) is not None:
                entrants.append((share, "rival", policy))
    outcomes = [Outcome() for _ in entrants]
    for sample in Bars().track(samples, "running live", len(samples)):
        prompt = fresh_prompt(loaded, sample, Needs(window=64, column_sums=True))
        for at in range(0, len(entrants), ROWS):
            some = [policy for *_, policy in entrants[at : at + ROWS]]
            runs = run_live(loaded, sample, prompt, some)
            for outcome, run in zip(outcomes[at:], runs, strict=False):
                outcome.add(sample, run, full)
        report(arguments, entrants, outcomes)


def report(arguments: Any, entrants: list[Any], outcomes: list[Outcome]) -> None:
    table: dict[str, Any] = {}
    for share in SHARES:
        mine = next(
            o for (s, k, _), o in zip(entrants, outcomes, strict=True) if (s, k) == (share, "plan")
        )
        plan = next(p for s, k, p in entrants if (s, k) == (share, "plan"))
        rows = []
        for (at, kind, policy), outcome in zip(entrants, outcomes, strict=True):
            if at == share and kind == "rival":
                ratio = bootstrap(outcome.kl, outcome.kinds) / bootstrap(mine.kl, mine.kinds)
                found = outcome.summary() | {"name": policy.name}
                found["times_the_plan"] = found["kl"] / mine.summary()["kl"]
                found["times_interval"] = [float(x) for x in np.percentile(ratio, [2.5, 97.5])]
                rows.append(found)
        table[f"{share:.0%}"] = {
            "plan": mine.summary() | {"options": used(plan)},
            "rivals": sorted(rows, key=lambda row: row["kl"]),
        }
    figures = {"samples": len(outcomes[0].kl), "device": arguments.device, "at_equal_bytes": table}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name}.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
