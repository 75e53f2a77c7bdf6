"""Where words go: answers to stdout, progress to stderr; with --json one object alone on stdout."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import kvtune
from kvtune.cli.layout import Grid
from kvtune.common.words import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from kvtune.common.progress import Progress

WIDTH = 100  # of a file or a pipe, unless COLUMNS says otherwise
WIDEST = 120  # lines beyond are hard to read
NARROWEST = 40


@dataclass(frozen=True)
class Output:
    """What a command says, and where.

    Args:
        stdout: the process's own stdout.
        as_json: one object on stdout, and no tables.
        quiet: no progress.
    """

    stdout: TextIO
    as_json: bool
    quiet: bool

    @property
    def progress(self) -> Progress:
        """Bars on stderr, or nothing."""
        from kvtune.common.progress import Bars, Silent

        return Silent() if self.quiet else Bars()

    def show(self, *parts: RenderableType) -> None:
        """Print tables and sentences, for people; with JSON its keys say the same."""
        if self.as_json:
            return
        console = _console(self.stdout)
        with console.capture() as capture:
            for part in parts:
                console.print(printable(part) if isinstance(part, str) else part, crop=False)
        lines = capture.get().splitlines()
        print("\n".join(line.rstrip() for line in lines), file=self.stdout, flush=True)

    def finish(self, command: str, answer: Mapping[str, Any]) -> None:
        """Print the command's JSON object, if it was asked for."""
        if self.as_json:
            whole = {"command": command, "kvtune": kvtune.__version__, **answer}
            print(json.dumps(plain(whole), indent=2, allow_nan=False), file=self.stdout)


@contextmanager
def speaking(as_json: bool, quiet: bool) -> Iterator[Output]:
    """The output of one command; with JSON, what others print on stdout goes to stderr."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield Output(stdout, as_json, quiet)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    console.width = max(NARROWEST, _columns() or _of_terminal(console))
    return console


def _columns() -> int | None:
    """The width that the environment asks for."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isdecimal() and len(asked) < 6 and int(asked) else None


def _of_terminal(console: Console) -> int:
    return min(console.width, WIDEST) if console.is_terminal else WIDTH


def plain(value: Any) -> Any:
    """``value`` as JSON takes it: figures by ``as_dict``, dataclasses as objects, nan as null."""
    if hasattr(value, "as_dict"):
        return plain(value.as_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    caption: str = "",
) -> RenderableType:
    """A table that reads as well in a file as on a terminal.

    Args:
        title: one line above it.
        columns: headings.
        rows: their cells.
        left: columns of words; the others hold figures and align to the right.
        caption: one line below it.
    """
    from rich.console import Group
    from rich.text import Text

    cells = tuple(tuple(map(printable, row)) for row in rows)
    grid = Grid(tuple(columns), cells, frozenset(left))
    above = [Text(printable(title), style="bold")] if title else []
    return Group(*above, grid, *([printable(caption)] if caption else []))


def one_line(text: str) -> RenderableType:
    """A line that is never broken, so that it can be copied whole; for commands."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(printable(text), no_wrap=True, overflow="ignore"))
