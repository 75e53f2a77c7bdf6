"""Judges what ``predictions.py`` recorded, and fits the calibration that the package ships.

    cd benchmarks/results && python ../predictions_judged.py \
        predictions-2-h200.json --fitted-on predictions-{levels,short,middle}*-h200.json \
        --probes probes --each --out predictions-judged.json --fit ../../tuner/data/calibration.json

Every figure about a kind of text is of a calibration that was fitted on the other kinds alone, or,
with ``--fitted-on RECORDED...``, on runs of other models or other lengths: runs of one model at one
length share all texts, and none is judged by another; those of other lengths and models share some,
since all are of one seed. ``after rounds`` is what a search prints where
the weights are at hand: the four plans of a share run on the selection samples, their level moves
the calibration, and the plan that loses least there is printed; it is judged on the evaluation
samples, on each kind of text and over all of them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, spearmanr

from kvtune.common.files import write_json
from kvtune.simulator.quality.calibration import (
    ASKED,
    AfterRounds,
    Calibration,
    Curve,
    Regime,
    conformal,
    fit_curve,
    fit_left_out,
    regime_of,
    thinned,
    write_calibration,
)
from kvtune.simulator.quality.levels import Seen, levels_of, usual_spread
from kvtune.tuner.quality import mean_over_kinds

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
    model: str = "smollm2-135m"

    @property
    def setting(self) -> tuple[str, int]:
        """The model and the prompt's length: runs that have these in common share texts."""
        return self.model, self.prompt_tokens

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
    """The curve of some settings: of several, one is left out to see how far others lie.

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
    settings = by_setting(runs)
    curves: dict[Regime, Curve] = {
        regime: curve_of([joined(plans_of(run, kinds_of(run, regime)) for run in some)
                          for some in settings])
        for regime in EVICTING
    }  # fmt: skip
    if stored := [pairs for some in settings if (pairs := joined(map(quantised, some))).live]:
        curves = {"quantising": curve_of(stored), **curves}
    count = sum(len(run.data["plans"]) * len(run.ids("plans")) for run in runs)
    return Calibration(curves, seen_after_rounds(runs), runs=count)


def by_setting(runs: Sequence[Recorded]) -> list[list[Recorded]]:
    """The runs of each model and length."""
    found: dict[tuple[str, int], list[Recorded]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    return list(found.values())


def joined(runs: Iterable[Pairs]) -> Pairs:
    """Several runs' as one."""
    found = Pairs()
    for each in runs:
        found.predicted += each.predicted
        found.live += each.live
        found.texts += each.texts
    return found


def kinds_of(recorded: Recorded, regime: Regime) -> list[str]:
    """The kinds of text on which policies that evict follow a regime's curve."""
    return [kind for kind in recorded.kinds if regime_of(kind, evicts=True) == regime]


def seen_after_rounds(runs: Sequence[Recorded]) -> AfterRounds:
    """How far plans lay off after rounds, each run by curves and the spread of other settings."""
    sizes: list[float] = []
    for run in runs:
        if others := left_when_judging(run, runs):
            by = Calibration(believed_curves(others), AfterRounds(spread_of(others)))
            for rows in plans_by_share(run):
                for ratios, deviations in after_rounds(run, by, rows).by_kind.values():
                    sizes += np.abs(np.log(ratios) / deviations).tolist()
    return AfterRounds(spread_of(runs), thinned(sizes))


def left_when_judging(run: Recorded, runs: Sequence[Recorded]) -> list[Recorded]:
    """The runs that share no text with one."""
    return [other for other in runs if other.setting != run.setting]


def spread_of(runs: Sequence[Recorded]) -> float:
    """What texts of a kind differ by on some runs, in logarithms of live over predicted."""
    groups = [
        [seen_of(run, Calibration(), split, int(plan)) for plan in rows]
        for run in runs
        for rows in plans_by_share(run)
        for split in SPLITS
    ]
    return usual_spread(groups)


def seen_of(recorded: Recorded, by: Calibration, split: str, plan: int) -> Seen:
    """One plan on the samples of a split, as a search sees what it runs."""
    ids = recorded.ids("plans", split=split)
    kinds = tuple(recorded.data["samples"][each]["kind"] for each in ids)
    names = f"{recorded.probes}, all", "live"
    predicted, live = (recorded.array("plans", ids, name)[:, plan] for name in names)
    return Seen(kinds, by.applied(predicted, kinds, evicts=True), live)


