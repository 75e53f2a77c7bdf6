"""How many times beyond its source a model may lie that is none: the factors of stand-ins' bands.

    python benchmarks/stand_in_factors.py LEFT_OUT LIVE FAMILIES --out FILE

A cell is a model, a rule or an option, and a share: the factor that the band of the other model,
its source, needs to hold what it lost. LEFT_OUT (``stand_in_left_out.py``) has both directions
between two models on prompts of one length, LIVE (``stand_in.py``) options that ran live on shorter
prompts than the packaged source's. FAMILIES (``stand_in_families.py``) is held against the packaged
source's curves, which are of longer prompts, in both directions.

A factor reaches as far down as up, since models are exchangeable. It is the quantile of the cells
with the finite-sample correction of split conformal prediction (the ``ceil((n + 1) level)``-th of
``n``), in the group of cells that needs most: groups differ in size, and a small one would drown.
Cells of one pair of models are no independent draws, so that no factor is below a floor. It is how
far a third model would lie from the first in 80 % of the cases (what is asked of plans offered),
were models' levels normal in logarithms, by how far the two lie apart in the mean.

Both directions set the factors and are judged by them, which is in-sample. So each direction also
sets factors alone, without a floor, for the other one to be judged by.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stand_in_left_out import Ran

from kvtune.common.files import write_json
from kvtune.tuner.band import FACTOR_BY_FAMILY, needed_factor
from kvtune.tuner.curves import loss_at
from kvtune.tuner.source_models import packaged_tables

LEVEL = 0.9  # of cells: more than the plans' 80 %, since those of one pair of models go together
ASKED = 0.8  # of the plans offered
OTHERS = "others"
Cells = Mapping[str, Sequence[float]]
"""Factors that cells need, by group."""


def quantile(cells: Sequence[float], level: float = LEVEL) -> float:
    """With the finite-sample correction; the largest where there are too few for the level."""
    rank = math.ceil((len(cells) + 1) * level)
    return float(sorted(cells)[min(rank, len(cells)) - 1])


def times_third(level: float = ASKED) -> float:
    """Times the distance of two models that a third lies within from the first, in logarithms.

    Of three equal normal draws the ratio of two differences that share one is a Cauchy variable
    around 1/2 with scale sqrt(3)/2.
    """
    from scipy.optimize import brentq
    from scipy.stats import cauchy

    ratio = cauchy(0.5, math.sqrt(0.75))
    return float(brentq(lambda x: ratio.cdf(x) - ratio.cdf(-x) - level, 0, 100))


def floor(rows: Sequence[Mapping[str, Any]]) -> float:
    """The least factor, by how far two models lie apart in the mean over rules and shares."""
    apart = np.mean([math.log(row["loss"] / row["source"]) for row in rows])
    return math.exp(times_third() * abs(float(apart)))


def group_of(family: str) -> str:
    """Families with a factor of their own, and all others."""
    return family if family in FACTOR_BY_FAMILY else OTHERS


def is_its_own(family: str, policy: str) -> bool:
    """Whether a family does something of its own; what keeps all tokens is the uniform rule."""
    return family == "uniform" or policy.split()[1] != "full"


def same_length(direction: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Cells of a direction of ``stand_in_left_out.py``, by factor and group."""
    found: dict[str, dict[str, list[float]]] = {OTHERS: {}}
    for row in direction["rules"]:
        if is_its_own(row["family"], row["policy"]):
            groups = found.setdefault(group_of(row["family"]), {})
            groups.setdefault("rules, same length", []).append(row["needed factor"])
    found[OTHERS]["options, same length"] = [row["needed factor"] for row in direction["options"]]
    return found


def other_length(ran: Ran) -> Iterator[tuple[str, float]]:
    """Cells of a model and the packaged source's curves, each the other's source, by factor."""
    curves = packaged_tables()[1]["baselines"]
    for share, family in ran.losses:
        policy = ran.best(share, family)
        if family in curves and is_its_own(family, policy):
            loss = ran.mean(ran.losses[share, family][policy])
            source, back = loss_at(curves[family], share, family), ran.band(share, family, policy)
            yield group_of(family), needed_factor(source, loss, family)
            yield group_of(family), needed_factor(back, source.value, family)


def factors(cells: Mapping[str, Cells], least: float = 1.0) -> dict[str, float]:
    """Of every factor the quantile of the group of cells that needs most."""
    return {
        name: max(least, *(quantile(group) for group in groups.values()))
        for name, groups in cells.items()
    }


def judged(direction: Mapping[str, Any], by: Mapping[str, float]) -> dict[str, Any]:
    """Shares of a direction's plans offered, rules and options that such factors hold."""

    def inside(rows: Sequence[Mapping[str, Any]]) -> float:
        held = [row["needed factor"] <= by[group_of(row.get("family", OTHERS))] for row in rows]
        return float(np.mean(held))

    names = ("offered", "rules", "options")
    return {f"{name} inside": inside(direction[name]) for name in names}


def mirrored(directions: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each direction by factors that were set on the other one alone, and mirrored."""
    for judge, unseen in (directions, directions[::-1]):
        by = factors(same_length(judge))
        names = {name: unseen[name] for name in ("source", "left out")}
        yield {**names, "factors of the other direction": by, **judged(unseen, by)}


def all_cells(
    directions: Sequence[Mapping[str, Any]], live: Mapping[str, Any], ran: Ran
) -> dict[str, dict[str, list[float]]]:
    """Of both directions and both lengths, by factor and group."""
    found: dict[str, dict[str, list[float]]] = {}
    for direction in directions:
        for name, groups in same_length(direction).items():
            for group, cells in groups.items():
                found.setdefault(name, {}).setdefault(group, []).extend(cells)
    for name, cell in other_length(ran):
        found[name].setdefault("rules, other length", []).append(cell)
    found[OTHERS]["options live, other length"] = [row["needed factor"] for row in live["rows"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("left_out", "live", "families"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    left_out, live = (
        json.loads(file.read_text(encoding="utf-8"))
        for file in (arguments.left_out, arguments.live)
    )
    directions = left_out["directions"]
    least = floor(
        [row for row in directions[0]["rules"] if is_its_own(row["family"], row["policy"])]
    )
    cells = all_cells(directions, live, Ran.of(arguments.families))
    by = factors(cells, least)
    groups = {
        name: {
            group: {"cells": len(each), "factor": quantile(each), "most": max(each)}
            for group, each in parts.items()
        }
        for name, parts in cells.items()
    }
    found = {
        "level": LEVEL,
        "floor": least,
        "factors": by,
        "groups": groups,
        "in-sample": [
            {"source": each["source"], "left out": each["left out"], **judged(each, by)}
            for each in directions
        ],
        "by the other direction": list(mirrored(directions)),
    }
    write_json(arguments.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
