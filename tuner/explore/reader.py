"""Reads a run directory again and again, only what is new each time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.common.stored import parse_json, whole_lines
from kvtune.tuner.explore import PLANS_FILE
from kvtune.tuner.explore.facts import Facts, read_facts
from kvtune.tuner.explore.measured import read_measured
from kvtune.tuner.explore.missing import no_study
from kvtune.tuner.explore.plans import AGAIN, Plans, columns, read_lines
from kvtune.tuner.explore.study import State, Study
from kvtune.tuner.result import StoredResult, read_result

_SILENCE_S = 300  # a search that wrote nothing for so long is taken as stopped


class StudyReader:
    """One run directory; ``read`` gives a snapshot, and costs little where nothing is new.

    Args:
        folder: the run directory.
        now: the clock, seconds since the epoch.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self.folder, self.path, self.now = folder, folder / PLANS_FILE, now
        self._forget()
        self._outcome: tuple[tuple[int, int], StoredResult] | None = None

    def _forget(self) -> None:
        """Begin again, as for another file."""
        self._at = 0
        self._inode: int | None = None
        self._line = 0  # lines read so far
        self._facts: Facts | None = None
        self._plans: Plans | None = None

    def read(self) -> Study:
        """The study as it is now.

        Raises:
            KvtuneError: no study here, damaged, of a newer version, or gone.
        """
        self._read_lines()
        if self._facts is None or self._plans is None:
            raise KvtuneError(
                "the study has not begun to write its plans yet", where=str(self.folder)
            )
        outcome = self._read_outcome(self._facts)
        measured = read_measured(self.folder, self._facts.study)
        state = self._state(outcome)
        return Study(self.folder, self._facts, self._plans, outcome, state, measured)

    def _read_lines(self) -> None:
        """Take in the lines that were not there before."""
        try:
            about = self.path.stat()
            if about.st_size < self._at or self._inode not in (None, about.st_ino):
                self._forget()
            self._inode = about.st_ino
            with self.path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError as error:
            raise no_study(self.folder) from error
        except OSError as error:
            raise KvtuneError(f"cannot read: {error.strerror}", where=str(self.path)) from error
        lines, half = whole_lines(text)  # the last line may be half written
        if not lines:
            return
        try:
            self._take(lines)
        except KvtuneError as error:
            message = f"this study is damaged: {error.message}"
            raise KvtuneError(message, where=error.where, hint=error.hint) from error
        self._at += len(text) - len(half)
        self._line += len(lines)

    def _take(self, lines: list[bytes]) -> None:
        """The first line tells what the plans of the others share."""
        start, facts = self._line + 1, self._facts
        if facts is None:
            where = f"{self.path}:{start}"
            facts = read_facts(parse_json(lines[0], where, AGAIN), where)
            lines, start = lines[1:], start + 1

        def place(row: int) -> str:
            return f"{self.path}:{start + row}"

        plans = columns(read_lines(lines, place), facts.size, place)
        self._plans = plans if self._plans is None else self._plans + plans
        self._facts = facts

    def _read_outcome(self, facts: Facts) -> StoredResult | None:
        """The result, if it is this study's; one of an earlier search in the folder is none."""
        path = self.folder / "result.json"
        try:
            about = os.stat(path)
        except OSError:
            return None
        stamp = (about.st_mtime_ns, about.st_ino)
        if self._outcome is None or self._outcome[0] != stamp:
            self._outcome = (stamp, read_result(path))
        found = self._outcome[1]
        return found if found.study == facts.study else None

    def _state(self, outcome: StoredResult | None) -> State:
        if outcome is not None:
            return "finished"
        silent = self.now() - self.path.stat().st_mtime
        return "running" if silent < _SILENCE_S else "stopped"
