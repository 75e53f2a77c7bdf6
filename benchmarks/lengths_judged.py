"""Loss at other prompt lengths: what it can be foretold from, fitted and tested on recorded runs.

    python benchmarks/lengths_judged.py --out benchmarks/results/lengths-judged.json

Reads live runs that ``lengths.py`` has recorded. The loss at another length, over that where a plan
was found, is fitted as a power of the ratio of prompt tokens: one power for longer prompts, and for
shorter ones with floors a power that falls with the logarithm of the tokens that a plan holds. The
interval is made of errors at lengths that were left out of the fit. It is tested with each length,
share or run left out of both in turn: which part of the plans it then holds, where 80 % are meant.
Beside it stand other functions, with the errors that they leave at what was left out; the interval
is also tried on losses of one text a kind, alone and as wide at each end as the 95 % interval of
these losses, where that is the wider.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.traces.samples import KINDS
from kvtune.tuner.quality import estimate

RESULTS = Path(__file__).parent / "results"
RECORDED = (
    "lengths-before-h200.json", "lengths-floors-cpu.json", "lengths-floors-h200.json",
    "lengths-floors-2-h200.json",
)  # fmt: skip
OBSERVED = 128
"""Tokens of a sample behind its prompt, where a run does not say how many."""
NORMAL_80 = 1.2816
"""Half of the interval that holds 80 % of a normal law, in its standard deviations."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """A plan's live loss at another length over that where it was found.

    Args:
        run: device and seed: runs of one seed on one device read the same texts, and are left out
            together.
        home: prompt tokens where the plan was found.
        at: prompt tokens where it ran.
        share: of the bf16 bytes.
        there: live loss of each text there, nats/token, ``[n]``.
        found: live loss of each text where it was found, likewise.
    """

    run: str
    home: int
    at: int
    share: float
    there: tuple[float, ...]
    found: tuple[float, ...]

    @property
    def lengths(self) -> float:
        """Logarithm of the ratio of prompt tokens."""
        return math.log(self.at / self.home)

    @property
    def kept(self) -> float:
        """How many uncompressed tokens take the bytes that the plan holds where it was found."""
        return self.share * self.home

    @property
    def losses(self) -> float:
        """Logarithm of the ratio of losses."""
        return math.log(np.mean(self.there) / np.mean(self.found))


def ratios(path: Path, *, longer: bool, floors: bool) -> list[Ratio]:
    """The ratios of a recorded run, at longer or at shorter lengths, with or without floors."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    said = re.findall(r"C=(\d+)", recorded.get("workload", ""))
    observed = int(said[0]) if said else OBSERVED
    seed = re.findall(r"seed (\d+)", recorded.get("workload", "")) or ["0"]
    run = f"{recorded.get('device', 'cpu')}, seed {seed[0]}"
    live = {
        (row["found at"], int(at), row["share"], row.get("floors", False)): tuple(row["live"])
        for at, rows in recorded["losses at"].items()
        for row in rows
    }
    return [
        Ratio(run, home - observed, at - observed, share, losses, live[home, home, share, False])
        for (home, at, share, floored), losses in live.items()
        if at != home and (at > home) == longer and floored == floors
    ]


Terms = Callable[[Ratio], tuple[float, ...]]
"""What a linear function of the logarithm of losses is made of, for one plan."""

FUNCTIONS: dict[str, Terms] = {
    "nothing changes": lambda row: (),
    "a constant": lambda row: (1.0,),
    "a power of the length": lambda row: (row.lengths,),
    "a power that depends on the share": lambda row: (
        row.lengths, row.lengths * math.log(row.share),
    ),
    "a power, and one of the share": lambda row: (row.lengths, math.log(row.share)),
    "a power that depends on the tokens kept": lambda row: (
        row.lengths, row.lengths * math.log(row.kept),
    ),
}  # fmt: skip
ALONE, BY_KEPT = "a power of the length", "a power that depends on the tokens kept"


def fitted(rows: Sequence[Ratio], terms: Terms) -> Floats:
    """Least squares of a function; of powers through the origin: at the same length a plan loses
    the same."""
    design = np.array([terms(row) for row in rows]).reshape(len(rows), -1)
    return np.asarray(np.linalg.lstsq(design, _both(rows)[1], rcond=None)[0])


def errors_of(rows: Sequence[Ratio], terms: Terms, weights: Floats) -> list[float]:
    """What a function leaves of each plan's logarithm."""
    return [row.losses - float(np.dot(terms(row), weights)) for row in rows]


def errors_without(
    rows: Sequence[Ratio], terms: Terms, group: Callable[[Ratio], Any]
) -> list[float]:
    """What a function fitted on all other groups leaves of each group."""
    found: list[float] = []
    for left in {group(row) for row in rows}:
        others = [row for row in rows if group(row) != left]
        if others:
            own = [row for row in rows if group(row) == left]
            found += errors_of(own, terms, fitted(others, terms))
    return found


