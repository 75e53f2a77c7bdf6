"""Which study is meant: the named run directory, else the newest one here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtune.common.errors import KvtuneError
from kvtune.tuner.explore import PLANS_FILE
from kvtune.tuner.explore.missing import FIRST_SEARCH, no_study

RUNS = Path("kvtune-runs")

Study = Annotated[
    Path | None,
    typer.Argument(
        metavar="STUDY", help="A run directory of kvtune search; left out: the newest here."
    ),
]


def find_study(named: Path | None) -> Path:
    """The run directory.

    Raises:
        KvtuneError: the named one is none; none was named, and there is none below ``kvtune-runs``.
    """
    if named is not None:
        folder = named.expanduser()
        if not (folder / PLANS_FILE).exists():
            raise no_study(folder)
        return folder
    found = sorted(RUNS.glob(f"*/{PLANS_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise KvtuneError(
            "there is no study here",
            where=str(RUNS),
            hint=FIRST_SEARCH,
        )
    return found[-1].parent
