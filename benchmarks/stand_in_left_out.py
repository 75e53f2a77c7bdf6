"""Every model in turn left out of the sources: what the other would offer for it, and its band.

    python benchmarks/stand_in_left_out.py FAMILIES FAMILIES [FAMILIES ...] --out FILE
        [--tables TABLES TABLES [TABLES ...]]

FAMILIES are files of ``stand_in_families.py``, one a model, on the same samples: what rules that
decide at run time from the prompt lost live at equal bytes. Each model is the source for each
other one. The source says at every share which rule of a family is best, which of all is offered,
and in which band its loss will lie; the other says what that rule lost, and how many times the
loss of its own best uniform rule that is, which is known afterwards only and picked on the samples
that it is shown for. TABLES, files of ``second_source.py`` in the same order, add all options of
the menu, one for all heads: bands by the source's tables, losses by the other's.

``needed factor`` is the one that a band would need to hold a loss. The factors in
``tuner/band.py`` are set on these very rows, of both directions (``stand_in_factors.py``), so that
what lies inside by them is in-sample. That script also sets them on each direction alone and judges
the other one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from stand_in_families import OFFERED, OPTION
from stand_in_tables import bands

from kvtune.common.estimate import Estimate
from kvtune.common.files import write_json
from kvtune.simulator.quality.tables_file import load_tables
from kvtune.tuner.band import band_of_live, needed_factor
from kvtune.tuner.quality import mean_interval, mean_over_kinds, ratio_interval
from kvtune.tuner.stand_in_rules import GROUPS

WITHIN = 1.1  # times the best uniform rule's loss that what is offered may lose


@dataclass(frozen=True)
class Ran:
    """What a model lost under rules: losses of samples by share, family and policy.

    Args:
        model: its name.
        kinds: of text, one a sample.
        losses: of samples, nats/token, by share and family, then by policy.
    """

    model: str
    kinds: Sequence[str]
    losses: Mapping[tuple[float, str], Mapping[str, Sequence[float]]]

    @classmethod
    def of(cls, file: Path) -> Ran:
        """As ``stand_in_families.py`` wrote it; what was offered there is no family."""
        found = json.loads(file.read_text(encoding="utf-8"))
        losses: dict[tuple[float, str], dict[str, Sequence[float]]] = {}
        for row in found["rows"]:
            if row["family"] not in (OFFERED, OPTION):
                rules = losses.setdefault((row["share"], row["family"]), {})
                rules[row["policy"]] = row["losses"]
        return cls(found["model"], found["kinds"], losses)

    def mean(self, losses: Sequence[float]) -> float:
        """Over kinds of text, nats/token."""
        return mean_over_kinds(losses, self.kinds)

    def best(self, share: float, family: str) -> str:
        """The policy of a family that lost least at a share."""
        rules = self.losses[share, family]
        return min(rules, key=lambda name: self.mean(rules[name]))

    def band(self, share: float, family: str, policy: str) -> Estimate:
        """What a search without the other's weights would print for it."""
        losses = self.losses[share, family][policy]
        labels = np.array(self.kinds)
        by_kind = {k: float(np.array(losses)[labels == k].mean()) for k in set(self.kinds)}
        interval = mean_interval(losses, self.kinds)
        return band_of_live(self.mean(losses), interval, by_kind, family)


def rules(source: Ran, other: Ran) -> Iterator[dict[str, Any]]:
    """Each family's best by the source at each share, its band, and what the other lost."""
    for share, family in source.losses:
        policy = source.best(share, family)
        theirs = other.losses.get((share, family), {})
        if policy in theirs:
            found, loss = source.band(share, family, policy), other.mean(theirs[policy])
            yield {
                "share": share, "family": family, "policy": policy,
                "band": [found.low, found.high], "source": found.value, "loss": loss,
                "inside": found.low <= loss <= found.high,
                "needed factor": needed_factor(found, loss, family),
            }  # fmt: skip


def offered(source: Ran, other: Ran, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each share the rule that lost least on the source, over the other's best uniform one."""
    able = {family for group in GROUPS for family in group}
    for share in dict.fromkeys(row["share"] for row in rows):
        mine = [row for row in rows if row["share"] == share and row["family"] in able]
        best = min(mine, key=lambda row: float(row["source"]))
        uniform = other.losses[share, "uniform"][other.best(share, "uniform")]
        losses = other.losses[share, best["family"]][best["policy"]]
        times, *interval = ratio_interval(losses, uniform, other.kinds)
        yield {**best, "times the best uniform": times, "interval": interval}


def direction(source: Ran, other: Ran) -> dict[str, Any]:
    """A model as the source for another one: all rules, and what would be offered."""
    rows = list(rules(source, other))
    plans = list(offered(source, other, rows))
    return {
        "source": source.model,
        "left out": other.model,
        "rules inside": _share(row["inside"] for row in rows),
        "offered inside": _share(row["inside"] for row in plans),
        "offered within": _share(row["times the best uniform"] <= WITHIN for row in plans),
        "offered": plans,
        "rules": rows,
    }


def _share(found: Iterator[bool]) -> float:
    return float(np.mean(list(found)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("families", type=Path, nargs="+")
    parser.add_argument("--tables", type=Path, nargs="+", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    models = [Ran.of(file) for file in arguments.families]
    tables = [load_tables(file)[0] for file in arguments.tables]
    found = []
    for one, other in permutations(range(len(models)), 2):
        each = direction(models[one], models[other])
        if tables:
            options = bands(tables[one], tables[other])
            each["options inside"] = _share(row["inside"] for row in options)
            each["options"] = options
        found.append(each)
        print({name: value for name, value in each.items() if isinstance(value, (str, float))})
    write_json(arguments.out, {"directions": found})


if __name__ == "__main__":
    main()
