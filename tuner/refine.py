"""Live rounds: what is about to be chosen runs on the selection samples, and predictions learn it.

Run what looks best, refit, choose again, until what is chosen has been run. The first round runs a
few finalists, from which the fit learns; later ones run the new choice alone. Held-out samples take
no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvtune.common.progress import Progress
from kvtune.simulator.quality.calibration import Calibration
from kvtune.simulator.quality.levels import Seen, levels_of
from kvtune.tuner.answer import Found
from kvtune.tuner.beside import ran_live
from kvtune.tuner.candidate import Candidate, pick
from kvtune.tuner.cross_fit import cross_fitted_front
from kvtune.tuner.explore.record import selection_split
from kvtune.tuner.head_points import BY_HEADS
from kvtune.tuner.quality import mean_over_kinds
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.within import stores_alike

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3
FINALISTS = 4
Lives = Sequence[float]
"""Live loss of every selection sample, nats/token."""
RunLive = Callable[[Sequence[Candidate]], Sequence[Lives]]


def refine(found: Found, run: RunLive) -> tuple[Found, Candidate]:
    """The study with what live runs have taught, and the plan to choose.

    Args:
        found: a finished study, calibrated as the package says.
        run: runs candidates on the selection samples.
    """
    measured: dict[bytes, tuple[Candidate, Lives]] = {}
    taught = found
    for _ in range(ROUNDS):
        finalists = _finalists(taught)
        if finalists[0].choice.tobytes() in measured:
            break
        waiting = finalists[:1] if measured else finalists
        for candidate, lives in zip(waiting, run(waiting), strict=True):
            measured[candidate.choice.tobytes()] = candidate, lives
        taught = recalibrated(found, _levelled(found.source, list(measured.values())))
    finalists = _finalists(taught)
    if finalists[0].choice.tobytes() not in measured:
        return taught, finalists[0]
    known = [each for each in finalists if each.choice.tobytes() in measured]
    kinds = _selected_kinds(found.source)
    return taught, min(
        known, key=lambda each: mean_over_kinds(measured[each.choice.tobytes()][1], kinds)
    )


def _selected_kinds(source: QualitySource) -> list[str]:
    """The kinds of text of the selection samples."""
    split = selection_split(source.tables)
    return [sample.kind for sample in source.tables.of_split(split).samples]


def recalibrated(found: Found, calibration: Calibration) -> Found:
    """The study with every plan's loss calibrated in another way."""
    source = replace(found.source, calibration=calibration)
    split = selection_split(source.tables)
    expected = [replace(c, kl=source.value_of(c.choice, split)) for c in found.expected]
    return replace(found, source=source, expected=expected)


def _finalists(found: Found) -> list[Candidate]:
    """The pick of the front, and the best others with no fewer at once; the pick first.

    Plans that follow head scores, and rules, are run whatever the tables say of them.
    """
    best = pick(cross_fitted_front(found.source, found.expected), found.request.largest_kl)
    others = [c for c in found.expected if c.place == best.place and c.sequences >= best.sequences]
    ranked = [best, *sorted(others, key=lambda c: c.kl)]
    each = list({c.choice.tobytes(): c for c in reversed(ranked)}.values())[::-1]
    tables = found.source.tables
    return each[:FINALISTS] + [
        c for c in each[FINALISTS:] if BY_HEADS in c.parameters or tables.rule_of(c.choice)
    ]


def _levelled(source: QualitySource, measured: Sequence[tuple[Candidate, Lives]]) -> Calibration:
    """The calibration moved to what plans have lost that evict, or all for some stacks."""
    split, known = selection_split(source.tables), source.calibration
    kinds = tuple(_selected_kinds(source))
    seen = [
        Seen(kinds, source.expected(candidate.choice, split)[0], np.array(lives, float))
        for candidate, lives in measured
        if known.levels_all or source.evicts(candidate.choice)
    ]
    return known.levelled(levels_of(seen, known.after_rounds.spread), len(measured))


def live_on_selection(found: Found, progress: Progress) -> RunLive | None:
    """How to run candidates; None without weights or selection samples."""
    trace, loaded = found.source.trace, found.source.loaded
    if trace is None or loaded is None or not (selection := trace.of_split("select")):
        return None

    uncompressed: dict[str, Tensor] = {}  # the rounds' samples are the same

    def run(candidates: Sequence[Candidate]) -> list[Lives]:
        ran = ran_live(
            found.source,
            [found.solver.policy(each) for each in candidates],
            selection,
            stored_alike=stores_alike(found.request.stack),
            progress=progress,
            uncompressed=uncompressed,
        )
        return [one.losses for one in ran]

    return run
