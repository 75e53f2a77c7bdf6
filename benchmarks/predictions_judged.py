"""Judges what ``predictions.py`` recorded, and fits the calibration that the package ships.

    cd benchmarks/results && python ../predictions_judged.py predictions-2-h200.json \
        --fitted-on predictions-short-gemma-3-270m-h200.json predictions-short-smollm2-h200.json \
        --probes probes --each --out predictions-judged.json --fit ../../tuner/data/calibration.json

Every figure about a kind of text is of a calibration that was fitted on the other kinds alone, or,
with ``--fitted-on RECORDED...``, on other runs, of other models or other lengths. ``after rounds``
is what a search prints where the weights are at hand: the four plans of a share run on the
selection samples, their level moves the calibration, and the plan that loses least there is
printed; it is judged on the evaluation samples, on each kind of text and over all of them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, spearmanr

from kvtune.common.files import write_json
from kvtune.simulator.quality.calibration import (
    ASKED,
    Calibration,
    Curve,
    Regime,
    fit_curve,
    fit_left_out,
    regime_of,
    thinned,
    write_calibration,
)
from kvtune.tuner.refine import apart_of, level_of

Array = NDArray[np.float64]
SHARES = (0.03, 0.06, 0.12, 0.25)
SPLITS = ("select", "evaluate")
EVICTING: tuple[Regime, ...] = ("evicting", "evicting what is asked for")
BELIEVED = 0.5


@dataclass
class Pairs:
    """Predicted and live losses, and the text that each was seen on."""

    predicted: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, predicted: Array, live: Array, text: str) -> None:
        self.predicted += predicted.tolist()
        self.live += live.tolist()
        self.texts += [text] * len(live)


@dataclass(frozen=True)
class Recorded:
    """A run of ``predictions.py``, as one family of probes sees it."""

    data: dict[str, Any]
    probes: str

    @property
    def kinds(self) -> list[str]:
        """The kinds of text that the samples are of."""
        return sorted({sample["kind"] for sample in self.data["samples"].values()})

    def ids(self, group: str, kind: str | None = None, split: str | None = None) -> list[str]:
        """Samples that a group of policies ran on."""
        samples = self.data["samples"]
        return [
            name
            for name in self.data[f"{group} by sample"]
            if kind in (None, samples[name]["kind"]) and split in (None, samples[name]["split"])
        ]

    def array(self, group: str, ids: list[str], name: str) -> Array:
        """A figure of every policy on samples, ``[n, policies]``."""
        rows = self.data[f"{group} by sample"]
        return np.array([rows[each][name] for each in ids], float)

    def pair(self, group: str, kind: str, split: str) -> tuple[Array, Array]:
        """Predicted and live, means over a kind's samples of a split, ``[policies]``."""
        ids = self.ids(group, kind, split)
        both = (f"{self.probes}, all", "live")
        return tuple(self.array(group, ids, name).mean(0) for name in both)  # type: ignore[return-value]

    @property
    def prompt_tokens(self) -> int:
        """Of every sample, as the workload's description says it."""
        tokens, observed = re.findall(r"\b[NC]=(\d+)", self.data["workload"])
        return int(tokens) - int(observed)

    @property
    def shares(self) -> Array:
        """The share of bytes of every plan."""
        return np.array([plan["share"] for plan in self.data["plans"]])


def plans_of(recorded: Recorded, kinds: list[str]) -> Pairs:
    """Predicted and live losses of tuned plans on kinds of text, and which text it was."""
    found = Pairs()
    for kind, split in product(kinds, SPLITS):
        found.add(*recorded.pair("plans", kind, split), f"{kind} {split}")
    return found


def quantised(recorded: Recorded) -> Pairs:
    """The same of policies that keep every token; of the mixed ones, where these were run."""
    found = Pairs()
    if not recorded.data.get("mixed by sample"):
        return found
    rows = [i for i, each in enumerate(recorded.data["mixed"]) if each["group"] == "quantised"]
    for kind in recorded.kinds:
        x, y = recorded.pair("mixed", kind, "evaluate")
        found.add(x[rows], y[rows], kind)
    return found


