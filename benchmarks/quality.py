"""Quality at equal bytes, live on a GPU: the tuned plan against uniform, pyramid and AdaKV.

    python benchmarks/quality.py --model smollm2-135m --out benchmarks/results

Captures SmolLM2-135M, builds tables, searches at 3 / 6 / 12 / 25 % of the bf16 cache bytes, picks
among search settings on selection samples, and runs everything live on evaluation samples that
neither step has seen. Baselines are narrowed down on the selection samples too, and of the best
five of a family the one that does best on the evaluation samples is shown. Also: rank correlation
of prediction and live over ~100 mixed policies, times, and the compact tables that the package
ships. Arithmetic is float32 throughout, so that differences are the policies' and not the dtype's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workers
from policies_mixed import mixed_policies
from scipy.stats import spearmanr

from kvtune import __version__
from kvtune.policies.method import Method
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.runtime.live import LiveRun
from kvtune.simulator.calibration import calibrate
from kvtune.simulator.tables import Tables, compact, join
from kvtune.simulator.tables_file import save_tables
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.allocate import Problem, score, solve
from kvtune.tuner.baselines import FAMILIES, candidates
from kvtune.tuner.options import FULL, SMALL
from kvtune.tuner.quality import bootstrap, mean_over_kinds

SHARES = (0.03, 0.06, 0.12, 0.25)
CURVE = (0.015, *SHARES, 0.5)  # where the baselines are measured
KINDS = ("prose", "code", "retrieval")
FINALISTS = 5  # of a family, taken on from the selection samples to the evaluation samples


@dataclass
class Bench:
    """One run: what it measured so far, written after every step."""

    out: Path
    loaded: LoadedModel
    pool: ProcessPoolExecutor
    samples: list[Sample]
    needles: list[Sample]
    started: float = field(default_factory=time.monotonic)
    figures: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self.figures["seconds"] = round(time.monotonic() - self.started, 1)
        (self.out / "quality.json").write_text(json.dumps(self.figures, indent=1) + "\n")
        print(f"[{self.figures['seconds']:7.1f} s] {name}", flush=True)

    def of(self, *splits: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.split in splits]

    def first(self, each: int, split: str) -> list[Sample]:
        """The first samples of every kind."""
        rows: list[Sample] = []
        for kind in KINDS:
            rows += [s for s in self.of(split) if s.kind == kind][:each]
        return rows

    def run(self, policies: Sequence[Policy], samples: Sequence[Sample]) -> list[Outcome]:
        """Every policy live on every sample."""
        outcomes = [Outcome() for _ in policies]
        answers = workers.everywhere(self.pool, workers.live, samples, list(policies))
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


@dataclass
class Outcome:
    """Live figures of one policy, sample by sample."""

    kl: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    digits: list[float] = field(default_factory=list)
    needles: list[float] = field(default_factory=list)
    full_digits: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def add(self, sample: Sample, run: LiveRun, full_bytes: int) -> None:
        self.kl.append(float(run.kl.mean()))
        self.kinds.append(sample.kind)
        self.share.append(run.footprint_bytes / full_bytes)
        asked = np.array(sample.answer_mask)
        if asked.any():
            self.digits.append(float(run.correct[asked].mean()))
            self.full_digits.append(float(run.full_correct[asked].mean()))
            needle = np.array(sample.needle_of_row)
            whole = [run.correct[needle == n].all() for n in range(sample.needles)]
            self.needles.append(float(np.mean(whole)))

    def summary(self) -> dict[str, Any]:
        low, high = np.percentile(bootstrap(self.kl, self.kinds), [2.5, 97.5])
        found = {
            "kl": mean_over_kinds(self.kl, self.kinds),
            "kl_interval": [float(low), float(high)],
            "share": float(np.mean(self.share)),
            "kl_by_kind": {
                kind: float(
                    np.mean([x for x, k in zip(self.kl, self.kinds, strict=True) if k == kind])
                )
                for kind in sorted(set(self.kinds))
            },
        }
        if self.digits:
            found["digits"] = float(np.mean(self.digits))
            found["full_digits"] = float(np.mean(self.full_digits))
            found["whole_needles"] = float(np.mean(self.needles))
            found["needles_asked"] = 8 * len(self.needles)
        return found


def plan(bench: Bench, tables: Tables, choice: np.ndarray, name: str) -> Policy:
    rows = choice.reshape(bench.shape[0], bench.shape[1])
    return Policy(name, tuple(tuple(tables.options[o] for o in row) for row in rows))


@dataclass(frozen=True)
class Variant:
    """One way to search: which options, how much of the cross terms, heads or layers."""

    name: str
    columns: np.ndarray
    shrinkage: float
    tied: bool = False


METHOD_SETS = {
    "all methods": None,
    "three methods": (SnapKV(), H2O(), StreamingLLM()),
    "short windows": (SnapKV(window=16, recent=8), H2O(recent_share=0.1), StreamingLLM()),
    "no short windows": (SnapKV(), H2O(), H2O(recent_share=0.1), StreamingLLM()),
    "H2O and sinks": (H2O(), H2O(recent_share=0.1), StreamingLLM()),
}


def variants(tables: Tables) -> list[Variant]:
    """Search settings to choose from on the selection samples, and an ablation."""
    found = []
    for name, methods in METHOD_SETS.items():
        for exact in (True, False):
            columns = np.flatnonzero([_admitted(o, methods, exact) for o in tables.options])
            for shrinkage in (0.0, 0.2, 0.4):
                label = f"{name}{'' if exact else ', no exact sinks'}, cross terms {shrinkage}"
                found.append(Variant(label, columns, shrinkage))
    everything = np.arange(len(tables.options))
    return [*found, Variant("one option a layer", everything, 0.2, tied=True)]


def _admitted(option: Option, methods: tuple[Method, ...] | None, exact: bool) -> bool:
    known = methods is None or option.budget.share is None or option.method in methods
    return known and (exact or not getattr(option.keys, "exact_first", 0))


def search(bench: Bench, tables: Tables) -> list[tuple[float, Variant, Policy, float]]:
    """Every variant at every share: (share, variant, policy, loss predicted on selection)."""
    fit, check = tables.of_split("search"), tables.of_split("select")
    footprint = tables.footprints(bench.prompt, bench.shape[2])
    started = time.monotonic()
    problem = Problem.of(fit, footprint)
    reduced = time.monotonic() - started
    found, times = [], []
    for share in SHARES:
        budget = int(share * bench.full_bytes) - 4 * tables.heads
        for variant in variants(tables):
            started = time.monotonic()
            part = problem.allowing(variant.columns).shrunk(variant.shrinkage)
            picked = solve(part.tied(tables.kv_heads) if variant.tied else part, budget)
            times.append(time.monotonic() - started)
            picked = np.repeat(picked, tables.kv_heads) if variant.tied else picked
            choice = variant.columns[picked]
            predicted = float(check.sample_weights() @ check.by_sample(choice))
            name = f"{variant.name} at {share:.0%}"
            found.append((share, variant, plan(bench, tables, choice, name), predicted))
    bench.record(
        "search_seconds",
        {"reduce_once": reduced, "median": float(np.median(times)), "max": max(times)},
    )
    return found


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


def choose_plans(bench: Bench, tables: Tables) -> tuple[list[Any], list[float]]:
    """Every variant at every share, and its live loss on the selection samples."""
    found = search(bench, tables)
    outcomes = bench.run([policy for _, _, policy, _ in found], bench.of("select"))
    live = [mean_over_kinds(o.kl, o.kinds) for o in outcomes]
    pairs = {p.name: [guess, kl] for (_, _, p, guess), kl in zip(found, live, strict=True)}
    bench.record("plans_on_selection", pairs)
    return found, live


def choose_rivals(bench: Bench) -> list[tuple[float, str, Policy]]:
    """The best few of every family at every share, by their live loss on selection samples."""
    layers, heads, head_dim = bench.shape
    everyone = [
        (share, family, policy)
        for share in CURVE
        for family in FAMILIES
        for policy in candidates(
            family, int(share * bench.full_bytes), bench.prompt, layers, heads, head_dim
        )
    ]
    outcomes = bench.run([policy for *_, policy in everyone], bench.of("select"))
    kl = [mean_over_kinds(o.kl, o.kinds) for o in outcomes]
    bench.record(
        "rivals_on_selection",
        [[s, f, p.name, k] for (s, f, p), k in zip(everyone, kl, strict=True)],
    )
    kept = []
    for share in CURVE:
        for family in FAMILIES:
            mine = [i for i, (s, f, _) in enumerate(everyone) if (s, f) == (share, family)]
            kept += [everyone[i] for i in sorted(mine, key=lambda i: kl[i])[:FINALISTS]]
    return kept


def compare(bench: Bench, found: list[Any], live: list[float]) -> None:
    """Plans and baselines on samples that no choice was made on."""
    plans = [policy for _, _, policy, _ in found]
    rivals = choose_rivals(bench)
    outcomes = bench.run(plans + [policy for *_, policy in rivals], bench.of("evaluate"))

    def best_of(family: str, share: float) -> tuple[Policy, Outcome]:
        """The family's best by the very figures it is shown with: generous to it."""
        named = [
            (policy, outcomes[len(plans) + row])
            for row, (at, kind, policy) in enumerate(rivals)
            if at == share and kind == family
        ]
        return min(named, key=lambda pair: mean_over_kinds(pair[1].kl, pair[1].kinds))

    curves = {
        family: [
            {"at": s, "name": best_of(family, s)[0].name, **best_of(family, s)[1].summary()}
            for s in CURVE
        ]
        for family in FAMILIES
    }
    bench.record("baseline_curves", curves)
    table: dict[str, Any] = {}
    chosen, beaten = [], []
    for share in SHARES:
        ours = [row for row, (at, v, *_) in enumerate(found) if at == share and not v.tied]
        best = min(ours, key=lambda row: live[row])
        chosen.append(plans[best])
        mine = outcomes[best]
        entry: dict[str, Any] = {"plan": {"variant": plans[best].name, **mine.summary()}}
        entry["plan"]["options"] = used(plans[best])
        entry["variants"] = {
            plans[row].name: outcomes[row].summary()
            for row, (at, *_) in enumerate(found)
            if at == share
        }
        for family in FAMILIES:
            policy, rival = best_of(family, share)
            beaten.append(policy)
            ratio = bootstrap(rival.kl, rival.kinds) / bootstrap(mine.kl, mine.kinds)
            entry[family] = {
                "name": policy.name,
                **rival.summary(),
                "times_the_plan": rival.summary()["kl"] / mine.summary()["kl"],
                "times_interval": [float(x) for x in np.percentile(ratio, [2.5, 97.5])],
            }
        table[f"{share:.0%}"] = entry
    bench.record("at_equal_bytes", table)
    retrieval(bench, chosen, beaten)


