"""A study's journal: what every finished trial chose, one JSON object a line.

A trial's loss and plan follow from its choices, so that nothing else is kept. A last line that a
killed process or a full disk left unfinished is cut off; its trial is done again, and comes out the
same.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from kvtune.common.bounds import Parameter, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.files import append_text, unwritable, write_text
from kvtune.common.progress import Progress
from kvtune.common.stored import checked, parse_json, read_bytes, whole_lines

FORMAT = 2
_AGAIN = "remove the file; the same search then begins anew and finds the same."


@dataclass(frozen=True)
class Trial:
    """A finished trial as the journal records it.

    Args:
        trial: number, from 0 on.
        state: failed where its options cannot fit.
        parameters: what the sampler chose, by name.
    """

    trial: Whole
    state: Literal["complete", "failed"]
    parameters: dict[str, Parameter]


class Journal:
    """Finished trials on disk.

    Args:
        path: the file; None to keep nothing.
        progress: is told where half a line was cut off.

    Raises:
        KvtuneError: it is no journal, or cannot be read or written.
    """

    def __init__(self, path: Path | None, progress: Progress) -> None:
        self.path = path
        self.trials: list[Trial] = []
        if path is None:
            return
        if path.exists():
            self.trials = _read(path, progress)
        if not path.exists() or not path.stat().st_size:
            write_text(path, json.dumps({"kvtune_journal": FORMAT}) + "\n")

    def add(self, trial: Trial) -> None:
        """Record one more trial."""
        if self.path is not None:
            append_text(self.path, json.dumps(asdict(trial)) + "\n")


def _read(path: Path, progress: Progress) -> list[Trial]:
    lines, half = whole_lines(read_bytes(path, _AGAIN))
    if lines:
        _check_format(parse_json(lines[0], f"{path}:1", _AGAIN), path)
    trials = [_trial(line, number, path) for number, line in enumerate(lines[1:])]
    if half:
        cut(path, len(half))
        progress.note(f"{path}: half a line at its end was cut off; its trial is done again")
    return trials


def _check_format(header: object, path: Path) -> None:
    if header != {"kvtune_journal": FORMAT}:
        raise KvtuneError(f"is no journal of format {FORMAT}", where=str(path), hint=_AGAIN)


def _trial(line: bytes, number: int, path: Path) -> Trial:
    where = f"{path}:{number + 2}"
    found = checked(Trial, parse_json(line, where, _AGAIN), where, _AGAIN)
    if found.trial != number:
        raise KvtuneError(
            f"holds trial {found.trial} in the place of {number}", where=where, hint=_AGAIN
        )
    return found


def cut(path: Path, count: int) -> None:
    """Remove so many bytes from a file's end: half a line that a killed process left.

    Raises:
        KvtuneError: the file cannot be written.
    """
    try:
        os.truncate(path, path.stat().st_size - count)
    except OSError as error:
        raise unwritable(path, error) from error
