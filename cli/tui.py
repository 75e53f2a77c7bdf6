"""``kvtune tui``: explore a study, finished or running."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking
from kvtune.cli.studies import Study, find_study

if TYPE_CHECKING:
    from kvtune.tuner.explore.study import Study as Snapshot


def command(
    study: Study = None,
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", min=0.1, help="Between two looks at it."),
    ] = 1.0,
    as_json: options.Json = False,
) -> None:
    """Explore a study on screen, finished or running."""
    folder = find_study(study)
    from kvtune.tuner.explore.reader import StudyReader

    if as_json:
        with speaking(as_json, quiet=True) as output:
            output.finish("tui", _answer(StudyReader(folder).read()))
        return
    _check_terminal(folder)
    from kvtune.tui.app import Explorer

    Explorer(StudyReader(folder), interval).run()


def _check_terminal(folder: Path) -> None:
    """Refuse a pipe, which no one can look at."""
    from kvtune.common.errors import KvtuneError

    if not sys.stdout.isatty():
        raise KvtuneError(
            "the explorer needs a terminal", hint=f"kvtune report {folder} writes a page instead."
        )


def _answer(study: Snapshot) -> dict[str, Any]:
    """What the first screen says, without the screen."""
    from kvtune.tuner.explore.view import View
    from kvtune.tuner.explore.what_if import Setting, figures_of

    setting, row = Setting.asked(study.facts), study.chosen
    view = View(study, figures_of(study, setting), setting)
    found: dict[str, Any] = {
        "study": study.folder,
        "state": study.state,
        "quality": study.facts.quality,
        "trials": study.facts.trials,
        "plans": len(study.plans),
        "front": study.plans.trial[view.front].tolist(),
        "chosen": None,
    }
    if row is None:
        return found
    plan = study.plans[row]
    return found | {
        "chosen": {
            "trial": plan.trial,
            "context_tokens": plan.context_tokens,
            "sequences": plan.sequences,
            "prompt_bytes": plan.prompt_bytes,
            "selection": plan.kl,
            "held_out": plan.held_out,
            "memory": view.figures.estimate("memory", row),
            "latency": view.figures.estimate("step_s", row),
            "tokens_per_second": view.figures.estimate("tokens_per_s", row),
        }
    }
