"""Figures of predictions beside live runs, for the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from page_tables import result, table

KINDS = {
    "prose": "prose",
    "code": "code",
    "chat": "chat",
    "copy": "long copies",
    "recall": "key-value recall",
    "retrieval": "retrieval",
}
WITHIN = (0.8, 1.25)
ON_SHORT = "all 98 live on short texts"
"""How the ways of a refining run begin for which all policies ran on short texts before it."""
FEW = {
    "predictions-2-h200": "SmolLM2, 1,792 tokens",
    "predictions-middle-smollm2-h200": "SmolLM2, 896 tokens",
    "predictions-short-smollm2-h200": "SmolLM2, 384 tokens",
    "predictions-short-gemma-3-270m-h200": "Gemma-3-270M, 384 tokens",
}
"""Runs with two selection and two or three evaluation texts a kind."""
MORE = {
    "predictions-levels-h200": "SmolLM2, 1,792 tokens",
    "predictions-levels-middle-smollm2-h200": "SmolLM2, 896 tokens",
    "predictions-levels-short-smollm2-h200": "SmolLM2, 384 tokens",
    "predictions-levels-short-gemma-3-270m-h200": "Gemma-3-270M, 384 tokens",
}
"""Runs with four selection and six evaluation texts a kind."""
RUNS = {**FEW, **MORE}
JUDGED = "predictions-judged.json"
_TEXTS = ("4 and 6 texts", "2 and 2 or 3")
LONG, GEMMA, SMALL = (
    "predictions-2-h200", "predictions-short-gemma-3-270m-h200", "predictions-short-smollm2-h200",
)  # fmt: skip


def levels(file: str, name: str, column: str) -> str:
    """Live over predicted by kind of text, raw and calibrated, and how many intervals hold."""
    judged = result(file)[f"{name}, probes"]

    def cell(values: dict[str, float]) -> str:
        marks = (
            f"{value:.2f}" if WITHIN[0] <= value <= WITHIN[1] else f"**{value:.2f}**"
            for value in values.values()
        )
        return " / ".join(marks)

    rows, inside = [], [0, 0]
    for kind, label in KINDS.items():
        raw, fitted = (judged[kind][each] for each in ("raw", "calibrated"))
        for number, each in enumerate((raw, fitted)):
            ratios = each["live over predicted"].values()
            inside[number] += sum(WITHIN[0] <= ratio <= WITHIN[1] for ratio in ratios)
        rows.append((
            label, cell(raw["live over predicted"]), cell(fitted["live over predicted"]),
            f"{100 * fitted['within 80 % interval']:.0f} %",
        ))  # fmt: skip
    count = 4 * len(rows)
    said = f"Within 0.8 to 1.25 are {inside[0]} of {count} raw, {inside[1]} of {count} calibrated."
    return f"{table(('kind', 'raw, 3 / 6 / 12 / 25 %', column, 'within 80 %'), rows)}\n\n{said}"


def rounds(names: dict[str, str]) -> str:
    """What a search prints after live rounds over what is live, by run."""

    def row(name: str, label: str) -> Sequence[str]:
        found = result(JUDGED)[f"{name}, probes"]["after rounds"]
        chosen = found["over kinds, chosen plan"]
        cells = [chosen[share] for share in ("3.0%", "6.0%", "12.0%", "25.0%")]
        marks = [f"{x:.2f}" if WITHIN[0] <= x <= WITHIN[1] else f"**{x:.2f}**" for x in cells]
        reaches = found["80 % interval reaches, times"]
        reach = [reaches[kind] for kind in KINDS]
        holds = found["within 80 % interval"]
        kinds = [held for kind, held in holds.items() if kind in KINDS]
        by = [found[k][s] for k in KINDS for s in ("3.0%", "6.0%", "12.0%", "25.0%")]
        right = sum(WITHIN[0] <= x <= WITHIN[1] for x in by)
        chance = result(JUDGED)[f"{name}, probes"]
        alone = chance["cells that would be right by their texts alone"]
        return (
            label, *marks, f"{reaches['over kinds']:.2f}", f"{100 * holds['over kinds']:.0f} %",
            f"{min(reach):.2f} to {max(reach):.2f}", f"{right} of {len(by)} ({alone:g})",
            f"{100 * sum(kinds) / len(kinds):.0f} %",
        )  # fmt: skip

    head = (
        "live over printed", "3 %", "6 %", "12 %", "25 %", "80 % interval, a factor of", "holds",
        "of single kinds, a factor of", "cells by kind within 0.8 to 1.25 (by their texts alone)",
        "holds by kind",
    )  # fmt: skip
    return table(head, (row(name, label) for name, label in names.items()))


def held_by_kind() -> str:
    """How many plans 80 % intervals hold by kind of text, on each run and on all of a design."""
    judged = result(JUDGED)
    rows = []
    for names, said in ((MORE, "4 and 6 texts"), (FEW, "2 and 2 or 3 texts")):
        for name, label in names.items():
            held = judged[f"{name}, probes"]["after rounds"]["within 80 % interval"]
            mean = sum(held[kind] for kind in KINDS) / len(KINDS)
            each = [f"{100 * held[kind]:.0f} %" for kind in KINDS]
            rows.append((f"{label}, {said}", *each, f"{100 * mean:.0f} %"))
        whole = _of_design(judged, names)
        each = [whole["by kind"][kind] for kind in KINDS]
        marks = [f"{100 * x:.0f} %" if 0.75 <= x <= 0.9 else f"**{100 * x:.0f} %**" for x in each]
        low, high = whole["a right interval would hold, 5 to 95 %"]
        mean = sum(each) / len(each)
        rows.append((
            f"all four, {said} (right intervals: {100 * low:.0f} to {100 * high:.0f} %)",
            *marks, f"{100 * mean:.0f} %",
        ))  # fmt: skip
    return table(("plans within 80 % intervals", *KINDS.values(), "all"), rows)


def _of_design(judged: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """What was found over all runs with as many texts as some."""
    texts = "4 selection and 6" if "predictions-levels-h200" in names else "2 selection and"
    (found,) = (each for name, each in judged.items() if "by kind" in name and texts in name)
    return dict(found)


def ranks() -> str:
    """Rank correlation with live loss on every recorded run."""
    rows = []
    for name, label in RUNS.items():
        found = result(JUDGED)[f"{name}, probes"].get("rank")
        if found is None:
            continue
        mixed, plans = (
            [found[f"{group} on {kind}"] for kind in KINDS] for group in ("mixed", "plans")
        )
        rows.append((
            label, f"{found['mixed']:.3f}", f"{min(mixed):.3f} to {max(mixed):.3f}",
            f"{found['mixed, answers alone, by whole samples']:.3f}",
            f"{min(plans):.3f} to {max(plans):.3f}",
        ))  # fmt: skip
    head = (
        "Spearman with live loss", "mixed policies, all kinds (0.985 asked)",
        "on single kinds (0.95)", "answers alone (0.9)", "tuned plans, single kinds",
    )  # fmt: skip
    return table(head, rows)


def ways() -> str:
    """Rank correlations of every way to predict, on every recorded run."""
    found = result("ranking-ways.json")
    rows = []
    for rows_of in ("all rows", "answer rows"):
        names = list(dict.fromkeys(name for run in found.values() for name in run[rows_of]))
        for name in names:
            cells = []
            for run in found.values():
                each = run[rows_of].get(name)
                cells.append(
                    "-" if each is None else f"{each['all']:.3f} / {each['answers left']:.3f}"
                )
            rows.append((f"{rows_of}: {name}", *cells))
    heads = [
        f"{run['run']} ({run['policies']}; {run['that leave answers']})" for run in found.values()
    ]
    return table(("Spearman, all policies / those that leave a third of the answers", *heads), rows)


def ways_to_level() -> str:
    """Ways to learn levels from live rounds: cells that are right, and how far printed lies off."""
    runs = result("levels-ways.json")
    cells, chance = (sum(run[what] for run in runs.values()) for what in ("cells", "by chance"))

    def row(name: str) -> Sequence[str]:
        each = [run["ways"][name] for run in runs.values()]
        right = sum(one["cells within 0.8 to 1.25"] for one in each)
        off = (sum(one[what] for one in each) / len(each) for what in ("by kind", "over kinds"))
        return name, f"{right} of {cells}", *(f"{value:.3f}" for value in off)

    head = (
        "what the rounds are believed",
        f"cells by kind within 0.8 to 1.25 ({chance:.1f} by chance)",
        "off by, single kinds", "over kinds",
    )  # fmt: skip
    return table(head, map(row, next(iter(runs.values()))["ways"]))


def other_constants() -> str:
    """Plans within 80 % intervals where one constant of the law is another."""
    rows = []
    for each in result("levels-constants.json"):
        cells = [_held_by_design(each["runs"], names) for names in (MORE, FEW)]
        name = f"`{each['changed']}` {each['to']:g}" if "changed" in each else "as shipped"
        rows.append((name, *(cell for pair in zip(*cells, strict=True) for cell in pair)))
    over, single = "over all kinds", "single kinds (how many kinds have 75 to 90 %)"
    head = [
        f"{what}, {texts}"
        for what in (over, single, "over all kinds a factor of")
        for texts in _TEXTS
    ]
    return table(("constants", *head), rows)


def _held_by_design(runs: dict[str, Any], names: dict[str, str]) -> tuple[str, str, str]:
    """Shares of plans held over all kinds and on single ones, and how wide intervals are."""
    mine = [runs[f"{name}.json"] for name in names]
    held = [run["within 80 % interval"] for run in mine]
    over = [run["over kinds"] for run in held]
    kinds = [sum(run[kind] for run in held) / len(held) for kind in KINDS]
    right = sum(0.75 <= share <= 0.9 for share in kinds)
    reach = [run["80 % interval reaches, times"]["over kinds"] for run in mine]
    return (
        f"{100 * sum(over) / len(over):.0f} % ({100 * min(over):.0f} to {100 * max(over):.0f})",
        f"{100 * sum(kinds) / len(kinds):.0f} % ({right} of 6)",
        f"{min(reach):.2f} to {max(reach):.2f}",
    )


def refined() -> str:
    """Ranks of mixed policies after a refining run, on texts that it has not seen."""
    rows, recorded = [], result("ranking-refined-h200.json")
    for name, found in recorded["ways"].items():
        whole, runs, short = found.get("ranks", found), found.get("live runs", 0), 0
        if found.get("by", "").startswith(ON_SHORT):
            short = recorded["policies"]
            name = f"{found['by']}, {short + runs} live runs"  # the file's name has the later ones
        kinds = [whole[kind]["value"] for kind in KINDS if kind in whole]
        unseen = found.get("ranks of policies that did not run", {}).get("all")
        rows.append((
            name, _rank(whole["all"]), f"{min(kinds):.3f} to {max(kinds):.3f}",
            _rank(whole["answers"]) if "answers" in whole else "-",
            _rank(unseen) if unseen and runs and not short else "-",
        ))  # fmt: skip
    head = (
        "Spearman with live loss", "all kinds (0.985 asked)", "single kinds (0.95)",
        "answers (0.9)", "policies that did not run",
    )  # fmt: skip
    return table(head, rows)


def _rank(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
