"""The line on top: what is searched, how far it is, and whose quality it shows."""

from __future__ import annotations

from kvtune.common.errors import KvtuneError
from kvtune.tuner.explore.view import View
from kvtune.tuner.verdict import limit_words


def status(view: View | None, error: KvtuneError | None, width: int) -> str:
    """One line; what matters least goes first where it is narrow."""
    if view is None:
        return "kvtune"
    facts, study, setting = view.study.facts, view.study, view.setting
    state = study.state if error is None else f"STORAGE LOST: {error.message}"
    what_if = "WHAT IF " if view.is_what_if else ""
    place = f"{what_if}{setting.gpu.name} {limit_words(setting.memory_bytes)}"
    model, found = facts.shape.name, f"{_shown(view)}{state}"
    forms = (
        (" kvtune", model, place, f"quality: {facts.quality}", found),
        (model, place, facts.quality, found),
        (model, place, facts.source, found),
    )
    lines = [" · ".join(parts) for parts in forms]
    return next((line for line in lines if len(line) <= width), lines[-1])


def _shown(view: View) -> str:
    """``58 plans, ``, or how many the filter lets through."""
    every, shown, asked = len(view.study.plans), len(view.rows), view.study.facts.trials
    last = int(view.study.plans.trial[-1]) + 1 if every else 0
    trials = f"trial {last} of {asked}, " if view.study.state == "running" else f"{every} plans, "
    return f"{shown} of {trials}" if shown < every else trials
