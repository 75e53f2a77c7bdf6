"""Writes figures of result files into the pages, so that no page says what no file holds.

    python benchmarks/pages.py            # all blocks of README.md and docs/
    python benchmarks/pages.py --screen   # README's first screen too, by running the command

A block stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; what is between
them is written here and nowhere else. A test holds every block against the result files.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import first_minutes_pages
import lengths_pages
import policy_pages
import quality_pages
import stand_in_pages
from page_tables import HERE, result, table
from predictions_pages import (
    FEW,
    GEMMA,
    LONG,
    MORE,
    RUNS,
    SMALL,
    held_by_kind,
    levels,
    other_constants,
    ranks,
    refined,
    rounds,
    ways,
    ways_to_level,
)

ROOT = HERE.parent
MEASURED = (
    "strongest-plans-h200.json", "strongest-h200.json", *(f"{name}.json" for name in RUNS),
    "task-scores-h200.json", "stand-in-gemma-3-270m.json",
    "stand-in-families-gemma-3-270m-h200.json",
)  # fmt: skip
TWICE = "predictions-levels-h200"
ALONE, EACH = "predictions-judged-alone.json", "predictions-judged.json"
_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_SCREEN = re.compile(r"```\n\d+ prompts? of .*?```", re.DOTALL)
_COMMAND = ("search", "--model", "llama-8b", "--gpu", "4090", "--mem", "16GB")


def samples() -> str:
    """What every file of figures about quality was measured on."""

    def row(name: str) -> Sequence[str]:
        found = result(name)
        setting = found.get("setting", found)
        size = setting.get("workload") or setting.get("samples")
        end = setting.get("no needle in the last")
        where = "anywhere in the prompt" if end is None else f"not in its last {end} tokens"
        device = found.get("device", "cuda" if "h200" in name else "cpu")
        return f"`{name}`", device.replace("NVIDIA ", ""), str(size), where

    names = [
        quality_pages.quality_file().name,
        *(name for name in MEASURED if (HERE / "results" / name).exists()),
    ]
    return table(("file", "on", "samples", "needles lie"), map(row, names))


BLOCKS: dict[str, Callable[[], str]] = {
    "measured-on": quality_pages.measured_on,
    "samples": samples,
    "shown-first": quality_pages.shown_first,
    "strongest-first": quality_pages.strongest_first,
    "equal-bytes": quality_pages.equal_bytes,
    "loss-scale": quality_pages.loss_scale,
    "by-kind": quality_pages.by_kind,
    "needles": quality_pages.needles,
    "ranking": quality_pages.ranking,
    "strongest": quality_pages.strongest,
    "menus": quality_pages.menus,
    "tasks": quality_pages.tasks,
    "levels-alone": lambda: levels(ALONE, LONG, "calibrated on other kinds"),
    "levels-gemma": lambda: levels(EACH, GEMMA, "calibrated on SmolLM2"),
    "levels-short": lambda: levels(EACH, SMALL, "calibrated on Gemma and on longer prompts"),
    "rounds": lambda: rounds(FEW),
    "ranks": ranks,
    "levels-more": lambda: levels(EACH, TWICE, "calibrated on other runs"),
    "rounds-more": lambda: rounds(MORE),
    "held-by-kind": held_by_kind,
    "ranking-ways": ways,
    "all-methods": policy_pages.all_methods,
    "claims": policy_pages.claims,
    "few-bits": policy_pages.few_bits,
    "transport-levels": policy_pages.levels,
    "reuse": policy_pages.reuse,
    "first-answer": first_minutes_pages.first_answer,
    "searches-on-cpu": first_minutes_pages.searches_on_cpu,
    "search-on-cpu-said": first_minutes_pages.search_on_cpu_said,
    "mistakes": first_minutes_pages.mistakes,
    "explorer": first_minutes_pages.explorer,
    "plain-step": first_minutes_pages.plain_step,
    "ranking-refined": refined,
    "levels-ways": ways_to_level,
    "levels-constants": other_constants,
    "lengths-shorter": lengths_pages.carried,
    "lengths-fitted": lengths_pages.fitted,
    "lengths-functions": lengths_pages.functions,
    "stand-in-live": stand_in_pages.stand_in_live,
    "stand-in-choices": stand_in_pages.stand_in_choices,
    "stand-in-families": stand_in_pages.stand_in_families,
    "stand-in-left-out": stand_in_pages.stand_in_left_out,
}


def filled(text: str) -> str:
    """A page with every block as the result files have it."""
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def pages() -> list[Path]:
    """Pages that may hold figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def screen() -> str:
    """What README's first command prints, up to its notes."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"KVTUNE_CACHE": folder, "NO_COLOR": "1", "COLUMNS": "100"}
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-m", "kvtune", *_COMMAND],
            cwd=folder, env={**os.environ, **given}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    return done.stdout.split("\nnote:")[0].rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screen", action="store_true", help="run README's first command too")
    arguments = parser.parse_args()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if arguments.screen and page.name == "README.md":
            new = _SCREEN.sub(lambda _: f"```\n{screen()}\n```", new, count=1)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
