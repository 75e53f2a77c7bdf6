"""The report's tables, as rows that the page and the CSV files share."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.common.units import format_bytes
from kvtune.common.words import accuracy, count, figure, percent
from kvtune.tui.selected import Selected, cost_rows, quality_rows
from kvtune.tuner.explore.axes import AXES
from kvtune.tuner.explore.dimensions import in_words
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View


@dataclass(frozen=True)
class Table:
    """Headings and cells, for people."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def plan_table(view: View, row: int) -> Table:
    """The chosen plan's figures with intervals and tiers."""
    selected = Selected(view, row)
    peak = ("peak memory", figure(view.figures.estimate("memory", row)))
    return Table(("", ""), (*quality_rows(selected), *cost_rows(selected), peak))


def baselines_table(study: Study) -> Table:
    """The plan and what it has to beat, at equal bytes; columns of live figures where some ran."""
    each = study.outcome.baselines if study.outcome else ()
    columns = {
        "policy": [baseline.name for baseline in each],
        "prompt": [format_bytes(baseline.prompt_bytes) for baseline in each],
        "KL predicted, held out": [figure(baseline.predicted) for baseline in each],
    }
    if any(baseline.live for baseline in each):
        columns["KL live"] = [figure(baseline.live) for baseline in each]
    if any(baseline.retrieval_accuracy for baseline in each):
        columns["retrieval live"] = [accuracy(baseline.retrieval_accuracy) for baseline in each]
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def front_table(view: View) -> Table:
    """Every plan of the front."""
    figures, chosen = view.figures, view.study.chosen
    rows = [
        (
            f"{view.study.plans.trial[row]}{' (chosen)' if row == chosen else ''}",
            in_words(view.study, int(row)),
            f"{count(figures.sequences[row])} x {count(figures.context_tokens[row])}",
            figure(view.study.plans[int(row)].kl),
            percent(float(figures.share[row])),
            count(figures.tokens_that_fit[row]),
            figure(figures.estimate("step_s", int(row))),
            figure(figures.estimate("tokens_per_s", int(row))),
        )
        for row in view.front
    ]
    headings = (
        "trial",
        "policy",
        "at once",
        "KL, selection",
        "of bf16",
        "tokens that fit",
        "a token",
        "tokens/s",
    )
    return Table(headings, tuple(rows))


def plans_csv(view: View) -> str:
    """Every plan, one line each, figures as plain numbers with their intervals."""
    study, figures = view.study, view.figures
    headings = ["trial", "chosen", "front", "context_tokens", "sequences", "prompt_bytes", "share"]
    for axis in AXES:
        headings += [axis.name, f"{axis.name}_low", f"{axis.name}_high"]
    headings += [f"held_out_{kind}" for kind in study.facts.kinds]
    columns = [axis.column(study, figures) for axis in AXES]
    on_front = set(view.front.tolist())
    rows = []
    for row in range(len(study.plans)):
        known = [
            study.plans.trial[row],
            int(row == study.chosen),
            int(row in on_front),
            figures.context_tokens[row],
            figures.sequences[row],
            figures.prompt_bytes[row],
            f"{figures.share[row]:.6g}",
        ]
        ends = [f"{end:.6g}" for column in columns for end in column[row]]
        rows.append([*known, *ends, *(f"{loss:.6g}" for loss in study.plans.by_kind[row])])
    return as_csv(headings, rows)


def as_csv(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """RFC 4180, lines ended as in a file of this machine."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return text.getvalue()
