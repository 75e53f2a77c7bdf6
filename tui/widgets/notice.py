"""A written state, in the place of the plot and the plan."""

from __future__ import annotations

from textual.geometry import Size
from textual.widgets import Static

from kvtune.common.errors import KvtuneError
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View

LEAST_COLUMNS, LEAST_ROWS = 60, 18


class Notice(Static):
    """What is the matter, and what to do about it."""

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id, markup=False)

    @staticmethod
    def words_for(study: Study | None, view: View | None, error: KvtuneError | None) -> str | None:
        """The state in words; None where there are plans to draw."""
        if study is None:
            return _of_error(error) if error else "Reading the study ..."
        if not len(study.plans):
            return _of_empty(study)
        if view is not None and not len(view.rows):
            return f"No plan is {view.filter.words}.\n\nPress f to change the filter."
        return None


def _of_error(error: KvtuneError) -> str:
    hint = f"\n\n{error.hint}" if error.hint else ""
    where = f"{error.where}\n\n" if error.where else ""
    return f"{where}{error.message[:1].upper()}{error.message[1:]}.{hint}"


def _of_empty(study: Study) -> str:
    if study.state == "running":
        return "The search has found no plan that fits yet.\n\nPlans appear here as they are found."
    return (
        "This study holds no plan: none of its trials fits in memory.\n\n"
        "Search again with more --mem, a shorter --context or narrower --weights."
    )


def too_small(size: Size) -> str | None:
    """What to do where the terminal is too small for a plot; None where it is not."""
    if not size or (size.width >= LEAST_COLUMNS and size.height >= LEAST_ROWS):
        return None
    return (
        f"This terminal is {size.width} x {size.height}.\n"
        f"The explorer needs {LEAST_COLUMNS} x {LEAST_ROWS}.\n\n"
        "Make it larger, or write a page:\nkvtune report STUDY\n\nq quits."
    )
