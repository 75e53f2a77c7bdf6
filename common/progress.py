"""Progress that the core can report without knowing a screen: silent, or bars on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from kvtune.common.words import printable

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

T = TypeVar("T")

LINE_S = 5.0  # between two lines where no bar can be drawn


class Progress(Protocol):
    """What long work reports to."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, one step of the bar each."""
        ...

    def note(self, message: str) -> None:
        """Say one line beside the bars: a decision and its reason."""
        ...


class Silent:
    """Reports nothing; the default everywhere."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items."""
        yield from items

    def note(self, message: str) -> None:
        """Say nothing of the message."""


class Bars:
    """Bars with remaining time on stderr; where that is no terminal, a line every few seconds.

    Args:
        now: the clock, seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self.console, self.now = Console(stderr=True), now

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items under a bar named ``label``; where there are none, nothing is said."""
        if total == 0:
            yield from items
            return
        if not self.console.is_terminal:
            yield from self._lines(items, label, total)
            return
        from rich import progress as bar

        columns = (
            bar.TextColumn("{task.description:<28}"), bar.BarColumn(), bar.MofNCompleteColumn(),
            bar.TimeElapsedColumn(), _time_left(),
        )  # fmt: skip
        with bar.Progress(*columns, console=self.console) as bars:
            yield from bars.track(items, total=total, description=label)

    def _lines(self, items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
        """One line at once, then how far it is and what remains."""
        self.note(f"{label} ...")
        began = said = self.now()
        for done, item in enumerate(items):
            if done and (now := self.now()) - said >= LINE_S:
                self.note(f"{label}: {_how_far(done, total, now - began)}")
                said = now
            yield item

    def note(self, message: str) -> None:
        """Print one line on stderr."""
        self.console.print(printable(message), highlight=False, markup=False)


def _time_left() -> ProgressColumn:
    """A column of what remains by the mean of what is done: rich's own forgets after 30 s."""
    from rich import progress as bar
    from rich.text import Text

    class TimeLeft(bar.ProgressColumn):
        def render(self, task: bar.Task) -> Text:
            done, total = int(task.completed), int(task.total or 0)
            if not done or not total or task.elapsed is None:
                return Text("")
            return Text(f"{_seconds_left(done, total, task.elapsed):.0f} s left")

    return TimeLeft()


def _seconds_left(done: int, total: int, elapsed: float) -> float:
    return elapsed / done * (total - done)


def _how_far(done: int, total: int | None, elapsed: float) -> str:
    """``30 of 60, 12 s left``."""
    if total is None:
        return f"{done} done"
    return f"{done} of {total}, {_seconds_left(done, total, elapsed):.0f} s left"
