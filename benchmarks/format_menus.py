"""What rotated and three-bit formats add to a plan: 3, 6, 12 and 25 % of the bytes, live on a GPU.

    python benchmarks/format_menus.py --out benchmarks/results/format-menus-h200.json

SmolLM2-135M on samples as ``quality.py`` makes them. Tables are built once for both menus: SnapKV,
H2O and StreamingLLM in ``int4``, ``int2`` and 16 bits, and the same with ``options.ROTATED``
besides. At every share both are searched with the same settings, each picks among them on selection
samples, and both picks run on evaluation samples; ``times`` is how many times the wider menu's loss
that of the narrower is, with a 95 % interval over samples that are drawn alike for both. Tables
take most of the time; with ``--seconds`` no share is begun afterwards. ``--tiny --device cpu``
shows that it runs to its end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from compaction import evaluation, measured_tables, summary
from outcomes import times_as_much, used
from plans import Plan, Variant, choose, search
from quality_bench import Bench, opened
from recorded_parts import attempt, say

from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.options import FULL, METHODS, ROTATED, Menu

SHARES = (0.03, 0.06, 0.12, 0.25)
COUNTS = (16, 32, 48, 64, 96, 128, 192, 256, 448, 896)  # of 1792 tokens
BEFORE, AFTER = "int4, int2", "with rotated and three bits"


def plans(bench: Bench, measured: Tables, share: float) -> dict[str, Any]:
    """Both menus' plans at a share, and how much the wider one gains."""
    rotated = np.array([(o.keys, o.values) in ROTATED for o in measured.options])
    menus = {BEFORE: np.flatnonzero(~rotated), AFTER: np.arange(len(rotated))}
    settings = product(menus.items(), (0.0, 0.3), (1.0, 4.0))
    wanted = [
        Variant(f"{name}; cross terms {cross}, retrieval x{emphasis:g}", columns, cross, emphasis)
        for (name, columns), cross, emphasis in settings
    ]
    found, _ = search(measured, (share,), wanted)
    groups: dict[str, list[Plan]] = {}
    for plan in found:
        groups.setdefault(plan.variant.name.split("; ")[0], []).append(plan)
    choice = choose(groups, bench.run, bench.of("select"), bench.division.select_needles)
    picked = [choice.plans[name].policy for name in (BEFORE, AFTER)]
    before, after = bench.run(picked, evaluation(bench))
    times, interval = times_as_much(before, after)
    rows = {
        name: summary(policy, outcome) | {"options": used(policy)}
        for name, policy, outcome in zip((BEFORE, AFTER), picked, (before, after), strict=True)
    }
    return {"times": times, "times_interval": interval, **rows}


def measure(bench: Bench, menu: Menu, shares: Sequence[float], seconds: float) -> None:
    """Tables, then share after share until the time is up."""
    begun = time.monotonic()
    measured = measured_tables(bench, menu.options(), 16 if len(shares) > 1 else 1)
    bench.record("table_seconds", time.monotonic() - begun)
    for share in shares:
        if time.monotonic() - begun > seconds:
            say("no time for", share)
            return
        attempt(bench.record, f"{share:.0%}", lambda s=share: plans(bench, measured, s))  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/format-traces"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--tiny", action="store_true", help="one short sample of each kind")
    arguments = parser.parse_args()
    tokens, observed, per_kind, needles = 2048, 256, (3, 1, 4), 8
    counts, shares, methods = COUNTS, SHARES, METHODS
    if arguments.tiny:
        tokens, observed, per_kind, needles = 192, 32, (1, 1, 1), 1
        counts, shares, methods = (256,), SHARES[2:3], METHODS[2:]
    menu = Menu(methods, tuple(n / 1792 for n in counts), (*FULL.formats, *ROTATED))
    with opened(
        arguments, tokens=tokens, observed=observed, per_kind=per_kind, needles=needles,
    ) as bench:  # fmt: skip
        attempt(
            bench.record,
            "measured",
            lambda: measure(bench, menu, shares, arguments.seconds),
        )


if __name__ == "__main__":
    main()
