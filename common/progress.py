"""Progress that the core can report without knowing a screen: silent, or bars on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


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
        """Say nothing."""


class Bars:
    """Bars with remaining time on stderr; one plain line a task where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items under a bar named ``label``."""
        if not self.console.is_terminal:
            self.console.print(f"{label} ...", highlight=False, markup=False)
            yield from items
            return
        from rich import progress as bar

        columns = (
            bar.TextColumn("{task.description:<28}"), bar.BarColumn(), bar.MofNCompleteColumn(),
            bar.TimeElapsedColumn(), bar.TimeRemainingColumn(),
        )  # fmt: skip
        with bar.Progress(*columns, console=self.console) as bars:
            yield from bars.track(items, total=total, description=label)

    def note(self, message: str) -> None:
        """Print one line on stderr."""
        self.console.print(message, highlight=False, markup=False)