def believed_curves(runs: Sequence[Recorded]) -> dict[Regime, Curve]:
    """What runs show of each regime of evicting, as far as it is believed of another."""
    found: dict[Regime, Curve] = {}
    for regime in EVICTING:
        each = joined(plans_of(run, kinds_of(run, regime)) for run in runs)
        found[regime] = fit_curve(each.predicted, each.live).believed(BELIEVED)
    return found


def plans_by_share(recorded: Recorded) -> list[NDArray[np.int64]]:
    """Which plans belong together: those of one share of the bytes."""
    return [np.flatnonzero(recorded.shares == share) for share in np.unique(recorded.shares)]


@dataclass(frozen=True)
class Rounds:
    """Plans of one share on evaluation samples, when they have run on the selection samples.

    Args:
        by_kind: live over printed and the deviation that is expected of its logarithm, ``[plans]``
            each, of each kind of text.
        over_kinds: the same of the mean over kinds.
        by_curves: live over what was printed before the rounds, of the mean over kinds.
        best: which of the plans lost least on the selection samples.
    """

    by_kind: dict[str, tuple[Array, Array]]
    over_kinds: tuple[Array, Array]
    by_curves: Array
    best: int


def after_rounds(recorded: Recorded, calibration: Calibration, rows: NDArray[np.int64]) -> Rounds:
    """What rounds with the plans of one share come to."""
    seen = [seen_of(recorded, calibration, "select", int(plan)) for plan in rows]
    levels = levels_of(seen, calibration.after_rounds.spread)
    assert levels is not None
    levelled = calibration.levelled(levels, len(rows))
    before, after = (
        [means_of(recorded, by, "evaluate", int(plan)) for plan in rows]
        for by in (calibration, levelled)
    )
    live = [lives for _, lives in after]
    texts = {kind: len(recorded.ids("plans", kind, "evaluate")) for kind in recorded.kinds}

    def judged_on(kinds: Sequence[str]) -> tuple[Array, Array]:
        printed = [{kind: means[kind] for kind in kinds} for means, _ in after]
        ratios = [mean_of(y, kinds) / mean_of(x, kinds) for x, y in zip(printed, live, strict=True)]
        return np.array(ratios), np.array([levels.deviation(each, texts) for each in printed])

    return Rounds(
        {kind: judged_on([kind]) for kind in recorded.kinds},
        judged_on(recorded.kinds),
        np.array([mean_of(y, recorded.kinds) / mean_of(x, recorded.kinds) for x, y in before]),
        int(np.argmin([mean_over_kinds(one.live, one.kinds) for one in seen])),
    )


def means_of(
    recorded: Recorded, by: Calibration, split: str, plan: int
) -> tuple[dict[str, float], dict[str, float]]:
    """One plan's calibrated and live losses by kind of text, nats/token."""
    seen = seen_of(recorded, by, split, plan)
    pairs = {kind: seen.of(kind) for kind in recorded.kinds}
    return (
        {kind: float(x.mean()) for kind, (x, _) in pairs.items()},
        {kind: float(y.mean()) for kind, (_, y) in pairs.items()},
    )


def mean_of(losses: Mapping[str, float], kinds: Sequence[str]) -> float:
    """The mean over some kinds."""
    return float(np.mean([losses[kind] for kind in kinds]))


