"""Reads a run directory again and again, only what is new each time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.common.stored import parse_json, read_bytes, whole_lines
from kvtune.tuner.config_file import check_run
from kvtune.tuner.explore import COLUMNS_FILE, PLANS_FILE
from kvtune.tuner.explore.columns_file import read_columns, write_columns
from kvtune.tuner.explore.facts import Facts, read_facts
from kvtune.tuner.explore.measured import read_measured
from kvtune.tuner.explore.missing import no_study
from kvtune.tuner.explore.plans import AGAIN, Plans, columns, read_lines
from kvtune.tuner.explore.study import State, Study
from kvtune.tuner.stored_result import StoredResult, read_result

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
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        if not whole:
            return
        try:
            self._take(whole)
        except KvtuneError as error:
            message = f"this study is damaged: {error.message}"
            raise KvtuneError(message, where=error.where, hint=error.hint) from error
        self._at += len(whole)
        self._line += whole.count(b"\n")

    def _take(self, text: bytes) -> None:
        """Whole lines, of which a study's first tells what the plans of the others share."""
        facts, plans = self._facts, self._plans
        if facts is None:
            first, _, rest = text.partition(b"\n")
            where = f"{self.path}:1"
            facts = read_facts(parse_json(first, where, AGAIN), where)
            check_run(self.folder)
            plans = read_columns(self.folder, text, facts.size) or self._parsed(rest, facts, 2)
        else:
            later = self._parsed(text, facts, self._line + 1)
            plans = plans + later if plans else later
        self._facts, self._plans = facts, plans

    def _parsed(self, text: bytes, facts: Facts, start: int) -> Plans:
        """The plans of lines, the first of which is the file's ``start``-th."""
        lines, _ = whole_lines(text)

        def place(row: int) -> str:
            return f"{self.path}:{start + row}"

        return columns(read_lines(lines, place), facts.size, place)

    def keep_columns(self) -> None:
        """Write the plans in columns beside their lines, for whoever reads them next.

        Columns of an earlier search in the folder are removed unread.
        """
        (self.folder / COLUMNS_FILE).unlink(missing_ok=True)
        self._read_lines()
        if self._plans is not None:
            write_columns(self.folder, self._plans, read_bytes(self.path))

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