def curve_of(runs: Sequence[Pairs]) -> Curve:
    """The curve of some runs: of several, a run is what is left out to see how far others lie.

    Then half of what they show is believed of another model: of the shares 0, 0.25, 0.5, 0.75 and
    1 it is the one whose intervals hold as often as they say on each run that was left out.
    """
    several = len(runs) > 1
    predicted = [x for run in runs for x in run.predicted]
    live = [y for run in runs for y in run.live]
    groups = [number if several else text for number, run in enumerate(runs) for text in run.texts]
    return fit_left_out(predicted, live, groups, BELIEVED if several else 1.0)


def fitted(runs: Sequence[Recorded]) -> Calibration:
    """What the package ships, or what other runs say of one that is left out."""
    left = levelled_residuals(runs)
    curves: dict[Regime, Curve] = {
        regime: replace(
            curve_of([plans_of(run, kinds_of(run, regime)) for run in runs]),
            levelled_residuals={n: thinned(values) for n, values in left[regime].items()},
        )
        for regime in EVICTING
    }
    if stored := [pairs for run in runs if (pairs := quantised(run)).live]:
        curves = {"quantising": curve_of(stored), **curves}
    count = sum(len(run.data["plans"]) * len(run.ids("plans")) for run in runs)
    return Calibration(curves, runs=count)


def kinds_of(recorded: Recorded, regime: Regime) -> list[str]:
    """The kinds of text on which policies that evict follow a regime's curve."""
    return [kind for kind in recorded.kinds if regime_of(kind, evicts=True) == regime]


def levelled_residuals(runs: Sequence[Recorded]) -> dict[Regime, dict[int, list[float]]]:
    """Logarithms of live over printed after rounds, each run by curves of the others.

    By the length of the run's prompts: short samples observe fewer tokens, and scatter more.
    """
    found: dict[Regime, dict[int, list[float]]] = {regime: {} for regime in EVICTING}
    for run in runs if len(runs) > 1 else ():
        others = [other for other in runs if other is not run]
        curves = {regime: believed_curve(others, regime) for regime in EVICTING}
        for rows in plans_by_share(run):
            for kind, ratio in after_rounds(run, Calibration(curves), rows).by_kind.items():
                left = found[regime_of(kind, evicts=True)].setdefault(run.prompt_tokens, [])
                left += np.log(ratio).tolist()
    return found


def believed_curve(runs: Sequence[Recorded], regime: Regime) -> Curve:
    """What runs show, as far as it is believed of another."""
    each = [plans_of(run, kinds_of(run, regime)) for run in runs]
    predicted = [x for pairs in each for x in pairs.predicted]
    return fit_curve(predicted, [y for pairs in each for y in pairs.live]).believed(BELIEVED)


def plans_by_share(recorded: Recorded) -> list[NDArray[np.int64]]:
    """Which plans belong together: those of one share of the bytes."""
    return [np.flatnonzero(recorded.shares == share) for share in np.unique(recorded.shares)]


@dataclass(frozen=True)
class Rounds:
    """Plans of one share on evaluation samples, when they have run on the selection samples.

    Args:
        by_kind: live over printed, ``[plans]``, of each kind of text.
        over_kinds: the same of the mean over kinds.
        by_curves: the same before the rounds moved what is printed.
        best: which of the plans lost least on the selection samples.
    """

    by_kind: dict[str, Array]
    over_kinds: Array
    by_curves: Array
    best: int


def after_rounds(recorded: Recorded, calibration: Calibration, rows: NDArray[np.int64]) -> Rounds:
    """What rounds with the plans of one share come to."""

    def losses(split: str, by: Calibration) -> tuple[dict[str, Array], dict[str, Array]]:
        pairs = {kind: recorded.pair("plans", kind, split) for kind in recorded.kinds}
        printed = {
            kind: np.array([by.value(each, kind, evicts=True) for each in x[rows]])
            for kind, (x, _) in pairs.items()
        }
        return printed, {kind: y[rows] for kind, (_, y) in pairs.items()}

    expected, seen = losses("select", calibration)
    each = range(len(rows))
    pairs = [(plan_of(expected, plan), plan_of(seen, plan)) for plan in each]
    texts = {kind: len(recorded.ids("plans", kind, "select")) for kind in recorded.kinds}
    levelled = calibration.levelled(
        level_of(pairs), len(rows), recorded.prompt_tokens, apart_of(pairs, texts)
    )
    printed, live = losses("evaluate", levelled)
    alone, _ = losses("evaluate", calibration)
    total = np.sum(list(live.values()), 0)
    return Rounds(
        {kind: live[kind] / printed[kind] for kind in recorded.kinds},
        total / np.sum(list(printed.values()), 0),
        total / np.sum(list(alone.values()), 0),
        int(np.sum(list(seen.values()), 0).argmin()),
    )


