"""Plans found at one prompt length, run at others, their budgets with and without a floor.

    python benchmarks/lengths.py --device cuda --out benchmarks/results/lengths-floors-h200.json

Tables are built and plans solved at every length; every plan runs live at every length, on samples
that it was not found on. At shorter lengths than its own it runs twice: with budgets that are
shares of the prompt alone, and with shares that keep no fewer tokens than where it was found.
``carried`` is live loss there over live loss at the length where a plan was found.
``causes`` says which options of a plan lose most at a shorter length, by method and tokens kept,
as tables made at that length predict it. ``lengths_judged.py`` fits and tests what is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predictions import Run, rounded, tables_of

from kvtune.policies.policy import Policy
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
    prompt_tokens: int
    share: float
    choice: np.ndarray


def solved(tables: Tables, tokens: int) -> list[Plan]:
    """Plans at every share, on the search samples of one length."""
    search = tables.of_split("search")
    footprint = search.footprints(search.prompt_tokens, search.head_dim)
    problem = Problem.of(search, footprint)
    full = 4 * search.heads * search.head_dim * search.prompt_tokens
    return [
        Plan(
            tokens,
            tables.prompt_tokens,
            share,
            solve(problem, int(share * full) - 4 * search.heads),
        )
        for share in SHARES
    ]


def policies_at(
    tables: Tables, tokens: int, plans: Sequence[Plan]
) -> list[tuple[Plan, bool, Policy]]:
    """Every plan as a policy of shares, and where prompts are shorter than its own with floors.

    Args:
        tables: of any length; they have the same options.
        tokens: N of the samples that will run.
        plans: of all lengths.
    """
    found = []
    for plan in plans:
        floored = replace(tables, prompt_tokens=plan.prompt_tokens).with_floors()
        for floors in (False, True) if plan.tokens > tokens else (False,):
            name = f"plan at {plan.share:.0%}"
            policy = policy_of(floored if floors else tables, plan.choice, name)
            found.append((plan, floors, policy))
    return found


def run_at(
    run: Run, tables: Tables, samples: Sequence[Sample], plans: Sequence[Plan]
) -> list[dict[str, Any]]:
    """Live and predicted losses of every plan on one length's held-out samples, ``[n]`` each."""
    asked = policies_at(tables, len(samples[0].token_ids), plans)
    policies = [policy for _, _, policy in asked]
    live = []
    for sample in samples:
        prompt = fresh_prompt(run.loaded, sample, union_of_needs(policies))
        full = full_cache(run.loaded, sample, prompt)
        live.append([r.kl.mean() for r in run_live(run.loaded, sample, prompt, policies, full)])
    held_out, whole = tables.of_split("evaluate"), 4 * tables.heads * tables.head_dim
    return [
        {
            "found at": plan.tokens,
            "share": plan.share,
            "floors": floors,
            "bytes": round(
                policy.footprint(samples[0].prompt, tables.head_dim) / (whole * samples[0].prompt),
                5,
            ),
            "live": rounded(row),
        }
        | ({} if floors else {"predicted": rounded(held_out.by_sample(plan.choice))})
        for (plan, floors, policy), row in zip(asked, np.array(live).T, strict=True)
    ]


def causes(home: Tables, there: Tables, plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Which options of each plan lose more at a shorter length, the worst three of each plan.

    A head's own term of the predicted loss is summed over the heads with one method and share.
    """
    found = []
    for plan in plans:
        lost = {}
        for option in np.unique(plan.choice):
            heads = np.flatnonzero(plan.choice == option)
            own = [float(t.loss[:, heads, option].mean(0).sum()) for t in (home, there)]
            lost[int(option)] = own, len(heads)
        worst = sorted(lost, key=lambda o: lost[o][0][0] - lost[o][0][1])[:3]
        found.append(
            {
                "found at": plan.tokens,
                "share": plan.share,
                "own terms": rounded([sum(own[n] for own, _ in lost.values()) for n in (0, 1)]),
                "worst": [
                    {
                        "option": home.options[o].label,
                        "heads": lost[o][1],
                        "tokens kept": [
                            home.options[o].budget.resolve(t.prompt_tokens) for t in (home, there)
                        ],
                        "own terms": rounded(lost[o][0]),
                    }
                    for o in worst
                ],
            }
        )
    return found


def carried(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Live loss at another length over that where a plan was found, by lengths, share and way."""
    live = {
        (row["found at"], int(at), row["share"], row.get("floors", False)): float(
            np.mean(row["live"])
        )
        for at, rows in found.items()
        for row in rows
    }
    return {
        f"{home} to {at}, {share:.0%}{', floors' if floors else ''}": round(
            loss / live[home, home, share, False], 3
        )
        for (home, at, share, floors), loss in live.items()
        if at != home and (home, home, share, False) in live
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=(1024, 2048, 4096, 8192))
    parser.add_argument("--observed", type=int, default=128)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2, help="of each kind and split")
    parser.add_argument("--seed", type=int, default=0, help="which texts are drawn, and where cut")
    parser.add_argument("--seconds", type=float, default=200.0, help="nothing is begun after")
    parser.add_argument("--tiny", action="store_true", help="few options and one kind of text")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    probes = {"probes": Probes(arguments.probes)}
    run = Run(arguments.out, loaded, probes, started + arguments.seconds, started)
    each = dict.fromkeys(KINDS[-1:] if arguments.tiny else KINDS, arguments.samples)
    workload = Workload(
        {"search": each, "evaluate": each}, observed=arguments.observed, seed=arguments.seed
    )
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
    for tokens, (tables, held_out) in made.items():  # the shortest first: floors matter there
        if time.monotonic() > run.deadline:
            run.found.setdefault("not run at", []).append(tokens)
            continue
        found[str(tokens)] = run_at(run, tables, held_out, plans)
        run.record("losses at", found)
    shortest = min(made)
    homes = {n: [plan for plan in plans if plan.tokens == n] for n in made if n != shortest}
    why = [c for n, mine in homes.items() for c in causes(made[n][0], made[shortest][0], mine)]
    run.record(f"causes at {shortest}", why)
    run.record("judged", {"live over live where found": carried(found)})
    print(json.dumps(run.found["judged"], indent=1))


if __name__ == "__main__":
    main()
