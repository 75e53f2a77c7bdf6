"""What ran live, in order: an interrupted strategy is replayed from it, the clock included."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvtune.common.bounds import Finite, NotNegative, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.files import append_text
from kvtune.common.stored import checked, parse_json, read_bytes, whole_lines
from kvtune.tuner.exchange import Choice
from kvtune.tuner.journal import cut

_AGAIN = "remove the folder; the comparison then begins anew."

RunChoices = Callable[[Sequence[Choice]], Sequence[Sequence[float]]]
"""Runs configurations live; for each its loss on every sample, nats/token."""


@dataclass(frozen=True)
class Entry:
    """One configuration that ran live.

    Args:
        choice: option of each head.
        losses: on every sample, nats/token.
        seconds: on the strategy's clock, when the run had ended.
    """

    choice: tuple[Whole, ...]
    losses: tuple[Finite, ...]
    seconds: NotNegative


class Ledger:
    """Live runs of one strategy and the time it has used.

    A strategy that is started again asks for the same runs in the same order: those that are on
    file are answered from there, and its clock then stands where it stood. What it had spent
    between its last run and the interruption is not counted.

    Args:
        path: file, a JSON object a line.
        run: runs configurations that are not on file.
        start_s: what the clock shows at the beginning.
        now: a clock that only rises, seconds.
    """

    def __init__(
        self,
        path: Path,
        run: RunChoices,
        start_s: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self._run, self._now = path, run, now
        self.entries = read_entries(path)
        self._next = 0
        self._base_s, self._since = start_s, now()

    @property
    def seconds(self) -> float:
        """What the strategy has used so far; the time that is on file, while it is replayed."""
        return self._base_s + self._now() - self._since

    @property
    def used(self) -> int:
        """Configurations that the strategy has asked for."""
        return self._next

    def losses(self, choices: Sequence[Choice]) -> list[Sequence[float]]:
        """Each configuration's loss on every sample, from the file or run now.

        Raises:
            KvtuneError: the file holds other runs than this strategy asks for.
        """
        known = self.entries[self._next : self._next + len(choices)]
        for choice, entry in zip(choices, known, strict=False):
            if tuple(choice.tolist()) != entry.choice:
                raise KvtuneError(
                    "these runs belong to another comparison", where=str(self.path), hint=_AGAIN
                )
        if known:
            self._base_s, self._since = known[-1].seconds, self._now()
        found: list[Sequence[float]] = [entry.losses for entry in known]
        if new := choices[len(known) :]:
            found += self._run_new(new)
        self._next += len(choices)
        return found

    def _run_new(self, choices: Sequence[Choice]) -> list[Sequence[float]]:
        losses = self._run(choices)
        self.entries += append_entries(self.path, choices, losses, self.seconds)
        return list(losses)


def read_entries(path: Path) -> list[Entry]:
    """The runs on file, none where there is no file; a last line that was cut off is removed.

    Raises:
        KvtuneError: it is not a file of runs.
    """
    if not path.exists():
        return []
    lines, half = whole_lines(read_bytes(path, _AGAIN))
    if half:
        cut(path, len(half))
    return [
        checked(Entry, parse_json(line, f"{path}:{number}", _AGAIN), f"{path}:{number}", _AGAIN)
        for number, line in enumerate(lines, 1)
    ]


def append_entries(
    path: Path, choices: Sequence[Choice], losses: Sequence[Sequence[float]], seconds: float
) -> list[Entry]:
    """Add runs to a file, all of them or none.

    Raises:
        KvtuneError: it cannot be written.
    """
    made = [
        Entry(tuple(map(int, choice)), tuple(map(float, each)), seconds)
        for choice, each in zip(choices, losses, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    append_text(path, "".join(json.dumps(asdict(entry)) + "\n" for entry in made))
    return made
