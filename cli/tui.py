"""``kvtune tui``: explore a study, finished or running."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvtune.cli.studies import Study, find_study


def command(
    study: Study = None,
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", min=0.1, help="Between two looks at it."),
    ] = 1.0,
) -> None:
    """Explore a study on screen, finished or running."""
    from kvtune.common.errors import KvtuneError
    from kvtune.tuner.explore.reader import StudyReader

    folder = find_study(study)
    if not sys.stdout.isatty():
        raise KvtuneError(
            "the explorer needs a terminal", hint=f"kvtune report {folder} writes a page instead."
        )
    from kvtune.tui.app import Explorer

    Explorer(StudyReader(folder), interval).run()
