"""Quality at equal bytes, live on a GPU: the tuned plan against uniform, pyramid and AdaKV.

    python benchmarks/quality.py --model smollm2-135m --out benchmarks/results

Captures SmolLM2-135M, builds tables, searches at 3 / 6 / 12 / 25 % of the bf16 cache bytes, picks
among search settings on selection samples, and runs everything live on evaluation samples that
neither step has seen. Also: rank correlation of prediction and live over ~100 mixed policies,
times, and the compact tables that the package ships. Arithmetic is float32 throughout, so that
differences between policies are theirs and not the dtype's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from policies_mixed import mixed_policies
from proxies import predictions
from scipy.stats import spearmanr

from kvtune import __version__
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import LiveRun, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.build import build_tables
from kvtune.simulator.calibration import calibrate
from kvtune.simulator.tables import Tables, compact
from kvtune.simulator.tables_file import save_tables
from kvtune.traces.capture import capture
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.trace import Trace
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.allocate import Problem, score, solve
from kvtune.tuner.baselines import FAMILIES, candidates
from kvtune.tuner.options import FULL, SMALL
from kvtune.tuner.quality import bootstrap, mean_over_kinds

SHARES = (0.03, 0.06, 0.12, 0.25)
CURVE = (0.015, *SHARES, 0.5)  # where the baselines are measured
KINDS = ("prose", "code", "retrieval")


@dataclass
class Bench:
    """One run: what it measured so far, written after every step."""

    out: Path
    loaded: LoadedModel
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
        }
        if self.digits:
            found["digits"] = float(np.mean(self.digits))
            found["full_digits"] = float(np.mean(self.full_digits))
            found["whole_needles"] = float(np.mean(self.needles))
            found["needles_asked"] = 8 * len(self.needles)
        return found


def run_all(
    bench: Bench, policies: Sequence[Policy], samples: Iterable[Sample], rows: int = 18
) -> list[Outcome]:
    """Every policy live on every sample, ``rows`` policies a batch."""
    outcomes = [Outcome() for _ in policies]
    for sample in samples:
        prompt = fresh_prompt(bench.loaded, sample, Needs(window=32, column_sums=True))
        for first in range(0, len(policies), rows):
            runs = run_live(bench.loaded, sample, prompt, policies[first : first + rows])
            for outcome, run in zip(outcomes[first:], runs, strict=False):
                outcome.add(sample, run, bench.full_bytes)
    return outcomes


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


def variants(tables: Tables) -> list[Variant]:
    options = tables.options

    def columns(keep: Any) -> np.ndarray:
        return np.flatnonzero([keep(option) for option in options])

    def inexact(option: Any) -> bool:
        return not getattr(option.keys, "exact_first", 0)

    def plain(option: Any) -> bool:
        known = option.method in (SnapKV(), H2O(), StreamingLLM()) or option.budget.share is None
        return known and option.keys.label in ("bf16", "int4", "int2") and _alike(option)

    everything = np.arange(len(options))
    no_three = columns(lambda option: option.keys.label != "int3")
    found = [Variant(f"rich {s}", everything, s) for s in (0.0, 0.15, 0.3, 0.5)]
    found += [Variant("no sinks 0.3", columns(inexact), 0.3)]
    found += [Variant("no int3 0.3", no_three, 0.3)]
    found += [Variant("plain 0.3", columns(plain), 0.3), Variant("plain 0", columns(plain), 0.0)]
    found += [Variant("layers 0.3", everything, 0.3, tied=True)]
    return found


def _alike(option: Any) -> bool:
    return option.keys == option.values


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


def compare(bench: Bench, tables: Tables) -> dict[float, Policy]:
    """Plans and baselines live; returns the plan picked at each share."""
    found = search(bench, tables)
    plans = [policy for _, _, policy, _ in found]
    selected = run_all(bench, plans, bench.of("select"))
    live = [mean_over_kinds(o.kl, o.kinds) for o in selected]
    pairs = [(predicted, kl) for (*_, predicted), kl in zip(found, live, strict=True)]
    bench.record("plans_on_selection", {p.name: pair for p, pair in zip(plans, pairs, strict=True)})
    layers, heads, head_dim = bench.shape
    rivals = [
        (share, family, policy)
        for share in CURVE
        for family in FAMILIES
        for policy in candidates(
            family, int(share * bench.full_bytes), bench.prompt, layers, heads, head_dim
        )
    ]
    everyone = plans + [policy for *_, policy in rivals]
    outcomes = run_all(bench, everyone, bench.of("evaluate"))

    def best_of(family: str, share: float) -> tuple[str, Outcome]:
        """The family's best by the very figures it is shown with: generous to it."""
        named = [
            (policy.name, outcomes[len(plans) + row])
            for row, (at, kind, policy) in enumerate(rivals)
            if at == share and kind == family
        ]
        return min(named, key=lambda pair: mean_over_kinds(pair[1].kl, pair[1].kinds))

    curves = {
        family: [
            {"at": s, "name": best_of(family, s)[0], **best_of(family, s)[1].summary()}
            for s in CURVE
        ]
        for family in FAMILIES
    }
    bench.record("baseline_curves", curves)
    table: dict[str, Any] = {}
    chosen: dict[float, Policy] = {}
    for share in SHARES:
        ours = [
            row for row, (at, variant, *_) in enumerate(found) if at == share and not variant.tied
        ]
        best = min(ours, key=lambda row: live[row])
        chosen[share] = plans[best]
        mine = outcomes[best]
        entry: dict[str, Any] = {"plan": {"variant": plans[best].name, **mine.summary()}}
        entry["variants"] = {
            plans[row].name: outcomes[row].summary()
            for row, (at, *_) in enumerate(found)
            if at == share
        }
        for family in FAMILIES:
            name, rival = best_of(family, share)
            ratio = bootstrap(rival.kl, rival.kinds) / bootstrap(mine.kl, mine.kinds)
            entry[family] = {
                "name": name,
                **rival.summary(),
                "times_the_plan": rival.summary()["kl"] / mine.summary()["kl"],
                "times_interval": [float(x) for x in np.percentile(ratio, [2.5, 97.5])],
            }
        table[f"{share:.0%}"] = entry
    bench.record("at_equal_bytes", table)
    best_rivals = [
        next(p for at, _, p in rivals if at == share and p.name == table[f"{share:.0%}"][f]["name"])
        for share in SHARES
        for f in ("uniform", "adakv")
    ]
    retrieval(bench, list(chosen.values()), best_rivals)
    return chosen


