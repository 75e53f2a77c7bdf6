"""Figures of plans at other prompt lengths than they were found at, for the pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from lengths_judged import RESULTS, Ratio, ratios
from page_tables import Figures, result, table

JUDGED = "lengths-judged.json"
_DIRECTIONS = ("longer", "shorter, with floors", "shorter, shares alone")


def carried() -> str:
    """Losses on shorter prompts over those where a plan was found, with and without floors."""
    rows = [row for name in result(JUDGED)["recorded"] for row in _shorter(name)]
    head = "file", "found at", "run at", "shares alone, 3 / 6 / 12 / 25 %", "with floors"
    return table(head, rows)


def _shorter(name: str) -> Iterator[Sequence[str]]:
    alone = ratios(RESULTS / name, longer=False, floors=False)
    floors = {_pair(row): row for row in ratios(RESULTS / name, longer=False, floors=True)}
    for (home, at), group in groupby(sorted(alone, key=_pair), key=lambda row: _pair(row)[:2]):
        each = list(group)
        floored = [floors[_pair(row)] for row in each if _pair(row) in floors]
        yield f"`{name}`", f"{home:,}", f"{at:,}", _times(each), _times(floored)


def _pair(row: Ratio) -> tuple[int, int, float]:
    return row.home, row.at, row.share


def _times(rows: Sequence[Ratio]) -> str:
    return " / ".join(f"{math.exp(row.losses):.2g}" for row in rows) or "-"


def fitted() -> str:
    """What was fitted in each direction, and how often its interval holds what was left out."""

    def row(name: str) -> Sequence[str]:
        found: Figures = result(JUDGED)[name]
        seen, held = found["live over live where found"], found["held with one left out"]
        return (
            name,
            str(found["plans"]),
            f"{seen['least']:.2g} to {seen['most']:.2g}, median {seen['median']:.2g}",
            _power(found),
            *(_percent(held[group]) for group in held),
            _percent(found["held with one text a kind where found"]),
            _percent(found["held so, and as wide as its interval"]),
        )

    directions = [name for name in _DIRECTIONS if name in result(JUDGED)]
    groups = list(result(JUDGED)[directions[0]]["held with one left out"])
    head = "prompts", "plans", "live over live where found", "power of the length"
    columns = (
        *head,
        *(f"held, {group} left out" for group in groups),
        "held, one text a kind",
        "the same, widened",
    )
    return table(columns, map(row, directions))


def _power(found: Figures) -> str:
    """Of the ratio of lengths; where it depends on the tokens kept, k."""
    first, *slope = found["weights"]
    return f"{first:.2g}" + "".join(f" {each:+.2g} ln k" for each in slope)


def functions() -> str:
    """Errors that functions of length and share leave at what was left out of their fit."""
    errors = {name: result(JUDGED)[name]["error at what is left out"] for name in _DIRECTIONS[:2]}
    groups = list(next(iter(errors["longer"].values())))

    def row(function: str) -> Sequence[str]:
        each = [errors[name][function] for name in errors]
        said = (" / ".join(_error(found[group]) for found in each) for group in groups)
        return function, *said

    return table(
        ("function", *(f"{group} left out" for group in groups)), map(row, errors["longer"])
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.2f}"