def plan_of(losses: dict[str, Array], plan: int) -> dict[str, float]:
    """One plan's losses by kind of text."""
    return {kind: float(values[plan]) for kind, values in losses.items()}


def printed(recorded: Recorded, other: Calibration) -> dict[str, Any]:
    """What a search prints after live rounds, held against live runs on evaluation samples."""
    names = "over kinds, chosen plan", "the same by the curves alone", "over kinds, median"
    found: dict[str, Any] = {name: {} for name in (*names, *recorded.kinds)}
    inside: dict[str, list[bool]] = {name: [] for name in ("over kinds", *recorded.kinds)}
    calibration = other.levelled(0.0, 0, recorded.prompt_tokens)
    reach = {kind: calibration.curve(kind, True).scatter(0.8)[1] for kind in recorded.kinds}
    for rows in plans_by_share(recorded):
        rounds = after_rounds(recorded, other, rows)
        chosen = float(rounds.over_kinds[rounds.best])
        three = chosen, float(rounds.by_curves[rounds.best]), np.median(rounds.over_kinds)
        medians = {kind: np.median(ratios) for kind, ratios in rounds.by_kind.items()}
        for name, ratio in {**dict(zip(names, three, strict=True)), **medians}.items():
            found[name][f"{recorded.shares[rows[0]]:.1%}"] = round(float(ratio), 3)
        inside["over kinds"] += held(rounds.over_kinds, float(np.mean(list(reach.values()))))
        for kind, ratios in rounds.by_kind.items():
            inside[kind] += held(ratios, reach[kind])
    found["within 80 % interval"] = {
        name: round(float(np.mean(each)), 3) for name, each in inside.items()
    }
    found["80 % interval reaches, times"] = {
        kind: round(float(np.exp(each)), 2) for kind, each in reach.items()
    }
    return found


def by_chance(recorded: Recorded) -> float:
    """Cells of a kind and a share within 0.8 to 1.25 if every level were right, of 24.

    Texts of a kind differ: of the mean logarithm of live over predicted the standard error is known
    from the cell's own evaluation samples.
    """
    found = 0.0
    for kind in recorded.kinds:
        ids = recorded.ids("plans", kind, "evaluate")
        names = f"{recorded.probes}, all", "live"
        predicted, live = (recorded.array("plans", ids, name) for name in names)
        variance = np.log(live / predicted).var(0, ddof=1) / len(ids)
        errors = [np.sqrt(variance[recorded.shares == share].mean()) for share in SHARES]
        found += float(np.sum(2 * norm.cdf(np.log(1.25) / np.array(errors)) - 1))
    return found


def held(ratios: Array, reach: float) -> list[bool]:
    """Whether each ratio lies within an interval, in logarithms."""
    inside: list[bool] = (np.abs(np.log(ratios)) <= reach).tolist()
    return inside


def judged(recorded: Recorded, other: Calibration | None = None) -> dict[str, Any]:
    """Live over predicted on each kind of text, and the coverage of 80 % intervals.

    Args:
        recorded: the run that is judged.
        other: a calibration of other runs; None takes each kind's from the other kinds.
    """
    found = {}
    for kind in recorded.kinds:
        others = [k for k in recorded.kinds if k != kind and (k in ASKED) == (kind in ASKED)]
        curve = other.curve(kind, evicts=True) if other else curve_of([plans_of(recorded, others)])
        found[kind] = judged_on(recorded, kind, curve)
    return found


