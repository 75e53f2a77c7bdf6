"""``kvtune worker``: joins a search that shares its trials, until they are done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking

StudyOption = Annotated[
    Path,
    typer.Option(
        "--study",
        metavar="DIR",
        help="Run directory of a kvtune search --storage, on a disk that this machine sees.",
    ),
]


def command(
    study: StudyOption,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Join a search that shares its trials by --storage."""
    with speaking(as_json, quiet) as output:
        from kvtune.tuner.asked import solver_of
        from kvtune.tuner.worker import join

        output.progress.note(f"joining the search in {study}")
        done = join(study, solver_of)
        output.show(f"all trials are done, {done} of them here")
        output.finish("worker", {"study": study, "trials_done_here": done})
