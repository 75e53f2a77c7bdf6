"""Quality at equal bytes, live on a GPU: the tuned plan against uniform, pyramid and AdaKV.

    python benchmarks/quality.py --model smollm2-135m --out benchmarks/results

Captures SmolLM2-135M, builds tables, searches at 3 / 6 / 12 / 25 % of the bf16 cache bytes, picks
among search settings on selection samples (least loss, then most needle digits right), and runs
what was picked live on evaluation samples that neither step has seen. Baselines are narrowed down
on the selection samples too, and of a family's best few the one that does best on the evaluation
samples is shown. Also: rank correlation of prediction and live over ~100 mixed policies, times,
and the compact tables that the package ships. Arithmetic is float32 throughout, so that
differences are the policies' and not the dtype's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workers
from divisions import divided
from outcomes import Outcome, points_below_full, times_as_much, used
from plans import Plan, choose, one_option_a_layer, search, variants
from quality_bench import Bench
from ranking import ranking

from kvtune import __version__
from kvtune.policies.policy import Policy
from kvtune.simulator.quality.tables import Tables, compact, join
from kvtune.simulator.quality.tables_file import save_tables
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.tuner.allocate import Problem, score
from kvtune.tuner.baselines import FAMILIES, candidates
from kvtune.tuner.options import FULL, SMALL

SHARES = (0.03, 0.06, 0.12, 0.25)
CURVE = (0.015, *SHARES, 0.5)  # where the baselines are measured
PROMISING = 8  # baselines of a family that run on all selection samples
FINALISTS = 4  # of a family, taken on from the selection samples to the evaluation samples


@dataclass(frozen=True)
class Baseline:
    """A baseline of a family, filled to a share of the bf16 bytes."""

    share: float
    family: str
    policy: Policy


def losses(bench: Bench, baselines: Sequence[Baseline], samples: Sequence[Sample]) -> list[float]:
    """Live loss of every baseline, kinds counting alike."""
    return [o.mean_kl for o in bench.run([baseline.policy for baseline in baselines], samples)]


def score_microseconds(tables: Tables) -> float:
    """One configuration's score in a batch of 4096, on two threads of the CPU."""
    problem = Problem.of(tables, tables.footprints(tables.prompt_tokens, tables.head_dim))
    rng = np.random.default_rng(0)
    choices = rng.integers(0, len(tables.options), (4096, tables.heads))
    times = []
    for _ in range(5):
        started = time.monotonic()
        score(problem, choices)
        times.append((time.monotonic() - started) / len(choices))
    return float(np.median(times) * 1e6)


def choose_plans(bench: Bench, tables: Tables) -> list[Plan]:
    """The plan at every share, and the best with one option a layer, by selection samples alone."""
    found, reduced = search(tables, SHARES, [*variants(tables), one_option_a_layer(tables)])
    seconds = [plan.seconds for plan in found]
    bench.record(
        "search_seconds",
        {"reduce_once": reduced, "median": float(np.median(seconds)), "max": max(seconds)},
    )
    groups = {
        (tied, share): [p for p in found if (p.variant.tied, p.share) == (tied, share)]
        for tied, share in product((False, True), SHARES)
    }
    choice = choose(groups, bench.run, bench.of("select"), bench.division.select_needles)
    bench.record("plans_on_selection", choice.losses)
    bench.record("needles_on_selection", choice.points)
    return list(choice.plans.values())


def choose_baselines(bench: Bench) -> list[Baseline]:
    """The best few of every family at every share, by live loss on selection samples.

    All run on one sample of every kind; those that may win there, on the rest too.
    """
    layers, heads, head_dim = bench.shape
    everyone = [
        Baseline(share, family, policy)
        for share in CURVE
        for family in FAMILIES
        for policy in candidates(
            family, int(share * bench.full_bytes), bench.prompt, layers, heads, head_dim
        )
    ]
    first = bench.first(1, "select")
    rest = [sample for sample in bench.of("select") if sample not in first]
    promising = best_of_each(everyone, losses(bench, everyone, first), PROMISING)
    kl = losses(bench, promising, rest)
    rows = [[r.share, r.family, r.policy.name, k] for r, k in zip(promising, kl, strict=True)]
    bench.record("rivals_on_selection", rows)
    return best_of_each(promising, kl, FINALISTS)


def best_of_each(baselines: Sequence[Baseline], kl: Sequence[float], count: int) -> list[Baseline]:
    """The ``count`` of least loss, of every family at every share."""
    ranked = sorted(zip(kl, range(len(baselines)), strict=True))
    kept: dict[tuple[float, str], list[Baseline]] = {}
    for _, row in ranked:
        kept.setdefault((baselines[row].share, baselines[row].family), []).append(baselines[row])
    return [baseline for mine in kept.values() for baseline in mine[:count]]


