"""Plans found at one prompt length, run at others: what carries over, and what can be foretold.

    python benchmarks/lengths.py --device cuda --out benchmarks/results/lengths-h200.json

Tables are built and plans solved at every length; every plan runs live at every length, on samples
that it was not found on. ``carried`` is live loss there over live loss at the length where a plan
was found. ``foretold`` draws a line through a plan's predictions at the two shortest lengths, in
logarithms of loss and length, and compares live losses at the longer ones with it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predictions import Run, rounded, tables_of

from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.quality.tables import Tables
from kvtune.traces.models import load_model
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.probes import Probes
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.options import LAPTOP
from kvtune.tuner.solver import policy_of
from kvtune.tuner.validate import union_of_needs

SHARES = (0.03, 0.06, 0.12, 0.25)
KINDS = ("prose", "code", "retrieval")
SHARE_OF_TABLES = 0.6
"""Of the time; the rest runs plans."""
TINY = replace(LAPTOP, methods=LAPTOP.methods[:1], shares=(1 / 16, 1 / 4))


@dataclass(frozen=True)
class Plan:
    """A plan and where it was found."""

    tokens: int
    share: float
    choice: np.ndarray


def solved(tables: Tables, tokens: int) -> list[Plan]:
    """Plans at every share, on the search samples of one length."""
    search = tables.of_split("search")
    footprint = search.footprints(search.prompt_tokens, search.head_dim)
    problem = Problem.of(search, footprint)
    full = 4 * search.heads * search.head_dim * search.prompt_tokens
    return [
        Plan(tokens, share, solve(problem, int(share * full) - 4 * search.heads))
        for share in SHARES
    ]


def run_at(
    run: Run, tables: Tables, samples: Sequence[Sample], plans: Sequence[Plan]
) -> list[dict[str, Any]]:
    """Live and predicted losses of every plan on one length's held-out samples, ``[n]`` each."""
    policies = [policy_of(tables, plan.choice, f"plan at {plan.share:.0%}") for plan in plans]
    live = []
    for sample in samples:
        prompt = fresh_prompt(run.loaded, sample, union_of_needs(policies))
        full = full_cache(run.loaded, sample, prompt)
        live.append([r.kl.mean() for r in run_live(run.loaded, sample, prompt, policies, full)])
    held_out = tables.of_split("evaluate")
    return [
        {
            "found at": plan.tokens,
            "share": plan.share,
            "live": rounded(row),
            "predicted": rounded(held_out.by_sample(plan.choice)),
        }
        for plan, row in zip(plans, np.array(live).T, strict=True)
    ]


def judged(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What carries over and what is foretold, by pair of lengths and share."""
    live, predicted = ({} for _ in range(2))
    for at, rows in found.items():
        for row in rows:
            key = row["found at"], int(at), row["share"]
            live[key], predicted[key] = (float(np.mean(row[x])) for x in ("live", "predicted"))
    lengths = sorted({at for _, at, _ in live})
    carried = {
        f"{home} to {at}, {share:.0%}": round(loss / live[home, home, share], 3)
        for (home, at, share), loss in live.items()
        if at != home and (home, home, share) in live
    }
    foretold = {}
    for (home, at, share), loss in live.items():
        known = {(home, each, share) for each in lengths[:2]} <= predicted.keys()
        if known and home in lengths[:2] and at in lengths[2:]:
            first, second = (math.log(predicted[home, each, share]) for each in lengths[:2])
            slope = (second - first) / math.log(lengths[1] / lengths[0])
            line = math.exp(second + slope * math.log(at / lengths[1]))
            foretold[f"{home} to {at}, {share:.0%}"] = round(loss / line, 3)
    return {"live over live where found": carried, "live over foretold": foretold}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=(1024, 2048, 4096, 8192))
    parser.add_argument("--observed", type=int, default=128)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2, help="of each kind and split")
    parser.add_argument("--seconds", type=float, default=200.0, help="nothing is begun after")
    parser.add_argument("--tiny", action="store_true", help="few options and one kind of text")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    probes = {"probes": Probes(arguments.probes)}
    run = Run(arguments.out, loaded, probes, started + arguments.seconds, started)
    each = dict.fromkeys(KINDS[-1:] if arguments.tiny else KINDS, arguments.samples)
    workload = Workload({"search": each, "evaluate": each}, observed=arguments.observed)
    menu = TINY if arguments.tiny else LAPTOP
    run.found |= {
        "device": torch.cuda.get_device_name() if loaded.device != "cpu" else "cpu",
        "workload": workload.describe(),
        "no needle in the last": UNASKED_END,
    }
    made: dict[int, tuple[Tables, list[Sample]]] = {}
    plans: list[Plan] = []
    for tokens in arguments.lengths:
        if time.monotonic() > started + SHARE_OF_TABLES * arguments.seconds:
            run.found.setdefault("left out", []).append(tokens)
            continue
        try:
            samples = build(replace(workload, tokens=tokens), loaded.tokenizer)
            tables = tables_of(run, samples, menu)["probes"]
        except Exception as error:  # one length must not lose the others
            run.found.setdefault("failed", []).append(f"{tokens}: {error!r}"[:300])
            continue
        held_out = [sample for sample in samples if sample.split == "evaluate"]
        made[tokens] = tables, held_out
        plans += solved(tables, tokens)
        run.record("tables at", list(made))
    found = {}
    for tokens, (tables, held_out) in made.items():
        if time.monotonic() > run.deadline:
            run.found.setdefault("not run at", []).append(tokens)
            continue
        found[str(tokens)] = run_at(run, tables, held_out, plans)
        run.record("losses at", found)
    run.record("judged", judged(found))
    print(json.dumps(run.found["judged"], indent=1))


if __name__ == "__main__":
    main()
