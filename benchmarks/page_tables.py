"""Result files and Markdown tables of them, for the figures of the pages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARES = ("3%", "6%", "12%", "25%")
FAMILIES = {
    "uniform": "best uniform",
    "pyramid": "best pyramid",
    "adakv": "best AdaKV",
    "kvzip": "KVzip over the model",
    "expected_attention": "Expected Attention",
    "keydiff": "KeyDiff",
    "cake": "CAKE",
    "compresskv": "CompressKV",
}
Figures = dict[str, Any]


@cache
def result(name: str) -> Figures:
    """The content of a file of ``benchmarks/results``."""
    found: Figures = json.loads((HERE / "results" / name).read_text(encoding="utf-8"))
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of these columns and rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spaced(share: str) -> str:
    return share.replace("%", " %")


def interval(ends: Sequence[float], form: str = ".3g") -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"
