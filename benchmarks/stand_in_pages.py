"""Figures of a stand-in on a model that was no source, for the pages."""

from __future__ import annotations

from collections.abc import Mapping

from page_tables import FAMILIES, HERE, Figures, interval, result, spaced, table

LEFT_OUT = "stand-in-left-out.json"
FACTORS = "stand-in-factors.json"


def stand_in_live() -> str:
    """Options of a model that was no source, live, and their bands."""
    found = result("stand-in-gemma-3-270m.json")
    rows = [
        (row["option"], f"{row['band'][0]:.2g} to {row['band'][1]:.2g}", f"{row['live']:.2g}")
        for row in found["rows"]
    ]
    said = f"{found['inside']} of {len(rows)} lie inside."
    return f"{table(('option', 'band, nats/token', 'live'), rows)}\n\n{said}"


def stand_in_choices() -> str:
    """What a search without weights chooses, over the best of the options."""
    found = result("stand-in-tables-gemma-3-270m.json")
    rows = found["at equal bytes"]
    times = [row["times the best's loss"] for row in rows]
    cells = [f"**{each:.2f}**" if each > 1.1 else f"{each:.2f}" for each in times]
    over = sum(each > 1.1 for each in times)
    said = (
        f"By its own tables {100 * found['inside']:.0f} % of {len(found['options'])} options lie "
        f"inside their bands. **Missed in {over} of {len(rows)}**, worst {max(times):.2f} times."
        if over
        else f"All {len(rows)} are within 1.1."
    )
    heads = [f"{100 * row['share']:g} %" for row in rows]
    return f"{table(heads, [cells])}\n\n{said}"


def stand_in_left_out() -> str:
    """Each model in turn left out of the sources, by factors of the other direction and of both."""
    if not (HERE / "results" / LEFT_OUT).exists():
        return "No run is recorded yet."
    found = result(FACTORS)
    heads = (
        "source", "left out", "factors", "plans offered inside", "rules inside", "options inside",
        "plans offered within 1.1 of its best uniform rule",
    )  # fmt: skip
    within = {each["left out"]: _within(each) for each in result(LEFT_OUT)["directions"]}
    unseen = [_judged(each, each["factors of the other direction"], "the other direction's", within)
              for each in found["by the other direction"]]  # fmt: skip
    seen = [_judged(each, found["factors"], "both", within) for each in found["in-sample"]]
    return f"{table(heads, unseen + seen)}\n\n{_groups(found)}"


def _within(found: Figures) -> str:
    worst = max(row["times the best uniform"] for row in found["offered"])
    return f"{100 * found['offered within']:.0f} %, worst {worst:.2f} times"


def _judged(found: Figures, by: Figures, whose: str, within: Mapping[str, str]) -> tuple[str, ...]:
    inside = (f"{100 * found[f'{name} inside']:.0f} %" for name in ("offered", "rules", "options"))
    names = (found[name].partition("-q4")[0] for name in ("source", "left out"))
    return (*names, f"{whose}: {_listed(by)}", *inside, within[found["left out"]])


def _listed(by: Mapping[str, float]) -> str:
    return ", ".join(f"{FAMILIES.get(name, name)} {by[name]:.2g}" for name in by)


def _groups(found: Figures) -> str:
    """What each group of cells asks for."""
    heads = ("factor of", "cells", "number", f"{100 * found['level']:.0f} % need", "the most")
    rows = [
        (FAMILIES.get(name, name), group, str(each["cells"]), f"{each['factor']:.1f}",
         f"{each['most']:.1f}")
        for name, groups in found["groups"].items()
        for group, each in groups.items()
    ]  # fmt: skip
    return f"{table(heads, rows)}\n\nThe floor: {found['floor']:.1f}."


def stand_in_families() -> str:
    """Rules that decide at run time, on a model that was no source."""
    if not (HERE / "results" / "stand-in-families-gemma-3-270m-h200.json").exists():
        return "No run is recorded yet."
    best = result("stand-in-families-gemma-3-270m-h200.json")["best"]
    found = dict.fromkeys(family for row in best.values() for family in row)
    names = ["offered", *(name for name in found if name != "offered")]

    def cell(row: Figures, family: str) -> str:
        if family not in row:
            return "-"
        found = row[family]
        times, ends = found["times the best uniform"], interval(found["interval"], ".2f")
        return f"{found['loss']:.3g} ({times:.2f} {ends})"

    rows = [(spaced(share), *(cell(row, name) for name in names)) for share, row in best.items()]
    labels = {
        **FAMILIES, "offered": "offered by a search", "option": "best option of the tables"
    }  # fmt: skip
    return table(("KV bytes", *(labels[name] for name in names)), rows)
