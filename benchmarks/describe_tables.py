"""Write a benchmark's calibration and baseline curves into the tables that it made.

    python benchmarks/describe_tables.py TABLES.safetensors RESULT.json [RESULT.json ...] OUT

``quality.py`` does this itself when it runs to its end; after an interrupted run this finishes the
job from the figures that it had written by then. Later results win.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvtune.simulator.tables_file import load_tables, save_tables


def main(arguments: list[str]) -> None:
    tables, provenance = load_tables(Path(arguments[0]))
    for name in arguments[1:-1]:
        figures = json.loads(Path(name).read_text())
        if "ranking" in figures:
            provenance["calibration"] = figures["ranking"]["calibration"]
        if "baseline_curves" in figures:
            provenance["baselines"] = figures["baseline_curves"]
    save_tables(tables, Path(arguments[-1]), provenance)


if __name__ == "__main__":
    main(sys.argv[1:])