def used(policy: Policy) -> dict[str, int]:
    """How many heads a plan gives each option."""
    labels = [option.label for option in policy.options()]
    return {label: labels.count(label) for label in sorted(set(labels))}


def retrieval(bench: Bench, plans: list[Policy], rivals: list[Policy]) -> None:
    """8-needle accuracy, paired with the full cache, on held-out needles."""
    outcomes = bench.run(plans + rivals, bench.needles)
    rows = []
    for policy, outcome in zip(plans + rivals, outcomes, strict=True):
        points = 100 * (np.array(outcome.full_digits) - np.array(outcome.digits))
        interval = np.percentile(bootstrap(points, outcome.kinds), [2.5, 97.5])
        rows.append(
            {
                "policy": policy.name,
                **outcome.summary(),
                "points_below_full": float(points.mean()),
                "points_interval": [float(x) for x in interval],
            }
        )
    bench.record("retrieval", rows)


def ranking(bench: Bench) -> dict[str, Any]:
    """How well predictions rank mixed policies, calibrated on selection samples."""
    mixed = mixed_policies(bench.shape[0], bench.shape[1])
    policies = [policy for _, policy in mixed]
    kinds = np.array([kind for kind, _ in mixed])
    lives, guesses = {}, {}
    test_on = bench.first(3, "evaluate")
    for name, group in (("select", bench.first(2, "select")), ("evaluate", test_on)):
        lives[name] = np.array([np.mean(o.kl) for o in bench.run(policies, group)])
        found = workers.everywhere(bench.pool, workers.predicted, group, policies)
        guesses[name] = {
            proxy: np.concatenate([part[proxy] for part in found], 1).mean(1) for proxy in found[0]
        }
    line = calibrate(guesses["select"]["probes"], lives["select"])
    predicted, live = guesses["evaluate"]["probes"], lives["evaluate"]
    ratio = live / np.array([line.value(p) for p in predicted])
    evicting = kinds != "quantised"
    result: dict[str, Any] = {
        "policies": len(policies),
        "texts": len(test_on),
        "calibration": line.as_dict(),
        "live_over_predicted_raw_median": float(np.median(live / predicted)),
        "live_over_predicted_median": float(np.median(ratio)),
        "live_over_predicted_p10_p90": [float(x) for x in np.percentile(ratio, [10, 90])],
        "spearman": {
            proxy: {
                "all": _spearman(values, live),
                "eviction": _spearman(values[evicting], live[evicting]),
                "quantisation": _spearman(values[~evicting], live[~evicting]),
            }
            for proxy, values in guesses["evaluate"].items()
        },
        "pairs": [
            [kind, policy.name, float(p), float(t)]
            for kind, policy, p, t in zip(kinds, policies, predicted, live, strict=True)
        ],
    }
    bench.record("ranking", result)
    return result


