"""Plans against the strongest published methods at equal bytes, live on held-out samples.

    python benchmarks/strongest.py --out benchmarks/results/strongest-h200.json
    python benchmarks/strongest.py --table benchmarks/results/strongest-h200.json

SmolLM2-135M on samples as ``quality.py`` makes them, at 3, 6, 12 and 25 % of the bf16 bytes. A
baseline is a published method under its authors' allocator (KVzip and Expected Attention, KeyDiff,
CAKE, CompressKV, and SnapKV, H2O and StreamingLLM under uniform, pyramid and AdaKV budgets), filled
to the same bytes. Each is tried in every precision that the runtime has pages for and that could
pay at this share, narrowed down on selection samples, and shown in its best two's better by the
very figures shown, which is generous to it. Plans are picked on selection samples alone. What a
method takes beside its bytes stands with it. A part that fails is recorded, and the next goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compaction import ALLOCATED, COUNTS, FORMATS, MENU, evaluation, plans, summary
from outcomes import Outcome, times_as_much
from quality_bench import Bench, opened
from recorded_parts import attempt

from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int3, Int4, Int8
from kvtune.policies.policy import Policy
from kvtune.tuner.baselines import COSTS, FAMILIES, STRONG, Stored, candidates
from kvtune.tuner.options import WEIGHTED, Menu

SHARES = (0.03, 0.06, 0.12, 0.25)
PLANS = ("with compaction", "without")
"""Menus of the plans; ``--allocated`` finds them on one menu more, bits by channel besides."""
_NARROW: tuple[Format, ...] = (Int4(exact_first=4), Int3(exact_first=4), Int2(exact_first=4))
_WIDE: tuple[Format, ...] = (Bf16(), Int8(), Int4(exact_first=4), Int3(exact_first=4))
_WIDE_FROM = 0.2  # of the bytes: below it no method's best was 8 or 16 bits
_FINALISTS = 2  # precisions of a method that run on all evaluation samples


@dataclass(frozen=True)
class Entry:
    """A baseline: a method under an allocator in one precision, filled to a share of the bytes."""

    share: float
    family: str
    policy: Policy

    @property
    def name(self) -> str:
        """The method and its allocator, whatever the precision."""
        return self.policy.name.rsplit(" ", 1)[0]


def stored_at(share: float, family: str) -> set[Stored]:
    """A family's methods in the precisions that may pay at a share of the bytes."""
    forms = _WIDE if share >= _WIDE_FROM else _NARROW
    return {(method, form) for _, method in (FAMILIES | STRONG)[family] for form in forms}


def entries(bench: Bench, shares: Sequence[float], families: Sequence[str]) -> Iterator[Entry]:
    """Every baseline in every precision that may pay."""
    layers, heads, head_dim = bench.shape
    for share in shares:
        for family in families:
            for policy in candidates(
                family, int(share * bench.full_bytes), bench.prompt, layers, heads, head_dim,
                stored_at(share, family),
            ):  # fmt: skip
                yield Entry(share, family, policy)


def baselines(bench: Bench, shares: Sequence[float], families: Sequence[str]) -> dict[str, Any]:
    """Each method's best at every share, with its outcome on the evaluation samples."""
    everyone = list(entries(bench, shares, families))
    first = bench.run([entry.policy for entry in everyone], bench.first(1, "select"))
    losses = [outcome.mean_kl for outcome in first]
    finalists = best_of_each(everyone, losses, _FINALISTS)
    outcomes = bench.run([entry.policy for entry in finalists], evaluation(bench))
    found: dict[str, Any] = {"tried": len(everyone), "outcomes": {}}
    for entry, outcome in zip(finalists, outcomes, strict=True):
        rows = found["outcomes"].setdefault(f"{entry.share:.0%}", {})
        if entry.name not in rows or outcome.mean_kl < rows[entry.name][1].mean_kl:
            rows[entry.name] = entry, outcome
    return found


def best_of_each(everyone: Sequence[Entry], losses: Sequence[float], count: int) -> list[Entry]:
    """The ``count`` precisions of least loss, of every method at every share."""
    ranked = [entry for _, entry in sorted(zip(losses, everyone, strict=True), key=_loss)]
    kept: dict[tuple[float, str], list[Entry]] = {}
    for entry in ranked:
        kept.setdefault((entry.share, entry.name), []).append(entry)
    return [entry for mine in kept.values() for entry in mine[:count]]


def _loss(pair: tuple[float, Entry]) -> float:
    return pair[0]