def reach_of(rows: Sequence[Ratio], terms: Terms) -> float:
    """Half of the 80 % interval: from errors with the length left out that a plan was found at,
    or ran at."""
    errors = errors_without(rows, terms, _home) + errors_without(rows, terms, _at)
    return NORMAL_80 * float(np.sqrt(np.mean(np.square(errors))))


def coverage(rows: Sequence[Ratio], terms: Terms, group: Callable[[Ratio], Any]) -> float | None:
    """Share of the plans that the interval holds which the other groups give; None of one group."""
    held: list[bool] = []
    for left in {group(row) for row in rows}:
        others = [row for row in rows if group(row) != left]
        if len({group(row) for row in others}) < 1 or len({_home(r) for r in others}) < 2:
            return None
        weights, reach = fitted(others, terms), reach_of(others, terms)
        own = [row for row in rows if group(row) == left]
        held += [abs(error) <= reach for error in errors_of(own, terms, weights)]
    return round(float(np.mean(held)), 3)


def one_text_a_kind(rows: Sequence[Ratio], terms: Terms, *, widened: bool) -> float | None:
    """Share held where the loss at home is that of every second text, as a small search has it.

    Of runs with two texts of each of three kinds; None where there are none.

    Args:
        rows: plans of one direction.
        terms: of the function.
        widened: each end is that of the loss's own 95 % interval where this is the wider.
    """
    weights, reach = fitted(rows, terms), reach_of(rows, terms)
    held = []
    for row in (row for row in rows if len(row.found) == 6):
        middle = float(np.dot(terms(row), weights))
        for first in (0, 1):
            low, high, mean = _seen(row.found[first::2])
            below, above = (
                (min(math.exp(-reach) * mean, low), max(math.exp(reach) * mean, high))
                if widened
                else (math.exp(-reach) * mean, math.exp(reach) * mean)
            )
            held.append(below <= np.mean(row.there) / math.exp(middle) <= above)
    return round(float(np.mean(held)), 3) if held else None


def _seen(losses: Sequence[float]) -> tuple[float, float, float]:
    """Low and high end of what a search says of these losses, one of each kind, and their mean."""
    said = estimate(losses, KINDS[: len(losses)], "live")
    return said.low, said.high, said.value


GROUPS: dict[str, Callable[[Ratio], Any]] = {
    "length where found": lambda row: row.home,
    "length where run": lambda row: row.at,
    "share": lambda row: row.share,
    "run": lambda row: row.run,
}
_home, _at = GROUPS["length where found"], GROUPS["length where run"]


def _both(rows: Sequence[Ratio]) -> tuple[Floats, Floats]:
    return np.array([r.lengths for r in rows]), np.array([r.losses for r in rows])


def left_error(rows: Sequence[Ratio], terms: Terms, group: Callable[[Ratio], Any]) -> float | None:
    """Root mean square error of a linear function at groups that were left out; None of one."""
    errors = errors_without(rows, terms, group)
    return round(float(np.sqrt(np.mean(np.square(errors)))), 3) if errors else None


def judged(rows: Sequence[Ratio], function: str) -> dict[str, Any]:
    """The fit of one direction by one of the functions, and its tests."""
    x, y = _both(rows)
    terms = FUNCTIONS[function]
    kept = [row.kept for row in rows]
    return {
        "plans": len(rows),
        "live over live where found": {
            "least": round(float(np.exp(y.min())), 3),
            "median": round(float(np.exp(np.median(y))), 3),
            "most": round(float(np.exp(y.max())), 3),
        },
        "function": function,
        "weights": [round(float(weight), 4) for weight in fitted(rows, terms)],
        "tokens kept": [round(min(kept)), round(max(kept))],
        "reach": round(reach_of(rows, terms), 3),
        "most": round(float(np.exp(np.abs(x).max())), 3),
        "held with one left out": {name: coverage(rows, terms, of) for name, of in GROUPS.items()},
        "held with one text a kind where found": one_text_a_kind(rows, terms, widened=False),
        "held so, and as wide as its interval": one_text_a_kind(rows, terms, widened=True),
        "error at what is left out": {
            name: {of: left_error(rows, other, group) for of, group in GROUPS.items()}
            for name, other in FUNCTIONS.items()
        },
    }


def main() -> None:
    """Judge all recorded runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recorded", nargs="*", type=Path, help="left out: those of the results")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    files = arguments.recorded or [RESULTS / name for name in RECORDED]
    directions = {
        "longer": (True, False, ALONE),
        "shorter, with floors": (False, True, BY_KEPT),
        "shorter, shares alone": (False, False, ALONE),
    }
    found: dict[str, Any] = {"recorded": [path.name for path in files]}
    for name, (longer, floors, function) in directions.items():
        rows = [row for path in files for row in ratios(path, longer=longer, floors=floors)]
        if rows:
            found[name] = judged(rows, function)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