def retrieval(bench: Bench, plans: list[Policy], rivals: list[Policy]) -> None:
    """8-needle accuracy, paired with the full cache, on held-out needles."""
    outcomes = run_all(bench, plans + rivals, bench.needles)
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


def ranking(bench: Bench, trace: Trace) -> dict[str, Any]:
    """How well predictions rank mixed policies, calibrated on selection samples."""
    mixed = mixed_policies(bench.shape[0], bench.shape[1])
    policies = [policy for _, policy in mixed]
    kinds = np.array([kind for kind, _ in mixed])
    fit_on, test_on = bench.first(2, "select"), bench.first(3, "evaluate")
    lives, guesses = {}, {}
    for name, group in (("select", fit_on), ("evaluate", test_on)):
        lives[name] = np.array([np.mean(o.kl) for o in run_all(bench, policies, group)])
        records = [trace.sample(sample.id) for sample in group]
        found = predictions(trace, records, policies, bench.loaded.device)
        guesses[name] = {proxy: values.mean(1) for proxy, values in found.items()}
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
    return line.as_dict()


def _spearman(predicted: np.ndarray, live: np.ndarray) -> float:
    return float(spearmanr(predicted, live).statistic)


def ship(bench: Bench, tables: Tables, line: dict[str, Any], rank: int) -> None:
    """The compact tables that stand in where no GPU and no weights are at hand."""
    keep = [
        column
        for column, option in enumerate(tables.options)
        if option.keys.label not in ("int3", "int4+4")
    ]
    label = [(sample.split, sample.kind) for sample in tables.samples]
    names = sorted(set(label))
    small = compact(tables.with_options(keep), [names.index(pair) for pair in label], rank)
    provenance = {
        "made_by": "benchmarks/quality.py",
        "kvtune": __version__,
        "torch": torch.__version__,
        "device": bench.figures["device"],
        "model_fingerprint": bench.loaded.fingerprint,
        "probes": bench.figures["setting"]["probes"],
        "workload": bench.figures["setting"]["workload"],
        "seed": 0,
        "calibration": line,
        "baselines": bench.figures.get("baseline_curves", {}),
    }
    path = bench.out / "smollm2-135m.safetensors"
    save_tables(small, path, provenance)
    bench.record("shipped_bytes", path.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/benchmark-trace"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--observed", type=int, default=256)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--per-kind", type=int, nargs=3, default=(8, 4, 8))
    parser.add_argument("--needle-samples", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    bench, workload = prepare(arguments, loaded)
    cuda = arguments.device != "cpu"
    bench.record("device", torch.cuda.get_device_name() if cuda else "cpu")
    setting = {"workload": workload.describe(), "probes": arguments.probes}
    bench.record("setting", setting)
    started = time.monotonic()
    trace = capture(
        loaded,
        bench.samples,
        arguments.scratch,
        probes=arguments.probes,
        workload_description=workload.describe(),
        signals=("column_sums",),
        queries=arguments.observed + 64,
    )
    bench.record("capture_seconds", time.monotonic() - started)
    time_small_tables(bench, trace)
    started = time.monotonic()
    tables = build_tables(trace, FULL.options(), device=loaded.device)
    bench.record("rich_tables_seconds", [len(FULL.options()), time.monotonic() - started])
    bench.record("score_microseconds", score_microseconds(tables.of_split("search")))
    compare(bench, tables)
    line = ranking(bench, trace)
    ship(bench, tables, line, arguments.rank)


def prepare(arguments: argparse.Namespace, loaded: LoadedModel) -> tuple[Bench, Workload]:
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
    return Bench(arguments.out, loaded, traced, needles[: arguments.needle_samples]), workload


def time_small_tables(bench: Bench, trace: Trace) -> None:
    """Tables for 57 options a head and 14 samples."""
    started = time.monotonic()
    some = build_tables(
        trace, SMALL.options(), samples=trace.samples[:14], device=bench.loaded.device
    )
    seconds = time.monotonic() - started
    bench.record("tables_57_options_14_samples_seconds", [len(some.samples), seconds])


if __name__ == "__main__":
    main()