def _spearman(predicted: np.ndarray, live: np.ndarray) -> float:
    return float(spearmanr(predicted, live).statistic)


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
        "calibration": bench.figures.get("ranking", {}).get("calibration", {}),
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
    with workers.workers(place, arguments.workers) as (pool, converted):
        loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
        converted.set()
        measure(arguments, prepare(arguments, loaded, pool))


def measure(arguments: argparse.Namespace, bench: Bench) -> None:
    """Everything, what the package needs most first."""
    cuda = arguments.device != "cpu"
    bench.record("device", torch.cuda.get_device_name() if cuda else "cpu")
    started = time.monotonic()
    workers.everywhere(bench.pool, workers.capture_one, bench.samples, arguments.probes)
    bench.record("capture_seconds", [len(bench.samples), time.monotonic() - started])
    tables_of(bench, "tables_57_options_14_samples", bench.samples[:14], SMALL.options())
    tables = tables_of(bench, "tables_full_menu", bench.samples, FULL.options())
    ship(bench, tables, arguments.rank)
    bench.record("score_microseconds", score_microseconds(tables.of_split("search")))
    found, live = choose_plans(bench, tables)
    ranking(bench)
    compare(bench, found, live)
    ship(bench, tables, arguments.rank)


def tables_of(bench: Bench, name: str, samples: list[Sample], options: Any) -> Tables:
    started = time.monotonic()
    parts = workers.everywhere(bench.pool, workers.tables_of, samples, options)
    seconds = time.monotonic() - started
    figures = {"options": len(options), "samples": len(samples), "seconds": seconds}
    bench.record(name, figures)
    return join(parts)


def prepare(arguments: argparse.Namespace, loaded: LoadedModel, pool: Any) -> Bench:
    search_each, select_each, evaluate_each = arguments.per_kind
    counts = {
        "search": dict.fromkeys(KINDS, search_each),
        "select": dict.fromkeys(KINDS, select_each),
        "evaluate": {
            "prose": evaluate_each,
            "code": evaluate_each,
            "retrieval": max(evaluate_each, arguments.needle_samples),
        },
    }
    workload = Workload(counts, tokens=arguments.tokens, observed=arguments.observed)
    made = build(workload, loaded.tokenizer)
    needles = [s for s in made if s.split == "evaluate" and s.kind == "retrieval"]
    beyond = {sample.id for sample in needles[evaluate_each:]}
    traced = [sample for sample in made if sample.id not in beyond]
    asked = needles[: arguments.needle_samples]
    bench = Bench(arguments.out, loaded, pool, traced, asked)
    setting = {"workload": workload.describe(), "probes": arguments.probes, "dtype": "float32"}
    bench.record("setting", setting | {"workers": arguments.workers})
    return bench


if __name__ == "__main__":
    main()