def compare(bench: Bench, plans: list[Plan]) -> None:
    """Plans and baselines on samples that no choice was made on."""
    baselines = choose_baselines(bench)
    policies = [plan.policy for plan in plans] + [baseline.policy for baseline in baselines]
    outcomes = bench.run(policies, bench.of("evaluate"))
    ours, theirs = outcomes[: len(plans)], outcomes[len(plans) :]

    def best_of(family: str, share: float) -> tuple[Policy, Outcome]:
        """The family's best by the very figures it is shown with: generous to it."""
        pairs = zip(baselines, theirs, strict=True)
        mine = [(r.policy, o) for r, o in pairs if (r.share, r.family) == (share, family)]
        return min(mine, key=lambda pair: pair[1].mean_kl)

    best = {(f, s): best_of(f, s) for f in FAMILIES for s in CURVE}
    curves = {
        family: [
            {"at": s, "name": best[family, s][0].name, **best[family, s][1].summary()}
            for s in CURVE
        ]
        for family in FAMILIES
    }
    bench.record("baseline_curves", curves)
    table: dict[str, Any] = {}
    for plan, mine in zip(plans, ours, strict=True):
        entry = table.setdefault(f"{plan.share:.0%}", {})
        row = {"variant": plan.policy.name, **mine.summary(), "options": used(plan.policy)}
        entry["one option a layer" if plan.variant.tied else "plan"] = row
        if not plan.variant.tied:
            entry |= {f: against(*best[f, plan.share], mine) for f in FAMILIES}
    bench.record("at_equal_bytes", table)
    chosen = [plan.policy for plan in plans if not plan.variant.tied]
    retrieval(bench, chosen + [best[f, s][0] for s in SHARES for f in FAMILIES])


def against(policy: Policy, baseline: Outcome, mine: Outcome) -> dict[str, Any]:
    """A baseline's figures, and how many times the plan's loss its own is."""
    times, interval = times_as_much(baseline, mine)
    figures = {"times_the_plan": times, "times_interval": interval}
    return {"name": policy.name, **baseline.summary(), **figures}


def retrieval(bench: Bench, policies: list[Policy]) -> None:
    """8-needle accuracy, paired with the full cache, on held-out needles."""
    outcomes = bench.run(policies, bench.division.needles)
    rows = [
        {"policy": policy.name, **outcome.summary(), **points_below_full(outcome)}
        for policy, outcome in zip(policies, outcomes, strict=True)
    ]
    bench.record("retrieval", rows)


def ship(bench: Bench, tables: Tables, rank: int) -> None:
    """The compact tables that stand in where no GPU and no weights are at hand."""
    label = [(sample.split, sample.kind) for sample in tables.samples]
    names = sorted(set(label))
    small = compact(tables, [names.index(pair) for pair in label], rank)
    provenance = {
        "made_by": "benchmarks/quality.py",
        "kvtune": __version__,
        "torch": torch.__version__,
        "device": bench.figures["device"],
        "model_fingerprint": bench.loaded.fingerprint,
        **bench.figures["setting"],
        "baselines": bench.figures.get("baseline_curves", {}),
    }
    path = bench.out / "smollm2-135m.safetensors"
    save_tables(small, path, provenance)
    bench.record("shipped_bytes", path.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/benchmark-traces"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--observed", type=int, default=256)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--per-kind", type=int, nargs=3, default=(8, 4, 8))
    parser.add_argument("--needle-samples", type=int, default=64)
    parser.add_argument("--rank", type=int, default=11)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    place = workers.Place(arguments.model, arguments.device, arguments.scratch)
    with workers.Crew(place, arguments.workers) as crew:
        loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
        crew.model_is_stored()
        measure(arguments, prepare(arguments, loaded, crew))


def measure(arguments: argparse.Namespace, bench: Bench) -> None:
    """Everything, what the package needs most first."""
    cuda = arguments.device != "cpu"
    bench.record("device", torch.cuda.get_device_name() if cuda else "cpu")
    started = time.monotonic()
    bench.crew.everywhere(workers.capture_one, bench.samples, FULL.needs, arguments.probes)
    bench.record("capture_seconds", [len(bench.samples), time.monotonic() - started])
    tables_of(bench, "tables_57_options_14_samples", bench.samples[:14], SMALL.options())
    tables = tables_of(bench, "tables_full_menu", bench.samples, FULL.options())
    ship(bench, tables, arguments.rank)
    bench.record("score_microseconds", score_microseconds(tables.of_split("search")))
    plans = choose_plans(bench, tables)
    bench.record("ranking", ranking(bench))
    compare(bench, plans)
    ship(bench, tables, arguments.rank)


def tables_of(bench: Bench, name: str, samples: Sequence[Sample], options: Any) -> Tables:
    started = time.monotonic()
    parts = bench.crew.everywhere(workers.tables_of, samples, options)
    seconds = time.monotonic() - started
    figures = {"options": len(options), "samples": len(samples), "seconds": seconds}
    bench.record(name, figures)
    return join(parts)


def prepare(arguments: argparse.Namespace, loaded: LoadedModel, crew: workers.Crew) -> Bench:
    division = divided(
        loaded.tokenizer,
        arguments.per_kind,
        needles=arguments.needle_samples,
        tokens=arguments.tokens,
        observed=arguments.observed,
    )
    bench = Bench(arguments.out, loaded, crew, division)
    setting = {"workload": division.workload, "probes": arguments.probes, "dtype": "float32"}
    bench.record("setting", setting | {"workers": arguments.workers})
    return bench


if __name__ == "__main__":
    main()
