"""A bench's runs as a committed result, and that result as the tables of docs/leaderboard.md.

    kvtune bench --workload full --samples 6 --out bench
    python benchmarks/leaderboard.py --runs bench --device "one H100"
    python benchmarks/leaderboard.py --runs more --merge
    python benchmarks/leaderboard.py

The first line runs it (``leaderboard_runs.py`` does so in several processes and a given time), the
second writes the standings and the tables, the third those of another bench of the same samples, in
which some policies were run again, the last the tables alone, from
the standings that are there; --out and --page name another result and page. What stands above the
tables is written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.words import accuracy, figure
from kvtune.tuner.bench_runs import ASKED, Run, read_runs
from kvtune.tuner.leaderboard import (
    Board,
    Standing,
    full_cache,
    on_board,
    standings,
    too_large,
)
from kvtune.tuner.validate import Right

SETTINGS = ("asked_after", "asked_before", "second_question")
BOARDS: tuple[Board, ...] = ("held", "read")
SLOW = ("attention_matching", "probe_greedy", "retrieval_attention")
"""Policies that take minutes a prompt."""
MARK = "<!-- python benchmarks/leaderboard.py writes what follows -->"
COLUMNS = (
    "policy", "held", "read", "KL, nats/token", "asked after", "asked before", "second question",
    "heads evicting", "runs",
)  # fmt: skip


def result(folder: Path, device: str) -> dict[str, Any]:
    """Everything that a bench's folder holds, as one JSON object."""
    asked, runs = json.loads((folder / ASKED).read_text()), finished(read_runs(folder))
    kinds = {run.sample: run.kind for run in runs if run.setting == "asked after"}
    full = dict(zip(SETTINGS, full_cache(runs), strict=True))
    return {
        "device": device,
        **asked,
        "runs": len(runs),
        "samples": {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))},
        "asked_before": len({run.sample for run in runs if run.setting == "asked before"}),
        "heads": max(run.evicted for run in runs),
        "full_cache": {name: plain(value) for name, value in full.items()},
        "standings": [
            {name: plain(value) for name, value in vars(standing).items()}
            for standing in standings(runs)
        ],
    }


def merged(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A result with the policies of another one in the place of its own of the same names.

    Raises:
        KvtuneError: they are of different models, formats or samples.
    """
    for name in ("model", "dtype", "format", "heads", "samples", "asked_before"):
        if before[name] != found[name]:
            raise KvtuneError(f"{name} differs: {before[name]}, in these runs {found[name]}")
    again = {row["policy"] for row in found["standings"]}
    rows = [row for row in before["standings"] if row["policy"] not in again]
    rows = sorted(rows + found["standings"], key=lambda row: (row["share"], row["kl"]["value"]))
    return before | {"standings": rows, "runs": sum(row["samples"] for row in rows)}


def finished(runs: Sequence[Run]) -> list[Run]:
    """Without the sample in which a bench was interrupted, which only some policies have run.

    Those that take minutes a prompt, and come last, may have run on fewer.
    """
    counts = Counter(run.sample for run in runs if run.policy not in SLOW)
    return [run for run in runs if counts[run.sample] == max(counts.values())]


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, Right):
        return asdict(value)
    return value.as_dict() if isinstance(value, Estimate) else value


def estimate(value: Any) -> Any:
    """Back from JSON, where it is an estimate."""
    if not isinstance(value, dict) or "interval" not in value:
        return value
    low, high = value["interval"]
    return Estimate(value["value"], low, high, value["unit"], value["tier"])


def standing(row: dict[str, Any]) -> Standing:
    row = {"read": row["taken"], **row}  # what was measured before readers were on the board
    named = [each.name for each in fields(Standing)]
    # The recorded run is from before answers were told by kind of text.
    return Standing(**{name: estimate(row[name]) for name in named if name in row})


def page(found: dict[str, Any]) -> str:
    """All policies at every share as Markdown tables, least loss first."""
    rows = [standing(row) for row in found["standings"]]
    most = max(row.samples for row in rows)
    full = (accuracy(estimate(found["full_cache"][name])) for name in SETTINGS)
    parts = [f"Full cache: {', '.join(' '.join(x) for x in zip(COLUMNS[4:7], full, strict=True))}."]
    for share in sorted({row.share for row in rows}):
        for board in BOARDS if any(row.reads_less for row in rows) else BOARDS[:1]:
            cells = [line(row, found["heads"], most) for row in on_board(board, rows, share)]
            parts += [f"## At {100 * share:g} % of the bf16 bytes {board}", table(cells)]
        if missing := too_large(rows, share):
            named = ", ".join(f"`{name}`" for name in missing)
            parts.append(f"Cannot be filled to {100 * share:g} %: {named}.")
    return "\n\n".join(parts) + "\n"


def line(row: Standing, heads: int, most: int) -> tuple[str, ...]:
    return (
        f"`{row.policy}`" + (" (looks ahead)" if row.looks_ahead else ""),
        f"{100 * row.taken:.2f} %",
        f"{100 * row.read:.2f} %",
        figure(row.kl, tier=False),
        *(accuracy(each) for each in (row.after, row.known, row.second)),
        f"{100 * row.evicted / (row.samples * heads):.1f} %",
        str(row.samples) + ("" if row.samples == most else f" of {most}"),
    )


def table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = (COLUMNS, ("---",) * len(COLUMNS), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of a bench; left out: the result is read")
    parser.add_argument("--device", default="", help="what the bench ran on, in words")
    parser.add_argument(
        "--merge", action="store_true", help="replace the policies of these runs, keep the others"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/leaderboard-h200.json")
    )
    parser.add_argument("--page", type=Path, default=Path("docs/leaderboard.md"))
    arguments = parser.parse_args()
    if arguments.runs:
        found = result(arguments.runs, arguments.device)
        if arguments.merge:
            found = merged(json.loads(arguments.out.read_text()), found)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    above = arguments.page.read_text().split(MARK)[0]
    arguments.page.write_text(f"{above}{MARK}\n\n{page(json.loads(arguments.out.read_text()))}")


if __name__ == "__main__":
    main()
