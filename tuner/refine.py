"""Live rounds: what is about to be chosen runs on the selection samples, and predictions learn it.

Run what looks best, refit, choose again, until what is chosen has been run. The first round runs a
few finalists, from which the fit learns; later ones run the new choice alone. Held-out samples take
no part.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvtune.common.progress import Progress
from kvtune.simulator.quality.calibration import Calibration
from kvtune.tuner.answer import Found
from kvtune.tuner.beside import ran_live
from kvtune.tuner.candidate import Candidate, pick
from kvtune.tuner.cross_fit import cross_fitted_front
from kvtune.tuner.explore.record import selection_split
from kvtune.tuner.head_points import BY_HEADS
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.within import stores_alike

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3
FINALISTS = 4
TRUST = 0.7
"""Share of the level seen on selection samples, over all kinds of text, that is believed of others.

Shares from 0.7 to 0.85 leave held-out samples nearest to what is printed
(``benchmarks/predictions_judged.py``).
"""
KIND_TEXTS = 5.0
"""Of how far a kind lies from that level n / (n + this) is believed when n of its texts have run.

Two texts of a kind differ by as much as kinds do, so that their level, believed whole, is noise.
Chosen on four runs, it put 24 of 24 cells of a fifth within 0.8 to 1.25 of what is printed, where
the common level alone puts 21 (``benchmarks/levels_ways.py``).
"""

Lives = Mapping[str, float]
"""Live loss by kind of text, nats/token."""
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
    return taught, min(known, key=lambda each: _mean(measured[each.choice.tobytes()][1]))


def _mean(lives: Lives) -> float:
    return float(np.mean(list(lives.values())))


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
    seen = [
        (source.by_kind(candidate.choice, split), lives)
        for candidate, lives in measured
        if known.levels_all or source.evicts(candidate.choice)
    ]
    further = level_of(seen)
    level = known.level if further is None else (known.level or 0.0) + further
    texts = Counter(sample.kind for sample in source.tables.of_split(split).samples)
    tokens = source.tables.prompt_tokens
    return known.levelled(level, len(measured), tokens, apart_of(seen, texts))


def level_of(seen: Sequence[tuple[Mapping[str, float], Lives]]) -> float | None:
    """How far live losses lie from calibrated ones, as far as that is believed.

    Args:
        seen: both losses by kind of text of each policy that ran, nats/token.

    Returns:
        The logarithm of their ratio, the median over kinds of the median over policies, times
        ``TRUST``; None where nothing ran.
    """
    each = list(_by_kind(seen).values())
    return TRUST * float(np.median(each)) if each else None


def apart_of(
    seen: Sequence[tuple[Mapping[str, float], Lives]], texts: Mapping[str, int]
) -> dict[str, float]:
    """How much further each kind lies, in logarithms, as far as so many of its texts are believed.

    Args:
        seen: as of ``level_of``.
        texts: how many of each kind ran.
    """
    levels = _by_kind(seen)
    middle = float(np.median(list(levels.values()))) if levels else 0.0
    return {
        kind: texts[kind] / (texts[kind] + KIND_TEXTS) * (level - middle)
        for kind, level in levels.items()
    }


def _by_kind(seen: Sequence[tuple[Mapping[str, float], Lives]]) -> dict[str, float]:
    """Logarithm of live over calibrated by kind of text, the median over policies."""
    levels = defaultdict(list)
    for expected, lives in seen:
        for kind, loss in expected.items():
            if min(loss, lives[kind]) > 0:
                levels[kind].append(np.log(lives[kind] / loss))
    return {kind: float(np.median(ratios)) for kind, ratios in levels.items()}


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
        return [{kind: loss.value for kind, loss in one.by_kind.items()} for one in ran]

    return run