def judged_on(recorded: Recorded, kind: str, curve: Curve) -> dict[str, Any]:
    """The same on one kind of text, under a curve."""
    x, y = recorded.pair("plans", kind, "evaluate")
    reach = curve.scatter(0.8)[1]
    columns = {"raw": x, "calibrated": np.array([curve.value(each) for each in x])}
    return {
        name: {
            "live over predicted": by_share(recorded, y / values),
            "within 80 % interval": float(np.mean(held(y / values, reach))),
        }
        for name, values in columns.items()
    }


def by_share(recorded: Recorded, ratio: Array) -> dict[str, float]:
    """Medians over the plans of a share."""
    return {
        f"{share:.0%}": round(float(np.median(ratio[recorded.shares == share])), 3)
        for share in SHARES
        if np.any(recorded.shares == share)
    }


def ranks(recorded: Recorded) -> dict[str, Any]:
    """Rank correlations: mixed policies over all kinds and on each, plans' answers alone."""
    ids = recorded.ids("mixed")
    predicted, live = (
        recorded.array("mixed", ids, name) for name in (f"{recorded.probes}, all", "live")
    )
    found: dict[str, Any] = {"mixed": rank(predicted.mean(0), live.mean(0))}
    for kind in recorded.kinds:
        found[f"mixed on {kind}"] = rank(*recorded.pair("mixed", kind, "evaluate"))
        found[f"plans on {kind}"] = rank(*recorded.pair("plans", kind, "evaluate"))
    samples = recorded.data["samples"]
    for group in ("mixed", "plans"):
        asked = [each for each in recorded.ids(group) if samples[each]["answers"]]
        live = recorded.array(group, asked, "live, answers").mean(0)
        # Answer rows see little of what they lose; what their whole samples lose tells more.
        for rows, name in (("answer rows", "answers"), ("whole samples", "all")):
            ours = recorded.array(group, asked, f"{recorded.probes}, {name}").mean(0)
            found[f"{group}, answers alone, by {rows}"] = rank(ours, live)
    return found


def rank(predicted: Array, live: Array) -> float:
    return round(float(spearmanr(predicted, live).statistic), 4)


def judged_run(runs: Sequence[Recorded], number: int) -> dict[str, Any]:
    """One run, judged by the others, or where there are none kind by kind of text."""
    recorded, others = runs[number], [*runs[:number], *runs[number + 1 :]]
    calibration = fitted(others) if others else None
    found: dict[str, Any] = {
        **judged(recorded, calibration),
        "cells that would be right by their texts alone": round(by_chance(recorded), 1),
    }
    if calibration:
        found["after rounds"] = printed(recorded, calibration)
    if recorded.data.get("mixed by sample"):  # a run that was cut short may hold plans alone
        found["rank"] = ranks(recorded)
    return found


def read(file: Path, probes: str) -> Recorded:
    return Recorded(json.loads(file.read_text(encoding="utf-8")), probes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recorded", type=Path)
    parser.add_argument("--probes", nargs="+", default=["probes", "fisher"])
    parser.add_argument(
        "--fitted-on", type=Path, nargs="+", default=[], help="other runs, to judge this one by"
    )
    parser.add_argument("--each", action="store_true", help="judge each run by the others")
    parser.add_argument("--out", type=Path, help="write what is printed here too")
    parser.add_argument(
        "--fit", type=Path, help="write the calibration of all runs by the first probes here"
    )
    arguments = parser.parse_args()
    files = [arguments.recorded, *arguments.fitted_on]
    found = {
        f"{files[number].stem}, {probes}": judged_run(
            [read(file, probes) for file in files], number
        )
        for probes in arguments.probes
        for number in range(len(files) if arguments.each else 1)
    }
    print(json.dumps(found, indent=1))
    if arguments.out:
        write_json(arguments.out, found)
    if arguments.fit:
        runs = [arguments.recorded, *arguments.fitted_on]
        calibration = fitted([read(file, arguments.probes[0]) for file in runs])
        write_json(
            arguments.fit, write_calibration(calibration, "benchmarks/predictions_judged.py")
        )


if __name__ == "__main__":
    main()
