"""Whether times and rates of a run on a GPU are those of the committed run, within a share.

    python benchmarks/decode_step.py --out step.json
    python benchmarks/unchanged.py benchmarks/results/decode-step-h200.json step.json
    python benchmarks/paged_kernels.py --parts check formats --out kernels.json
    python benchmarks/unchanged.py benchmarks/results/kernels-h100.json kernels.json

Every figure in milliseconds, microseconds, GB/s or tokens a second that stands in both files is
compared; it ends with 1 where one of them is worse by more than ``--within`` (2 %). Measured times
and rates with intervals are compared by the ends that are nearest: those whose intervals overlap
count as the same. Runs on different cards are compared all the same, and said to be. Where a
step's kernels were profiled, those of this repository are summed apart from the libraries': a card
on which matrices are multiplied more slowly is none of this code's doing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LOWER_IS_BETTER = ("ms", "ms, plain modules", "us", "bf16 us", "in its formats us")
SUMS = ("kvtune's, us", "libraries', us")
OURS = ("decode_attention", "append_rotated", "append_token", "_rms_norm", "_gated", "_rotate")
"""Kernels of ``runtime/kernels``, by the beginnings of their names."""
HIGHER_IS_BETTER = ("GB/s", "tokens a second", "batch")
UNITS = {"s": False, "tokens/s": True}
"""Of measured estimates, with whether more is better."""


class Figure(NamedTuple):
    """A time or a rate: both ends of its interval, which are one where it has none."""

    low: float
    high: float
    more_is_better: bool


def figures(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Figure]]:
    """Every time and rate in a result, with the names that lead to it."""
    if isinstance(node, dict) and node.get("tier") == "measured" and node.get("unit") in UNITS:
        yield path, Figure(node["low"], node["high"], UNITS[node["unit"]])
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from figures(child, (*path, name))
    elif isinstance(node, list) and node and path[-1] == "kernels":
        ours, others = 0.0, 0.0
        for name, us, _ in node:
            mine = us if name.startswith(OURS) else 0.0
            ours, others = ours + mine, others + us - mine
        yield from (
            ((*path, name), Figure(total, total, False))
            for name, total in zip(SUMS, (ours, others), strict=True)
        )
    elif isinstance(node, (int, float)) and path[-1] in LOWER_IS_BETTER + HIGHER_IS_BETTER:
        yield path, Figure(float(node), float(node), path[-1] in HIGHER_IS_BETTER)


def slowdowns(before: Any, after: Any) -> dict[str, float]:
    """How many times as slow each figure has become at least; below 1 it is quicker."""
    old, new = dict(figures(before)), dict(figures(after))
    found = {}
    for path in old.keys() & new.keys():
        ratio = _apart(old[path], new[path])
        found[" / ".join(path)] = 1 / max(ratio, 1e-9) if old[path].more_is_better else ratio
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _apart(old: Figure, new: Figure) -> float:
    """The new over the old, from the nearest ends of their intervals; 1 where these overlap."""
    if new.low > old.high > 0:
        return new.low / old.high
    return new.high / old.low if new.high < old.low else 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("committed", type=Path)
    parser.add_argument("now", type=Path)
    parser.add_argument("--within", type=float, default=0.02)
    asked = parser.parse_args()
    before, after = (
        json.loads(p.read_text(encoding="utf-8")) for p in (asked.committed, asked.now)
    )
    if before.get("device") != after.get("device"):
        print(f"different cards: {before.get('device')} and {after.get('device')}")
    found = slowdowns(before, after)
    for name, times in found.items():
        print(f"{times:7.3f}{'  SLOWER' if times > 1 + asked.within else ''}  {name}")
    slower = sum(times > 1 + asked.within for times in found.values())
    print(f"{slower} of {len(found)} figures are more than {asked.within:.0%} slower")
    return 1 if slower or not found else 0


if __name__ == "__main__":
    sys.exit(main())
