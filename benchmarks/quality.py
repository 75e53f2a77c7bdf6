"""Quality at equal bytes, live on a GPU: the tuned plan against everything published.

    python benchmarks/quality.py --model smollm2-135m --out benchmarks/results

Captures SmolLM2-135M, builds tables, searches at 3 / 6 / 12 / 25 % of the bf16 cache bytes, picks
among search settings on selection samples (least loss, then most needle digits right), and runs
what was picked live on evaluation samples that neither step has seen. Baselines are narrowed down
on the selection samples too, and of a family's best few the one that does best on the evaluation
samples is shown. Also: rank correlation of prediction and live over ~100 mixed policies, times,
and the compact tables that the package ships, which are written as soon as they are there and again
with the baselines' live losses. Arithmetic is float32 throughout, so that differences are the
policies' and not the dtype's. No step is begun after ``--seconds``; one that fails is recorded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from recorded_parts import attempt
from strongest import stored_at

from kvtune import __version__
from kvtune.policies.policy import Policy
from kvtune.simulator.quality.tables import Tables, compact, join
from kvtune.simulator.quality.tables_file import save_tables
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.samples import Sample
from kvtune.tuner.allocate import Problem
from kvtune.tuner.baselines import FAMILIES, STRONG, candidates
from kvtune.tuner.options import FULL, SMALL, Menu

SHARES = (0.03, 0.06, 0.12, 0.25)


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Args:
        menu: what a head may be given.
        families: of baselines.
        shares: of the bf16 bytes, of the plans.
        curve: shares at which the baselines are measured.
        per_kind: search, selection and evaluation samples of each kind of text.
        select_needles: selection samples of needles besides.
        needles: evaluation samples of needles.
        tokens: N.
        observed: C.
        probes: S.
        promising: baselines of a family that run on all selection samples.
        finalists: of a family, taken on from the selection samples to the evaluation samples.
    """

    menu: Menu = FULL
    families: tuple[str, ...] = (*FAMILIES, *STRONG)
    shares: tuple[float, ...] = SHARES
    curve: tuple[float, ...] = (0.015, *SHARES, 0.5)
    per_kind: tuple[int, int, int] = (8, 4, 8)
    select_needles: int = 16
    needles: int = 64
    tokens: int = 2048
    observed: int = 256
    probes: int = 16
    promising: int = 8
    finalists: int = 4

    def count(self, family: str, of: int) -> int:
        """Fewer of the newer families, which have one or two methods each."""
        return of if family in FAMILIES else max(of // 4, 1)


TINY = Size(
    menu=replace(SMALL, methods=SMALL.methods[:1], shares=(1 / 16, 1 / 4)),
    families=("uniform", "kvzip"),
    shares=(0.12,),
    curve=(0.12,),
    per_kind=(1, 1, 1),
    select_needles=1,
    needles=1,
    tokens=256,
    observed=64,
    probes=2,
    promising=2,
    finalists=1,
)


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
        problem.values(choices)
        times.append((time.monotonic() - started) / len(choices))
    return float(np.median(times) * 1e6)


@dataclass
class Run:
    """One run: what it found so far, which its later steps need."""

    bench: Bench
    size: Size
    rank: int
    tables: Tables | None = None
    plans: list[Plan] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=list)
    best: dict[tuple[str, float], tuple[Policy, Outcome]] = field(default_factory=dict)

    def steps(self) -> dict[str, Callable[[], Any]]:
        """Every step under the name of its figures, what the package needs most first."""
        return {
            "capture_seconds": self.capture,
            "tables_full_menu": self.make_tables,
            "plans": self.choose_plans,
            "rivals_on_selection": self.choose_baselines,
            "at_equal_bytes": self.compare,
            "retrieval": self.retrieval,
            "ranking": lambda: ranking(self.bench),
            "times": self.times,
        }

    def capture(self) -> list[float]:
        """A trace of every sample, in a folder of its own."""
        started, bench = time.monotonic(), self.bench
        bench.crew.everywhere(
            workers.capture_one, bench.samples, self.size.menu.needs, self.size.probes
        )
        return [len(bench.samples), time.monotonic() - started]

    def make_tables(self) -> dict[str, float]:
        """Tables of all samples, and the file that the package ships, as yet without baselines."""
        self.tables, figures = self._tables(self.bench.samples, self.size.menu)
        self.ship()
        return figures

    def _tables(self, samples: Sequence[Sample], menu: Menu) -> tuple[Tables, dict[str, float]]:
        started, options = time.monotonic(), menu.options()
        parts = self.bench.crew.everywhere(workers.tables_of, samples, options)
        seconds = time.monotonic() - started
        return join(parts), {
            "options": len(options), "samples": len(samples), "seconds": seconds
        }  # fmt: skip

    def ship(self) -> None:
        """Write the compact tables that stand in where no GPU and no weights are at hand."""
        bench, tables = self.bench, self._made
        label = [(sample.split, sample.kind) for sample in tables.samples]
        names = sorted(set(label))
        small = compact(tables, [names.index(pair) for pair in label], self.rank)
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

    @property
    def _made(self) -> Tables:
        assert self.tables is not None, "the tables were not made"
        return self.tables

    def choose_plans(self) -> list[str]:
        """The plan at every share, and with one option a layer, by selection samples alone."""
        bench, shares, tables = self.bench, self.size.shares, self._made
        found, reduced = search(tables, shares, [*variants(tables), one_option_a_layer(tables)])
        seconds = [plan.seconds for plan in found]
        bench.record(
            "search_seconds",
            {"reduce_once": reduced, "median": float(np.median(seconds)), "max": max(seconds)},
        )
        groups = {
            (tied, share): [p for p in found if (p.variant.tied, p.share) == (tied, share)]
            for tied, share in product((False, True), shares)
        }
        choice = choose(groups, bench.run, bench.of("select"), bench.division.select_needles)
        bench.record("plans_on_selection", choice.losses)
        bench.record("needles_on_selection", choice.points)
        self.plans = list(choice.plans.values())
        return [plan.policy.name for plan in self.plans]

    def choose_baselines(self) -> list[list[Any]]:
        """The best few of every family at every share, by live loss on selection samples.

        All run on one sample of every kind; those that may win there, on the rest too.
        """
        bench, size = self.bench, self.size
        layers, heads, head_dim = bench.shape
        everyone = [
            Baseline(share, family, policy)
            for share in size.curve
            for family in size.families
            for policy in candidates(
                family, int(share * bench.full_bytes), bench.prompt, layers, heads, head_dim,
                stored_at(share, family) if family in STRONG else None,
            )
        ]  # fmt: skip
        first = bench.first(1, "select")
        rest = [sample for sample in bench.of("select") if sample not in first]
        kl = losses(bench, everyone, first)
        promising = self.best_of_each(everyone, kl, size.promising)
        if rest:
            kl = losses(bench, promising, rest)
        else:
            kl = [kl[everyone.index(each)] for each in promising]
        self.baselines = self.best_of_each(promising, kl, size.finalists)
        return [
            [r.share, r.family, r.policy.name, k] for r, k in zip(promising, kl, strict=True)
        ]  # fmt: skip

    def best_of_each(
        self, baselines: Sequence[Baseline], kl: Sequence[float], count: int
    ) -> list[Baseline]:
        """Those of least loss, of every family at every share."""
        ranked = sorted(zip(kl, range(len(baselines)), strict=True))
        kept: dict[tuple[float, str], list[Baseline]] = {}
        for _, row in ranked:
            kept.setdefault((baselines[row].share, baselines[row].family), []).append(
                baselines[row]
            )
        return [
            baseline
            for (_, family), mine in kept.items()
            for baseline in mine[: self.size.count(family, count)]
        ]

    def compare(self) -> dict[str, Any]:
        """Plans and baselines on samples that no choice was made on."""
        bench, plans, baselines = self.bench, self.plans, self.baselines
        policies = [*(each.policy for each in plans), *(each.policy for each in baselines)]
        outcomes = bench.run(policies, bench.of("evaluate"))
        ours, theirs = outcomes[: len(plans)], outcomes[len(plans) :]
        for baseline, outcome in zip(baselines, theirs, strict=True):
            place = baseline.family, baseline.share
            # A family is shown by the very figures that choose its best: generous to it.
            if place not in self.best or outcome.mean_kl < self.best[place][1].mean_kl:
                self.best[place] = baseline.policy, outcome
        bench.record("baseline_curves", self.curves())
        self.ship()
        table: dict[str, Any] = {}
        for plan, mine in zip(plans, ours, strict=True):
            entry = table.setdefault(f"{plan.share:.0%}", {})
            row = {"variant": plan.policy.name, **mine.summary(), "options": used(plan.policy)}
            entry["one option a layer" if plan.variant.tied else "plan"] = row
            if not plan.variant.tied:
                entry |= {f: against(*self.best[f, plan.share], mine) for f in self.at(plan.share)}
        return table

    def at(self, share: float) -> list[str]:
        """Families that have a baseline at a share."""
        return [family for family in self.size.families if (family, share) in self.best]

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """What every family's best loses at every share."""
        return {
            family: [
                {"at": s, "name": self.best[family, s][0].name, **self.best[family, s][1].summary()}
                for s in self.size.curve
                if (family, s) in self.best
            ]
            for family in self.size.families
        }

    def retrieval(self) -> list[dict[str, Any]]:
        """8-needle accuracy, paired with the full cache, of plans and each share's best two."""
        policies = [plan.policy for plan in self.plans if not plan.variant.tied]
        for share in self.size.shares:
            ranked = sorted(self.at(share), key=lambda f, s=share: self.best[f, s][1].mean_kl)
            policies += [self.best[family, share][0] for family in ranked[:2]]
        outcomes = self.bench.run(policies, self.bench.division.needles)
        return [
            {"policy": policy.name, **outcome.summary(), **points_below_full(outcome)}
            for policy, outcome in zip(policies, outcomes, strict=True)
        ]

    def times(self) -> dict[str, Any]:
        """Of 57 options on 14 samples, and of one score."""
        _, figures = self._tables(self.bench.samples[:14], SMALL)
        microseconds = score_microseconds(self._made.of_split("search"))
        return {"tables_57_options_14_samples": figures, "score_microseconds": microseconds}