def printed(recorded: Recorded, other: Calibration) -> dict[str, Any]:
    """What a search prints after live rounds, held against live runs on evaluation samples."""
    names = "over kinds, chosen plan", "the same by the curves alone", "over kinds, median"
    found: dict[str, Any] = {name: {} for name in (*names, *recorded.kinds)}
    off: dict[str, list[Array]] = {name: [] for name in ("over kinds", *recorded.kinds)}
    wide: dict[str, list[float]] = {name: [] for name in off}
    times = conformal(other.after_rounds.sizes, 0.8)
    for rows in plans_by_share(recorded):
        rounds = after_rounds(recorded, other, rows)
        everywhere = {"over kinds": rounds.over_kinds, **rounds.by_kind}
        chosen = float(rounds.over_kinds[0][rounds.best])
        two = chosen, float(rounds.by_curves[rounds.best])
        medians = {name: float(np.median(ratios)) for name, (ratios, _) in everywhere.items()}
        medians[names[2]] = medians.pop("over kinds")
        for name, ratio in {**dict(zip(names, two, strict=False)), **medians}.items():
            found[name][f"{recorded.shares[rows[0]]:.1%}"] = round(ratio, 3)
        for name, (ratios, deviations) in everywhere.items():
            off[name].append(np.log(ratios) / deviations)
            wide[name] += np.exp(times * deviations).tolist()
    found["within 80 % interval"] = {
        name: round(float(np.mean(np.abs(np.concatenate(each)) <= times)), 3)
        for name, each in off.items()
    }
    alone = {name: [float(np.median(each)) for each in off[name]] for name in recorded.kinds}
    found["shares of a kind err alike"] = alike(np.array(list(alone.values())))
    found["80 % interval reaches, times"] = {
        name: round(float(np.median(each)), 2) for name, each in wide.items()
    }
    return found


def alike(off: Array) -> float:
    """Correlation of what neighbouring shares of the bytes are off by, ``[kinds, shares]``."""
    return round(float((off[:, 1:] * off[:, :-1]).mean() / (off**2).mean()), 3)


def held_by_chance(shares: int, runs: int, correlation: float) -> Array:
    """Which share of a kind's plans right 80 % intervals hold, ``[draws]``.

    Plans of one share of the bytes are nearly one plan and count as one; neighbouring shares, which
    run on the same texts, err alike.
    """
    rng, off = np.random.default_rng(0), []
    for number in range(shares):
        fresh = rng.normal(size=(20_000, runs))
        kept = correlation if number else 0.0
        off.append(kept * (off[-1] if number else 0.0) + np.sqrt(1 - kept**2) * fresh)
    return np.asarray((np.abs(off) <= norm.ppf(0.9)).mean((0, 2)))


def held_of_each_kind(found: Mapping[str, Any]) -> dict[str, Any]:
    """Plans within 80 % intervals after rounds by kind of text, all runs of one design together."""
    each = [run["after rounds"] for run in found.values()]
    kinds = [kind for kind in each[0]["within 80 % interval"] if kind != "over kinds"]
    shares, runs = len(each[0][kinds[0]]), len(each)
    correlation = float(np.mean([run["shares of a kind err alike"] for run in each]))
    one, all_ = (held_by_chance(shares, count, correlation) for count in (1, runs))
    within = ((all_ >= 0.75) & (all_ <= 0.9)).mean()
    return {
        "by kind": {
            kind: round(float(np.mean([run["within 80 % interval"][kind] for run in each])), 3)
            for kind in kinds
        },
        "shares of a kind err alike": round(correlation, 3),
        "a right interval would hold, 5 to 95 %": np.percentile(all_, [5, 95]).round(3).tolist(),
        "of a kind on one run": np.percentile(one, [5, 95]).round(3).tolist(),
        "all kinds within 75 to 90 % by right intervals": round(float(within ** len(kinds)), 3),
    }


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
    reach = curve.reach(0.8)
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
    recorded = runs[number]
    others = left_when_judging(recorded, runs)
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
    """A recorded run; those that do not say their model have it in their name."""
    data = json.loads(file.read_text(encoding="utf-8"))
    gemma = "gemma-3-270m"
    return Recorded(
        data, probes, data.get("model", gemma if gemma in file.stem else Recorded.model)
    )


def designs(files: Sequence[Path]) -> dict[str, set[str]]:
    """Which files hold as many shares of the bytes and texts a kind as others."""
    found: dict[str, set[str]] = {}
    for file in files:
        run = read(file, "probes")
        few, many = (len(run.ids("plans", run.kinds[0], split)) for split in SPLITS)
        shares = len(np.unique(run.shares))
        name = f"{shares} shares, {few} selection and {many} evaluation texts a kind"
        found.setdefault(name, set()).add(file.stem)
    return found


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
    for texts, named in designs(files).items():
        mine = {name: found[name] for name in found if name.rsplit(",", 1)[0] in named}
        if len(mine) > 1 and all("after rounds" in run for run in mine.values()):
            found[f"by kind, {texts}"] = held_of_each_kind(mine)
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
