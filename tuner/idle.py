"""Options of a search that change nothing where a stand-in answers."""

from __future__ import annotations

from kvtune.tuner.request import SearchRequest

_RUNS_OR_DRAWS = {
    "trials": "--trials",
    "workload": "--workload",
    "sampler": "--sampler",
    "jobs": "--jobs",
    "storage": "--storage",
    "engine": "--engine",
    "texts": "--text",
    "device": "--device",
}
"""What has to do with running the model or with drawing trials, as a stand-in does neither."""


def notes_on_idle(request: SearchRequest) -> tuple[str, ...]:
    """Which options were given for nothing, as no trial is drawn and no model is run."""
    idle = [
        option
        for field, option in _RUNS_OR_DRAWS.items()
        if getattr(request, field) != getattr(SearchRequest, field)
    ]
    if not idle:
        return ()
    *others, last = idle
    named = f"{', '.join(others)} and {last} change" if others else f"{last} changes"
    return (
        f"options: {named} nothing with a stand-in, which draws no trials and runs no samples.",
    )