def against(policy: Policy, baseline: Outcome, mine: Outcome) -> dict[str, Any]:
    """A baseline's figures, and how many times the plan's loss its own is."""
    times, interval = times_as_much(baseline, mine)
    figures = {"times_the_plan": times, "times_interval": interval}
    return {"name": policy.name, **baseline.summary(), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/benchmark-traces"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--rank", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=600.0, help="no step is begun after")
    parser.add_argument("--tiny", action="store_true", help="each step once, small")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    place = workers.Place(arguments.model, arguments.device, arguments.scratch)
    with workers.Crew(place, arguments.workers) as crew:
        loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
        crew.model_is_stored()
        size = TINY if arguments.tiny else Size()
        run = Run(prepare(arguments, loaded, crew, size), size, arguments.rank)
        for name, step in run.steps().items():
            if time.monotonic() < until:
                attempt(run.bench.record, name, step)
            else:
                left = run.bench.figures.get("left out", [])
                run.bench.record("left out", [*left, name])


def prepare(
    arguments: argparse.Namespace, loaded: LoadedModel, crew: workers.Crew, size: Size
) -> Bench:
    division = divided(
        loaded.tokenizer,
        size.per_kind,
        select_needles=size.select_needles,
        needles=size.needles,
        tokens=size.tokens,
        observed=size.observed,
    )
    bench = Bench(arguments.out, loaded, crew, division)
    bench.record("device", torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu")
    setting = {
        "workload": division.workload,
        "no needle in the last": UNASKED_END,
        "probes": size.probes,
        "dtype": "float32",
    }
    bench.record("setting", setting | {"workers": arguments.workers})
    return bench


if __name__ == "__main__":
    main()
