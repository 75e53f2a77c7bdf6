"""Several estimates side by side: a table, CSV, Markdown, or JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvtune.cli.output import table
from kvtune.common.estimate import Estimate
from kvtune.common.units import GIB
from kvtune.common.words import count, figure, printable
from kvtune.tuner.cases import FULL, Case

if TYPE_CHECKING:
    from rich.console import RenderableType


def as_table(title: str, cases: Sequence[Case], caption: str) -> RenderableType:
    """For people; what fits is marked."""
    columns, rows = _cells(cases)
    return table(title, columns, rows, left=(0, 1), caption=f"{caption}\n{_explained(cases)}")


def as_markdown(cases: Sequence[Case]) -> str:
    """The same as a Markdown table."""
    columns, rows = _cells(cases)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)


def _markdown(cell: str) -> str:
    return printable(cell).replace("|", "\\|").replace("*", "\\*")


def as_csv(cases: Sequence[Case]) -> str:
    """Plain numbers in bytes and seconds, each estimate with the ends of its interval."""
    rows = [_numbers(case) for case in cases]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def as_rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For JSON: what was asked for, whether it fits, and Figures."""
    return [{**_facts(case), **_figures(case), "reason": case.reason or None} for case in cases]


def _facts(case: Case) -> dict[str, Any]:
    return {
        "gpu": case.card.gpu.slug,
        "context_tokens": case.context_tokens,
        "gpus": case.split.gpus,
        "copies": case.split.copies,
        "batch": case.batch,
        "policy": case.policy,
        "weights": case.budget.weight_format if case.budget else _named(case),
        "fits": case.fits,
        "sequences_that_fit": case.sequences_that_fit,
        "limit_bytes": case.card.memory_bytes,
    }


def _named(case: Case) -> str | None:
    """The format that was asked for by name, of a case whose weights do not fit."""
    return None if case.weights == "auto" else case.weights


def _figures(case: Case) -> dict[str, Estimate | None]:
    cost = case.cost
    return {
        "memory": cost.memory if cost else None,
        "most_at_once": case.most_at_once,
        "prefill": cost.prefill if cost else None,
        "first_token": cost.first_token if cost else None,
        "latency": cost.latency if cost else None,
        "tokens_per_second": case.tokens_per_second,
        "tokens_per_second_per_user": case.tokens_per_second_per_user,
        "cost_per_million_tokens": case.cost_per_million_tokens,
    }


_WITH_UNIT = {
    "memory": "memory_bytes",
    "prefill": "prefill_s",
    "first_token": "first_token_s",
    "latency": "latency_s",
}


def _numbers(case: Case) -> dict[str, Any]:
    numbers = _facts(case)
    for figure_name, found in _figures(case).items():
        name = _WITH_UNIT.get(figure_name, figure_name)
        ends = (found.value, found.low, found.high) if found else (None,) * 3
        tail = ("", "_low", "_high")
        numbers |= {
            name + end: "" if x is None else f"{x:.6g}" for end, x in zip(tail, ends, strict=True)
        }
    return numbers


def _cells(cases: Sequence[Case]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, without the columns that say the same in every row."""
    rows = [_row(case) for case in cases]
    policies = any(case.policy != FULL for case in cases)
    priced = any(case.card.price_per_hour is not None for case in cases)
    together = any(case.split.cards > 1 for case in cases)
    shown = {
        "copies x GPUs": together,
        "policy": policies,
        "weights": len(_formats(cases)) > 1,
        "per million tokens": priced,
    }
    columns = [column for column in rows[0] if shown.get(column, True)]
    return columns, [[row[column] for column in columns] for row in rows]


def _formats(cases: Sequence[Case]) -> list[str]:
    found = (case.budget.weight_format if case.budget else _named(case) for case in cases)
    return list(dict.fromkeys(each for each in found if each))


def _row(case: Case) -> dict[str, str]:
    """One case by the table's headings; time per token is what a user's tokens/s say."""
    return {
        "": "*" if case.fits else "",
        "gpu": case.card.gpu.slug,
        "copies x GPUs": f"{case.split.copies} x {case.split.gpus}",
        "prompts": f"{count(case.batch)} x {count(case.context_tokens)}",
        "policy": case.policy,
        "weights": case.budget.weight_format if case.budget else _named(case) or "-",
        "card, GiB": f"{case.card.memory_bytes / GIB:.1f}",
        "peak, GiB": _gib(case.cost.memory) if case.cost else "-",
        "most at once": figure(case.most_at_once, tier=False),
        "tokens/s": figure(case.tokens_per_second, tier=False),
        "tokens/s per user": figure(case.tokens_per_second_per_user, tier=False),
        "per million tokens": figure(case.cost_per_million_tokens, tier=False),
    }


def _gib(size: Estimate) -> str:
    """One card's peak, in the column's unit."""
    value, low, high = (f"{end / GIB:.2f}" for end in (size.value, size.low, size.high))
    return value if low == high else f"{value} [{low}, {high}]"


def _explained(cases: Sequence[Case]) -> str:
    fitting = [case for case in cases if case.fits]
    tiers = sorted({case.cost.latency.tier for case in cases if case.cost})
    formats = _formats(cases)
    said = ["* fits" if fitting else "none of these fits"]
    said += [f"{formats[0]} weights"] if len(formats) == 1 else []
    said += [f"speed of decoding: {', '.join(tiers)}"] if tiers else []
    costs = {p.value: case for case in fitting if (p := case.cost_per_million_tokens)}
    if costs:
        least = costs[min(costs)]
        cards = f" on {least.split.copies} x {least.split.gpus}" if least.split.cards > 1 else ""
        said.append(f"least cost: {least.card.gpu.slug}{cards}, {count(least.batch)} at once")
    return "; ".join(said)
