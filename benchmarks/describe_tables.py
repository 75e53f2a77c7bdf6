"""Write a benchmark's calibration and baseline curves into the tables that it made.

    python benchmarks/describe_tables.py TABLES.safetensors RESULT.json [RESULT.json ...] OUT

``quality.py`` does this itself when it runs to its end; after an interrupted run this finishes the
job from the figures that it had written by then. Later results win. Of ``plan_against_rivals.py``
the baselines that do better than those known are taken over, so that a stand-in's comparison is
against the strongest that were measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvtune.simulator.tables_file import load_tables, save_tables


def strengthen(
    curves: dict[str, list[dict[str, Any]]], share: float, rival: dict[str, Any]
) -> None:
    """Put a rival in its family's place at a share, if it loses less than what stands there."""
    for point in curves[rival["name"].split()[0]]:
        if abs(point["at"] - share) < 1e-9 and rival["kl"] < point["kl"]:
            kept = ("name", "kl", "kl_interval", "share", "digits", "full_digits")
            point.clear()
            point.update({"at": share} | {key: rival[key] for key in kept if key in rival})


def main(arguments: list[str]) -> None:
    tables, provenance = load_tables(Path(arguments[0]))
    for name in arguments[1:-1]:
        figures = json.loads(Path(name).read_text())
        if "ranking" in figures:
            provenance["calibration"] = figures["ranking"]["calibration"]
        if "baseline_curves" in figures:
            provenance["baselines"] = figures["baseline_curves"]
        for share, found in figures.get("at_equal_bytes", {}).items():
            for rival in found.get("rivals", []):
                strengthen(provenance["baselines"], float(share.rstrip("%")) / 100, rival)
    save_tables(tables, Path(arguments[-1]), provenance)


if __name__ == "__main__":
    main(sys.argv[1:])
