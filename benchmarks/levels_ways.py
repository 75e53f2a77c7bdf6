"""Ways to learn levels of predicted losses from live rounds, compared on recorded runs.

    python benchmarks/levels_ways.py --out benchmarks/results/levels-ways.json \
        --constants benchmarks/results/levels-constants.json

A search runs a few plans on selection samples and moves what it prints by what they lost there.
Each way is judged on evaluation samples of runs of ``predictions.py``, each run by curves of the
others: in how many cells (a kind of text at 3, 6, 12 or 25 %) the median of live over printed lies
within 0.8 to 1.25, and the root mean square of its logarithm, of single kinds and of their mean.

``--constants`` shows what those of ``simulator/quality/levels.py`` matter, which were chosen with
these runs in view: one at a time has other values, widths are fitted anew, and each run's share of
plans within 80 % intervals is written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from predictions_judged import (
    ASKED,
    SHARES,
    Recorded,
    believed_curves,
    by_chance,
    fitted,
    left_when_judging,
    plans_by_share,
    printed,
    read,
)

from kvtune.common.files import write_json
from kvtune.simulator.quality import levels as constants
from kvtune.simulator.quality.calibration import Calibration
from kvtune.simulator.quality.levels import KIND_TEXTS, TRUST

RESULTS = Path(__file__).parent / "results"
RUNS = (
    "predictions-2-h200.json",
    "predictions-levels-h200.json",
    "predictions-levels-middle-smollm2-h200.json",
    "predictions-levels-short-smollm2-h200.json",
    "predictions-levels-short-gemma-3-270m-h200.json",
    "predictions-middle-smollm2-h200.json",
    "predictions-short-smollm2-h200.json",
    "predictions-short-gemma-3-270m-h200.json",
)
PROBES = "probes"


@dataclass(frozen=True)
class Way:
    """Shares of what was seen that are believed.

    Args:
        common: of the median over kinds.
        sort: of how far kinds that ask for what was read, or those that do not, lie from it.
        kind: of how far the kind itself lies from it.
        texts: if given, ``kind`` is n / (n + texts) with n selection texts of the kind.
    """

    common: float
    sort: float = 0.0
    kind: float = 0.0
    texts: float | None = None


WAYS = {
    "curves alone": Way(0.0),
    "0.7 of what all kinds have in common": Way(0.7),
    "all of it": Way(1.0),
    "and 0.3 of the kind's own": Way(0.7, kind=0.3),
    "and 0.5 of the kind's own": Way(0.7, kind=0.5),
    "all of the kind's own": Way(1.0, kind=1.0),
    "and the kind's own by its number of texts (as printed)": Way(TRUST, texts=KIND_TEXTS),
    "and 0.5 of what kinds that ask have in common": Way(0.7, sort=0.5),
    "0.85, 0.3 and 0.3": Way(0.85, sort=0.3, kind=0.3),
}

OTHERS = {
    "COMMON": (0.0, 0.05, 0.2, 0.4),
    "BELIEVED_BEFORE": (0.0, 3.0, 12.0, 24.0),
    "BELIEVED_OF_ALL": (1.0, 2.0, 8.0, 16.0),
    "KIND_TEXTS": (2.5, 10.0),
}
"""Values that constants of ``simulator/quality/levels.py`` might have had: from a quarter of what
they have to four times as much, or none."""


@dataclass(frozen=True)
class Seen:
    """Live over calibrated losses of the plans of one share, by kind of text.

    Args:
        share: of the bytes.
        levels: the median logarithm on selection samples.
        left: logarithms on evaluation samples, before any level, ``[plans]``.
        printed: what the curves say there, nats/token.
    """

    share: float
    levels: dict[str, float]
    left: dict[str, NDArray[np.float64]]
    printed: dict[str, NDArray[np.float64]]


def seen_at(run: Recorded, calibration: Calibration) -> list[Seen]:
    """Every share of a run."""
    found = []
    for rows in plans_by_share(run):
        parts: dict[str, dict[str, NDArray[np.float64]]] = {"select": {}, "evaluate": {}}
        printed: dict[str, NDArray[np.float64]] = {}
        for kind in run.kinds:
            for split, ratios in parts.items():
                predicted, live = run.pair("plans", kind, split)
                said = np.array([calibration.value(each, kind, True) for each in predicted[rows]])
                ratios[kind] = np.log(live[rows] / said)
            printed[kind] = said  # of the evaluation samples, which come last
        levels = {kind: float(np.median(ratio)) for kind, ratio in parts["select"].items()}
        found.append(Seen(float(run.shares[rows[0]]), levels, parts["evaluate"], printed))
    return found


def moved(way: Way, levels: dict[str, float], kind: str, texts: int) -> float:
    """The logarithm by which a way moves what is printed of a kind."""
    common = float(np.median(list(levels.values())))
    alike = [level for other, level in levels.items() if (other in ASKED) == (kind in ASKED)]
    own = way.kind if way.texts is None else texts / (texts + way.texts)
    apart = way.sort * (float(np.median(alike)) - common) + own * (levels[kind] - common)
    return way.common * common + apart


def judged(run: Recorded, others: Sequence[Recorded]) -> dict[str, Any]:
    """All ways on one run."""
    calibration = Calibration(believed_curves(others))
    everything = seen_at(run, calibration)
    texts = {kind: len(run.ids("plans", kind, "select")) for kind in run.kinds}
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        cells, squares, over = 0, [], []
        for seen in everything:
            live, printed = [], []
            for kind in run.kinds:
                level = moved(way, seen.levels, kind, texts[kind])
                left = seen.left[kind] - level
                squares.append(float(np.mean(left**2)))
                cells += seen.share in SHARES and 0.8 <= float(np.exp(np.median(left))) <= 1.25
                printed.append(seen.printed[kind] * np.exp(level))
                live.append(seen.printed[kind] * np.exp(seen.left[kind]))
            over.append(float(np.mean(np.log(np.sum(live, 0) / np.sum(printed, 0)) ** 2)))
        found[name] = {
            "cells within 0.8 to 1.25": int(cells),
            "by kind": round(float(np.sqrt(np.mean(squares))), 4),
            "over kinds": round(float(np.sqrt(np.mean(over))), 4),
        }
    cells = len(run.kinds) * sum(np.isin(np.unique(run.shares), SHARES))
    return {"cells": int(cells), "by chance": round(by_chance(run), 1), "ways": found}


def with_others(runs: dict[str, Recorded]) -> list[dict[str, Any]]:
    """How many plans of each run 80 % intervals hold, as shipped and with one constant changed."""
    shipped = {name: getattr(constants, name) for name in OTHERS}
    found = [{"constants": shipped, "runs": held(runs)}]
    for name, values in OTHERS.items():
        for value in values:
            with patch.object(constants, name, value):
                changed = {"changed": name, "to": value, "runs": held(runs)}
            found.append(changed)
    return found


def held(runs: dict[str, Recorded]) -> dict[str, Any]:
    """Plans within 80 % intervals after rounds and how far these reach, each run by the others."""
    each = list(runs.values())
    what = "within 80 % interval", "80 % interval reaches, times"
    judged = {
        name: printed(run, fitted(left_when_judging(run, each))) for name, run in runs.items()
    }
    return {name: {key: found[key] for key in what} for name, found in judged.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--constants", type=Path, help="write what other constants hold here")
    arguments = parser.parse_args()
    files = [RESULTS / name for name in RUNS]
    runs = {file.name: read(file, PROBES) for file in files}
    each = list(runs.values())
    found = {name: judged(run, left_when_judging(run, each)) for name, run in runs.items()}
    write_json(arguments.out, found)
    print(json.dumps(found, indent=1))
    if arguments.constants:
        write_json(arguments.constants, with_others(runs))


if __name__ == "__main__":
    main()
