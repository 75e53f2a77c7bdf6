"""Compaction by fitting and bits by channel, 1 to 25 % of the bytes: live KL and needle digits.

    python benchmarks/compaction.py --out benchmarks/results/compaction-h200.json [--seconds 540]

SmolLM2-135M on samples as ``quality.py`` makes them, on a GPU. At every share of the bf16 bytes:
plans found by the search with compaction in the menu, with the formats of ``options.WEIGHTED``
besides (2.3 and 3.2 bits an element behind weighted keys), without either, and with compaction in
16 bits alone, which stands for Attention Matching with budgets of its own. ``times`` is how many
times the loss of the menu without either that of each menu is, with a 95 % interval over samples
that are drawn alike for both. Then, at 1, 3 and 6 %, every published method of the menu in the
precision that suits it best (by the very figures that are shown, which is generous to it), and
Attention Matching and its cheap variants alike in all heads. Plans are picked among search settings
on selection samples that the evaluation does not share. Shares come in the order of the issue's
numbers; none is begun, and no part, after ``--seconds``. A part that fails is recorded. Tables take
most of the time and are kept in ``--tables``: a second command goes on with other ``--shares``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import workers
from outcomes import Outcome, times_as_much, used
from plans import Plan, Variant, choose, search
from quality_bench import Bench, opened
from recorded_parts import attempt, say

from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.method import Method
from kvtune.policies.methods.attention_matching import AttentionMatching
from kvtune.policies.methods.compresskv import CompressKV
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.quality.tables import Tables, join
from kvtune.simulator.quality.tables_file import load_tables, save_tables
from kvtune.tuner.options import WEIGHTED, Menu, Pair

SHARES = (0.01, 0.03, 0.06)
PLANNED = (0.03, 0.06, 0.01, 0.12, 0.25)
PARTS = ("plans", "published", "compaction")
FORMATS: tuple[Pair, ...] = (
    (Bf16(), Bf16()),
    (Int4(exact_first=4), Int4(exact_first=4)),
    (Int4(exact_first=4), Int2(exact_first=4)),
)
FITTED: tuple[Method, ...] = (
    AttentionMatching(),
    AttentionMatching(fit="together"),
    AttentionMatching("snapkv"),
    AttentionMatching("kvzip"),
)
PUBLISHED: tuple[Method, ...] = (
    SnapKV(), SnapKV(recent=8), H2O(), StreamingLLM(), KVzip(), ExpectedAttention(), CompressKV(),
)  # fmt: skip
MATCHED = AttentionMatching(fit="together")
MENU = (SnapKV(), SnapKV(recent=8), H2O(), StreamingLLM(), KVzip(), MATCHED)
ALLOCATED = "with compaction and allocated"
MENUS = ("with compaction", "without", "compaction in 16 bits")
EVERY_MENU = (*MENUS, ALLOCATED)
COUNTS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 448)  # of 1792 tokens
MORE_COUNTS = (*COUNTS, 896)
MOST_FITTED = 256  # entries a head: what fits cost grows with their cube


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


def is_offered(option: Option) -> bool:
    """Not where so many entries would be fitted; their budgets are shares of 1792 tokens."""
    share = option.budget.share or 0.0
    return not (isinstance(option.method, AttentionMatching) and share * 1792 > MOST_FITTED)


def tables(
    bench: Bench, options: Sequence[Option], probes: int, kept: Path | None = None
) -> Tables:
    """Losses of every option on search and selection samples, from the file where it is there."""
    if kept and kept.is_file():
        return load_tables(kept)[0]
    made = measured_tables(bench, options, probes)
    if kept:
        save_tables(made, kept, {"probes": probes})
    return made


def measured_tables(bench: Bench, options: Sequence[Option], probes: int) -> Tables:
    """Losses of every option on search and selection samples."""
    samples = [*bench.of("search"), *bench.of("select")]
    needs = reduce(or_, (option.method.needs for option in options))
    made = bench.crew.everywhere(workers.captured_tables, samples, options, needs, probes)
    return join(made)


def columns_of(options: Sequence[Option]) -> dict[str, np.ndarray]:
    """What each menu has, as columns of the tables."""
    fitted = np.array([isinstance(o.method, AttentionMatching) for o in options])
    plain = np.array([(o.keys, o.values) == FORMATS[0] for o in options])
    allocated = np.array([(o.keys, o.values) in WEIGHTED for o in options])
    return {
        "with compaction": np.flatnonzero(~allocated),
        "without": np.flatnonzero(~fitted & ~allocated),
        "compaction in 16 bits": np.flatnonzero(fitted & plain),
        ALLOCATED: np.arange(len(options)),
    }


def plans(
    bench: Bench,
    menu: Menu,
    probes: int,
    shares: Sequence[float],
    names: Sequence[str] = MENUS,
    kept: dict[str, dict[str, tuple[Policy, Outcome]]] | None = None,
    until: float = float("inf"),
    table_file: Path | None = None,
) -> dict[str, Any]:
    """Every menu's plan at every share that is begun before the time ``until``.

    ``kept`` takes their policies and outcomes by share; ``table_file`` is read, or written.
    """
    started = time.monotonic()
    measured = tables(bench, [*filter(is_offered, menu.options())], probes, table_file)
    result: dict[str, Any] = {"table_seconds": time.monotonic() - started}
    for share in shares:
        if time.monotonic() > until:
            say("no time for", share)
            break
        found = planned(bench, measured, share, names)
        result.setdefault("on_selection", {}).update(found.losses)
        rows = {name: summary(*pair) | used_by(pair[0]) for name, pair in found.run.items()}
        if "without" in found.run:
            for name, (_, outcome) in found.run.items():
                times, interval = times_as_much(found.run["without"][1], outcome)
                rows[name] |= {"times": times, "times_interval": interval}
        for name, plan in found.plans.items():
            rows[name]["predicted"] = plan.predicted
        result[f"{share:.0%}"] = rows
        if kept is not None:
            kept[f"{share:.0%}"] = found.run
        bench.record("plans", result)
    return result


@dataclass(frozen=True)
class Planned:
    """The plans that were picked at one share, by menu.

    Args:
        plans: as the search made them.
        run: their policies, and what evaluation samples say of them.
        losses: predicted and live on selection samples, of all plans that were tried.
    """

    plans: dict[str, Plan]
    run: dict[str, tuple[Policy, Outcome]]
    losses: dict[str, tuple[float, float]]


def planned(bench: Bench, measured: Tables, share: float, names: Sequence[str]) -> Planned:
    """Search, pick on selection samples, and run on those of evaluation."""
    menus = columns_of(measured.options)
    settings = product(((name, menus[name]) for name in names), (0.0, 0.3), (1.0, 4.0))
    wanted = [
        Variant(f"{name}, cross terms {cross}, retrieval x{emphasis:g}", columns, cross, emphasis)
        for (name, columns), cross, emphasis in settings
    ]
    found, _ = search(measured, (share,), wanted)
    groups: dict[str, list[Plan]] = {}
    for plan in found:
        groups.setdefault(plan.variant.name.split(", ")[0], []).append(plan)
    choice = choose(groups, bench.run, bench.of("select"), bench.division.select_needles)
    policies = {name: plan.policy for name, plan in choice.plans.items()}
    outcomes = bench.run(list(policies.values()), evaluation(bench))
    pairs = zip(policies.items(), outcomes, strict=True)
    return Planned(
        choice.plans, {name: (policy, one) for (name, policy), one in pairs}, choice.losses
    )


def used_by(policy: Policy) -> dict[str, Any]:
    """The options that a policy's heads have."""
    return {"options": used(policy)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/compaction-traces"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--shares", type=float, nargs="+", default=PLANNED, help="of the plans")
    parser.add_argument("--tables", type=Path, help="of an earlier run; written if not there")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="one short sample of each kind")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    tokens, observed, per_kind, needles, probes = 2048, 256, (3, 1, 2), 8, 16
    counts, methods, published, fitted = MORE_COUNTS, MENU, PUBLISHED, FITTED
    at = tuple(arguments.shares)
    shares = [share for share in SHARES if share in at]
    if arguments.tiny:
        tokens, observed, per_kind, needles, probes = 192, 32, (1, 1, 1), 1, 1
        counts, methods, published = (256,), MENU[5:], PUBLISHED[3:4]
        fitted, at, shares = FITTED[1:2], (0.06,), [0.06]
    menu = Menu(methods, tuple(n / 1792 for n in counts), FORMATS, WEIGHTED)
    with opened(
        arguments, tokens=tokens, observed=observed, per_kind=per_kind, needles=needles,
        probes=probes,
    ) as bench:  # fmt: skip
        names = EVERY_MENU[-1:] if arguments.tiny else EVERY_MENU

        def planning(names: Sequence[str]) -> dict[str, Any]:
            return plans(bench, menu, probes, at, names, None, until, arguments.tables)

        work = {
            "plans": lambda: planning(names),
            "published": lambda: uniform(bench, published, shares),
            "compaction": lambda: uniform(bench, fitted, shares),
        }
        for part in arguments.parts:
            if time.monotonic() < until:
                attempt(bench.record, part, work[part])


if __name__ == "__main__":
    main()