def shown(ours: dict[str, tuple[Policy, Outcome]], theirs: dict[str, Any]) -> dict[str, Any]:
    """One share's rows: plans and every method, with how many times the first plan's loss it is."""
    plan = next(iter(ours.values()))[1]
    rows = {name: summary(policy, outcome) for name, (policy, outcome) in ours.items()}
    for name, (entry, outcome) in theirs.items():
        times, interval = times_as_much(outcome, plan)
        rows[name] = summary(entry.policy, outcome)
        rows[name] |= {"times_the_plan": times, "times_interval": interval}
        rows[name] |= {"costs": COSTS[entry.family]} if entry.family in COSTS else {}
    return rows


@dataclass(frozen=True)
class Asked:
    """What is measured: menus of plans, families of baselines, shares, and until when.

    ``until`` is the last ``time.monotonic()`` at which a part is begun.
    """

    menus: Sequence[str]
    families: Sequence[str]
    shares: Sequence[float]
    until: float


def measure(bench: Bench, menu: Menu, probes: int, asked: Asked) -> None:
    """Plans and baselines; each part's figures are written as they come, and none begun too late.

    Baselines come first: they take less, and without them plans cannot be compared at all.
    """
    families, shares, until = asked.families, asked.shares, asked.until
    kept: dict[str, Any] = {}

    def theirs() -> dict[str, Any]:
        kept["theirs"] = baselines(bench, shares, families)
        rows = kept["theirs"]["outcomes"].items()
        return {
            share: {n: summary(e.policy, o) for n, (e, o) in row.items()} for share, row in rows
        }

    def ours() -> dict[str, Any]:
        found: dict[str, Any] = {}
        kept["ours"] = found
        return plans(bench, menu, probes, shares, asked.menus, found, until)

    for name, part in (("baselines", theirs), ("plans", ours)):
        if time.monotonic() < until:
            attempt(bench.record, name, part)
    if {"ours", "theirs"} <= kept.keys():
        for share, others in kept["theirs"]["outcomes"].items():
            if share in kept["ours"]:  # else there was no time for its plans
                bench.record(f"at {share}", shown(kept["ours"][share], others))


def table(file: Path) -> Iterator[str]:
    """The figures as Markdown: the five best methods of every share beside the plans."""
    figures = json.loads(file.read_text(encoding="utf-8"))
    yield "| KV bytes | | live KL | times the plan's | digits below the full cache |"
    yield "|---|---|---|---|---|"
    for share, others in figures["baselines"].items():
        ours = [(f"plan {name}", row) for name, row in figures["plans"].get(share, {}).items()]
        ranked = sorted(((row["policy"], row) for row in others.values()), key=_kl)
        least = min(row["kl"] for _, row in [*ours, *ranked])
        for label, row in [*ours, *ranked[:5]]:
            yield (
                f"| {share} | {label} | {row['kl']:.3g} | {row['kl'] / least:.1f} | "
                f"{row['points_below_full']:.1f} |"
            )


def _kl(pair: tuple[str, dict[str, Any]]) -> float:
    return float(pair[1]["kl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/strongest.json"))
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/strongest-traces"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="one short sample of each kind")
    parser.add_argument("--allocated", action="store_true", help="plans with bits by channel too")
    parser.add_argument("--families", nargs="+", choices=[*FAMILIES, *STRONG], help="baselines")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--seconds", type=float, default=600.0, help="no part is begun after")
    parser.add_argument("--table", type=Path, help="print a finished run as Markdown instead")
    arguments, begun = parser.parse_args(), time.monotonic()
    if arguments.table:
        print("\n".join(table(arguments.table)))
        return
    tokens, observed, per_kind, needles, probes = 2048, 256, (2, 1, 4), 8, 8
    counts, methods, shares = (*COUNTS[1::2], 896), MENU, tuple(arguments.shares)
    families = arguments.families or [*FAMILIES, *STRONG]
    if arguments.tiny:
        tokens, observed, per_kind, needles, probes = 256, 64, (1, 1, 1), 1, 1
        counts, methods, shares, families = (128,), (MENU[2], MENU[5]), (0.12,), ["kvzip"]
    menus, weighted = ((*PLANS, ALLOCATED), WEIGHTED) if arguments.allocated else (PLANS, ())
    menu = Menu(methods, tuple(n / 1792 for n in counts), FORMATS, weighted)
    with opened(
        arguments, tokens=tokens, observed=observed, per_kind=per_kind, needles=needles,
        probes=probes,
    ) as bench:  # fmt: skip
        measure(bench, menu, probes, Asked(menus, families, shares, begun + arguments.seconds))


if __name__ == "__main__":
    main()
