"""What a bench found, policy by policy: losses and answers with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvtune.common.estimate import Estimate
from kvtune.policies.method import find_method
from kvtune.tuner.bench_runs import Run
from kvtune.tuner.quality import estimate
from kvtune.tuner.validate import Right, share_right


@dataclass(frozen=True)
class Standing:
    """One policy at one share.

    Args:
        policy: its name.
        share: bytes asked for, of the prompt's bf16 bytes.
        taken: bytes held, counted, the mean over samples.
        read: bytes of those that a decode step reads, likewise.
        kl: nats/token; questions after compression.
        after: answers right where all questions come after compression; None without needles.
        known: answers to the one question that the prompt ended with.
        second: answers to further questions on the same compressed prompt.
        evicted: heads that dropped a token, over all runs.
        samples: runs.
        looks_ahead: a reference that no server could run.
        right_by_kind: answer tokens right of each kind of text, all asked after compression.
    """

    policy: str
    share: float
    taken: float
    read: float
    kl: Estimate
    after: Estimate | None
    known: Estimate | None
    second: Estimate | None
    evicted: int
    samples: int
    looks_ahead: bool
    right_by_kind: dict[str, Right] = field(default_factory=dict)

    @property
    def reads_less(self) -> bool:
        """Whether it holds more than its share of bytes and reads no more: of the read board."""
        return self.read < self.taken


def standings(runs: Sequence[Run]) -> list[Standing]:
    """Every policy at every share, least loss first within a share; the full cache on top."""
    keys = dict.fromkeys((run.share, run.policy) for run in runs)
    found = [_standing([run for run in runs if (run.share, run.policy) == key]) for key in keys]
    return sorted(found, key=lambda standing: (standing.share, standing.kl.value))


Board = Literal["held", "read"]
"""Equal bytes of what is held, or of what a step reads."""


def on_board(board: Board, rows: Iterable[Standing], share: float) -> list[Standing]:
    """Who stands on a board at a share, in the order given.

    Who holds so much reads no more, and so stands on both; readers, which hold everything, are on
    the board of bytes read alone.
    """
    return [row for row in rows if row.share == share and (board == "read" or not row.reads_less)]


def too_large(rows: Iterable[Standing], share: float) -> list[str]:
    """Policies that were tried, and cannot be filled to so small a share."""
    rows = list(rows)
    there = {row.policy for row in rows if row.share == share}
    return [name for name in dict.fromkeys(row.policy for row in rows) if name not in there]


def full_cache(runs: Sequence[Run]) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """What the uncompressed model answers: asked after, known, second."""
    once = list({run.sample: run for run in runs}.values())
    after, before = _of(once, "asked after"), _of(once, "asked before")
    return (
        _answers(after, lambda run: (run.full_first, run.full_later), sum),
        _answers(before, lambda run: (run.full_first,), lambda needles: needles[0]),
        _answers(before, lambda run: (run.full_later,), lambda needles: needles[1]),
    )


def _standing(runs: Sequence[Run]) -> Standing:
    after, before = _of(runs, "asked after"), _of(runs, "asked before")
    return Standing(
        policy=runs[0].policy,
        share=runs[0].share,
        taken=float(np.mean([run.taken for run in runs])),
        read=float(np.mean([run.taken if run.read is None else run.read for run in runs])),
        kl=estimate([run.kl for run in after], [run.kind for run in after], "live"),
        after=_answers(after, lambda run: (run.first, run.later), sum),
        known=_answers(before, lambda run: (run.first,), lambda needles: needles[0]),
        second=_answers(before, lambda run: (run.later,), lambda needles: needles[1]),
        evicted=sum(run.evicted for run in runs),
        samples=len(runs),
        looks_ahead=find_method(runs[0].policy.split(" ", 1)[0])().looks_ahead,
        right_by_kind=_right_by_kind(after),
    )


def _right_by_kind(runs: Sequence[Run]) -> dict[str, Right]:
    """Shares of answer tokens right, of each kind of text that asks for some."""
    found = {}
    for kind in sorted({run.kind for run in runs}):
        mine = [run for run in runs if run.kind == kind]
        counted = [(run.first, run.later, run.full_first, run.full_later) for run in mine]
        first, later, full_first, full_later = np.sum(counted, 0)
        if asked := first[1] + later[1]:
            ours, full = first[0] + later[0], full_first[0] + full_later[0]
            found[kind] = Right(float(ours / asked), float(full / asked))
    return found


def _of(runs: Iterable[Run], setting: str) -> list[Run]:
    return [run for run in runs if run.setting == setting]


def _answers(
    runs: Sequence[Run],
    counts: Callable[[Run], tuple[tuple[int, int], ...]],
    trials: Callable[[tuple[int, int]], int],
) -> Estimate | None:
    """Share of answer tokens right; a needle's tokens are no separate trials."""
    pairs = [pair for run in runs for pair in counts(run)]
    right, asked = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    needles = sum(trials(run.needles) for run in runs)
    return share_right(right / asked, needles) if asked else None
