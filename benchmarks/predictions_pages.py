"""Figures of predictions beside live runs, for the pages."""

from __future__ import annotations

from collections.abc import Sequence

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
RUNS = {
    "predictions-2-h200": "SmolLM2, 1,792 tokens",
    "predictions-middle-smollm2-h200": "SmolLM2, 896 tokens",
    "predictions-short-smollm2-h200": "SmolLM2, 384 tokens",
    "predictions-short-gemma-3-270m-h200": "Gemma-3-270M, 384 tokens",
    "predictions-levels-h200": "SmolLM2, 1,792 tokens, twice the texts",
}
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


def judged_runs(file: str = "predictions-judged.json") -> dict[str, str]:
    """Runs of predictions.py that were judged by others, and what they are called."""
    return {name: label for name, label in RUNS.items() if f"{name}, probes" in result(file)}


def rounds(file: str = "predictions-judged.json") -> str:
    """What a search prints after live rounds over what is live, by run."""
    names = judged_runs(file)

    def row(name: str, label: str) -> Sequence[str]:
        found = result(file)[f"{name}, probes"]["after rounds"]
        chosen = found["over kinds, chosen plan"]
        cells = [chosen[share] for share in ("3.0%", "6.0%", "12.0%", "25.0%")]
        marks = [f"{x:.2f}" if WITHIN[0] <= x <= WITHIN[1] else f"**{x:.2f}**" for x in cells]
        reach = found["80 % interval reaches, times"].values()
        holds = found["within 80 % interval"]
        kinds = [held for kind, held in holds.items() if kind in KINDS]
        by = [found[k][s] for k in KINDS for s in ("3.0%", "6.0%", "12.0%", "25.0%")]
        right = sum(WITHIN[0] <= x <= WITHIN[1] for x in by)
        chance = result(file)[f"{name}, probes"]
        alone = chance["cells that would be right by their texts alone"]
        return (
            label, *marks, f"{min(reach):.2f} to {max(reach):.2f}",
            f"{100 * holds['over kinds']:.0f} %", f"{right} of {len(by)} ({alone:g})",
            f"{100 * sum(kinds) / len(kinds):.0f} %",
        )  # fmt: skip

    head = (
        "live over printed", "3 %", "6 %", "12 %", "25 %", "80 % interval, a factor of", "holds",
        "cells by kind within 0.8 to 1.25 (by their texts alone)", "holds by kind",
    )  # fmt: skip
    return table(head, (row(name, label) for name, label in names.items()))


def ranks() -> str:
    """Rank correlation with live loss on every recorded run."""
    names = judged_runs()
    rows = []
    for name, label in names.items():
        found = result("predictions-judged.json")[f"{name}, probes"].get("rank")
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


def refined() -> str:
    """Ranks of mixed policies after a refining run, on texts that it has not seen."""
    rows = []
    for name, found in result("ranking-refined-h200.json")["ways"].items():
        whole = found.get("ranks", found)
        kinds = [whole[kind]["value"] for kind in KINDS if kind in whole]
        unseen = found.get("ranks of policies that did not run", {}).get("all")
        rows.append((
            name, _rank(whole["all"]), f"{min(kinds):.3f} to {max(kinds):.3f}",
            _rank(whole["answers"]) if "answers" in whole else "-",
            _rank(unseen) if unseen and found["live runs"] else "-",
        ))  # fmt: skip
    head = (
        "Spearman with live loss", "all kinds (0.985 asked)", "single kinds (0.95)",
        "answers (0.9)", "policies that did not run",
    )  # fmt: skip
    return table(head, rows)


def _rank(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
