"""Compaction by fitting, rotation and weighted keys in plans: live KL and needle digits on a GPU.

    python benchmarks/compaction.py --workers 8 --out benchmarks/results/compaction-2-h200.json

SmolLM2-135M on samples as ``quality.py`` makes them, at 1, 3, 6, 12 and 25 % of the bf16 bytes.
Tables are built once for all menus: with all, without Attention Matching, without rotation and
weighted keys either, and Attention Matching in 16 bits alone, which stands for it with budgets of
its own. Every menu is searched with the same settings and picks among them on selection samples
that the evaluation does not share; ``times_with_all`` is how many times the loss of the plan with
all a menu's is, over samples that are drawn alike for both. Then, up to 6 %, Attention Matching and
its cheap variants alike in all heads, and published methods in the precision that suits each best
(by the very figures that are shown, which is generous to them). A part that fails is recorded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import workers
from divisions import divided
from outcomes import Outcome, times_as_much, used
from plans import Plan, Variant, choose, search
from quality_bench import Bench
from recorded_parts import attempt, say

from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.rotated import RotatedInt2
from kvtune.policies.formats.turboquant import TurboQuant2, TurboQuant3, TurboQuant4
from kvtune.policies.method import Method
from kvtune.policies.methods.a2sf import PREFILL
from kvtune.policies.methods.attention_matching import AttentionMatching
from kvtune.policies.methods.compresskv import CompressKV
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.quality.tables import Tables, join
from kvtune.traces.models import load_model
from kvtune.tuner.options import Menu, Pair
from kvtune.tuner.quality import bootstrap

SHARES = (0.01, 0.03, 0.06, 0.12, 0.25)
PUBLISHED_SHARES = SHARES[:3]
FORMATS: tuple[Pair, ...] = (
    (Bf16(), Bf16()),
    (Int4(exact_first=4), Int4(exact_first=4)),
    (Int4(exact_first=4), RotatedInt2(exact_first=4)),
    (TurboQuant4(exact_first=1), TurboQuant3(exact_first=1)),
)
FITTED: tuple[Method, ...] = (
    AttentionMatching(),
    AttentionMatching("snapkv"),
    AttentionMatching("kvzip"),
)
PUBLISHED: tuple[Method, ...] = (
    SnapKV(), SnapKV(recent=8), H2O(), StreamingLLM(), KVzip(), ExpectedAttention(), CompressKV(),
)  # fmt: skip
MENU: tuple[Method, ...] = (
    H2O(), KVzip(), ExpectedAttention(), PREFILL, AttentionMatching(),
    AttentionMatching(queries="repeat"),
)  # fmt: skip
COUNTS = (4, 8, 16, 32, 64, 128, 256, 448, 896)  # of 1792 tokens
WEIGHTED_FROM = 128  # tokens, from which a table of channels pays
WEIGHTED: tuple[Literal["h2o", "kvzip"], ...] = ("h2o", "kvzip")
ALLOCATED: tuple[Pair, ...] = (
    (Allocated(mean_bits=2.1), TurboQuant2()),
    (Allocated(mean_bits=3.0), TurboQuant3()),
)


def option_at(
    method: Method, pair: Pair, share: float, prompt: int, head_dim: int, lengths: int
) -> Option | None:
    """The largest budget of tokens whose bytes a head do not exceed the share; None if none is."""
    most = share * 4 * head_dim * prompt - lengths
    fits = [
        n
        for n in range(1, prompt)
        if Option(method, ALL, *pair).footprint(n, prompt, head_dim) <= most
    ]
    return Option(method, Budget(tokens=max(fits)), *pair) if fits else None


def uniform(bench: Bench, methods: Sequence[Method], shares: Sequence[float]) -> dict[str, Any]:
    """Every method at every share in every precision, alike in all heads."""
    layers, heads, head_dim = bench.shape
    lengths = footprint_of_lengths(1, 1)
    rows: list[tuple[str, str, Policy]] = []
    for share, method, pair in product(shares, methods, FORMATS):
        option = option_at(method, pair, share, bench.prompt, head_dim, lengths)
        if option is None:
            continue
        policy = Policy.uniform(option, layers, heads)
        rows.append((f"{share:.0%}", method.label, policy))
        if isinstance(method, KVzip):
            wide = Policy.uniform(
                option, layers, heads, name=f"{option.label} model-wide", allocator=ModelWide()
            )
            rows.append((f"{share:.0%}", f"{method.label} model-wide", wide))
    outcomes = bench.run([policy for _, _, policy in rows], evaluation(bench))
    found: dict[str, Any] = {}
    for (share_name, name, policy), outcome in zip(rows, outcomes, strict=True):
        best = found.setdefault(share_name, {}).setdefault(name, {"kl": np.inf})
        tried = [*best.get("tried", []), [policy.name, outcome.mean_kl]]
        if outcome.mean_kl < best["kl"]:
            best = summary(policy, outcome)
        found[share_name][name] = best | {"tried": tried}
    return found


def summary(policy: Policy, outcome: Outcome) -> dict[str, Any]:
    """Figures of one policy."""
    points = float(outcome.points.mean())
    return {"policy": policy.name, **outcome.summary(), "points_below_full": points}


def evaluation(bench: Bench) -> list[Any]:
    """Held-out samples: of every kind alike, and more needles."""
    return list(dict.fromkeys([*bench.of("evaluate"), *bench.division.needles]))


def offered(methods: Sequence[Method], counts: Sequence[int], prompt: int) -> tuple[Option, ...]:
    """Every method, count and pair of formats, weighted keys where they pay, and all tokens."""
    shares = tuple(count / prompt for count in counts)
    found = [*Menu(tuple(methods), shares, FORMATS).options()]
    many = [Budget(share=count / prompt) for count in counts if count >= WEIGHTED_FROM]
    wrapped = [WeightedKeys(by) for by in WEIGHTED]
    found += [Option(m, n, *pair) for m, n, pair in product(wrapped, many, ALLOCATED)]
    found += [Option(WeightedKeys(), ALL, *pair) for pair in ALLOCATED]
    return tuple(found)


def tables(bench: Bench, options: Sequence[Option], probes: int) -> Tables:
    """Losses of every option on search and selection samples."""
    samples = [*bench.of("search"), *bench.of("select")]
    needs = reduce(or_, (option.method.needs for option in options))
    made = bench.crew.everywhere(workers.captured_tables, samples, options, needs, probes)
    return join(made)


def menus_of(options: Sequence[Option]) -> dict[str, np.ndarray]:
    """Which options each menu holds."""
    fitted = np.array([isinstance(o.method, AttentionMatching) for o in options])
    weighted = np.array([isinstance(o.method, WeightedKeys) for o in options])
    plain = np.array([(o.keys, o.values) == FORMATS[0] for o in options])
    common = np.array([(o.keys, o.values) in FORMATS[:2] for o in options])
    return {
        "with all": np.arange(len(options)),
        "without fitting": np.flatnonzero(~fitted),
        "without fitting, rotation or weights": np.flatnonzero(~fitted & ~weighted & common),
        "compaction in 16 bits": np.flatnonzero(fitted & plain),
    }


def plans_at(bench: Bench, measured: Tables, share: float) -> dict[str, Any]:
    """The plan of every menu at a share, and how many times the loss with all theirs is."""
    settings = product(menus_of(measured.options).items(), (0.0, 0.3), (1.0, 4.0))
    wanted = [
        Variant(f"{name}; cross terms {cross}, retrieval x{emphasis:g}", columns, cross, emphasis)
        for (name, columns), cross, emphasis in settings
        if len(columns)
    ]
    found, _ = search(measured, (share,), wanted)
    groups: dict[str, list[Plan]] = {}
    for plan in found:
        groups.setdefault(plan.variant.name.split("; ")[0], []).append(plan)
    choice = choose(groups, bench.run, bench.of("select"), bench.division.select_needles)
    picked = list(choice.plans.items())
    outcomes = bench.run([plan.policy for _, plan in picked], evaluation(bench))
    best = dict(zip(choice.plans, outcomes, strict=True))["with all"]
    result: dict[str, Any] = {"on_selection": choice.losses}
    for (name, plan), outcome in zip(picked, outcomes, strict=True):
        times, interval = times_as_much(outcome, best)
        points = bootstrap(outcome.points, ["retrieval"] * len(outcome.points))
        result[name] = summary(plan.policy, outcome) | {
            "points_interval": [float(x) for x in np.percentile(points, [2.5, 97.5])],
            "predicted": plan.predicted,
            "options": used(plan.policy),
            "times_with_all": times,
            "times_interval": interval,
        }
    return result


def plans(
    bench: Bench, options: Sequence[Option], probes: int, shares: Sequence[float], until: float
) -> None:
    """Tables, then share after share until the time is up."""
    started = time.monotonic()
    measured = tables(bench, options, probes)
    bench.record("table_seconds", time.monotonic() - started)
    for share in shares:
        if time.monotonic() > until:
            say("no time for plans at", share)
            return
        attempt(bench.record, f"{share:.0%}", lambda s=share: plans_at(bench, measured, s))  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/compaction-traces"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240, help="after which nothing is begun")
    parser.add_argument("--tiny", action="store_true", help="one short sample of each kind")
    arguments = parser.parse_args()
    tokens, observed, per_kind, needles, probes = 2048, 256, (3, 1, 2), 8, 16
    counts, methods, published, fitted, shares = COUNTS, MENU, PUBLISHED, FITTED, SHARES
    until = time.monotonic() + arguments.seconds
    if arguments.tiny:
        tokens, observed, per_kind, needles, probes = 192, 32, (1, 1, 1), 1, 1
        counts, methods, published = (448,), MENU[5:], PUBLISHED[3:4]
        fitted, shares = FITTED[1:2], (0.12,)
    options = offered(methods, counts, 1792)
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
        bench.record("setting", {"workload": division.workload, "probes": probes})
        attempt(bench.record, "plans", lambda: plans(bench, options, probes, shares, until))
        for name, some in (("compaction", fitted), ("published", published)):
            if time.monotonic() < until:
                attempt(
                    bench.record, name,
                    lambda m=some: uniform(bench, m, [x for x in shares if x in PUBLISHED_SHARES]),  # type: ignore[misc]
                )  # fmt: skip


if __name__ == "__main__":
    main()
