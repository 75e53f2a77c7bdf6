"""What live runs on a few texts say of a model: how far its losses lie from calibrated ones.

A kind of text lies off by what all kinds have in common, by what is its own, and a text of the kind
by what is the text's alone. Runs on n texts of a kind show the first two through the third. The
variance of a kind's own is believed to be ``1 / KIND_TEXTS`` of that between its texts, so that
n / (n + ``KIND_TEXTS``) of what a kind shows is its own (the posterior mean of a random effect),
and the mean of m other texts of the kind lies around what is printed with the variance

    spread of the kind's texts^2 x (1 / (n + KIND_TEXTS) + 1 / m + COMMON)

All of it in logarithms of live over calibrated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRUST = 0.7
"""Share of the level seen on selection samples, over all kinds of text, that is believed of others.

Shares from 0.7 to 0.85 leave held-out samples nearest to what is printed
(``benchmarks/levels_ways.py``).
"""
KIND_TEXTS = 5.0
"""Of how far a kind lies from that level n / (n + this) is believed when n of its texts have run.

Two texts of a kind differ by more than kinds do, so that their level, believed whole, is noise.
Chosen on four runs of two texts a kind (``benchmarks/levels_ways.py``). On four runs of four texts
a kind, which contain those texts, the law above then gives spreads of the right size.
"""
COMMON = 0.1
"""Variance of the error that all kinds share, of that between texts of a kind.

It makes intervals of the mean over kinds hold on runs of two texts a kind; what single kinds'
intervals are hardly depends on it. It and the two weights below were set with all recorded runs in
view; ``benchmarks/results/levels-constants.json`` has what other values would have held.
"""
BELIEVED_BEFORE = 6.0
"""Degrees of freedom of the spread between texts that recorded runs had, beside a search's own."""
BELIEVED_OF_ALL = 4.0
"""Degrees of freedom of the spread over all kinds, in that of a kind (a moderated variance; Smyth
2004)."""


@dataclass(frozen=True)
class Seen:
    """One policy on the texts of a split, each text's losses in the same order.

    Args:
        kinds: of text, n of them.
        calibrated: what was expected, ``[n]`` nats/token.
        live: what was lost, ``[n]`` nats/token.
    """

    kinds: tuple[str, ...]
    calibrated: NDArray[np.float64]
    live: NDArray[np.float64]

    def of(self, kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Calibrated and live losses on the texts of a kind."""
        rows = np.array(self.kinds) == kind
        return self.calibrated[rows], self.live[rows]


@dataclass(frozen=True)
class Levels:
    """What was seen, as far as it is believed, in logarithms of live over calibrated.

    Args:
        common: of all kinds of text.
        apart: how much further each kind lies.
        spreads: standard deviation between texts of each kind.
        spread: the same over all kinds, for a kind that did not run.
        texts: how many of each kind ran.
    """

    common: float
    apart: Mapping[str, float]
    spreads: Mapping[str, float]
    spread: float
    texts: Mapping[str, int]

    def of(self, kind: str) -> float:
        """How far a kind of text lies off."""
        return self.common + self.apart.get(kind, 0.0)

    def deviation(self, means: Mapping[str, float], texts: Mapping[str, int]) -> float:
        """Standard deviation of the logarithm of live over printed, of a mean over kinds.

        Args:
            means: printed losses by kind of text, nats/token.
            texts: how many of each kind the live loss is a mean of.
        """
        total = sum(means.values())
        shares = {kind: mean / total for kind, mean in means.items()}
        own = sum(share**2 * self._own(kind, texts[kind]) for kind, share in shares.items())
        shared = sum(share * self._spread(kind) for kind, share in shares.items()) ** 2
        return float(np.sqrt(own + COMMON * shared))

    def _spread(self, kind: str) -> float:
        return self.spreads.get(kind, self.spread)

    def _own(self, kind: str, texts: int) -> float:
        """Variance of what is a kind's and its texts' own."""
        ran = self.texts.get(kind, 0)
        return self._spread(kind) ** 2 * (1 / (ran + KIND_TEXTS) + 1 / texts)


def levels_of(seen: Sequence[Seen], usual_spread: float) -> Levels | None:
    """What policies that ran show of others; None where none lost anything.

    Args:
        seen: each of them, on the same texts.
        usual_spread: between texts of a kind, as recorded runs had it.
    """
    levels = _by_kind(seen)
    if not levels:
        return None
    middle = float(np.median(list(levels.values())))
    apart = {kind: level - middle for kind, level in levels.items()}
    between = {kind: _between_texts(seen, kind) for kind in levels}
    texts = {kind: len(each) for kind, each in between.items()}
    whole = _spread_of_all(between, apart, usual_spread)
    return Levels(
        common=TRUST * middle,
        apart={kind: texts[kind] / (texts[kind] + KIND_TEXTS) * apart[kind] for kind in apart},
        spreads={kind: _moderated(each, whole) for kind, each in between.items()},
        spread=whole,
        texts=texts,
    )


def _by_kind(seen: Sequence[Seen]) -> dict[str, float]:
    """Logarithm of live over calibrated mean by kind of text, the median over policies."""
    levels = defaultdict(list)
    for one in seen:
        for kind in sorted(set(one.kinds)):
            expected, live = (float(losses.mean()) for losses in one.of(kind))
            if min(expected, live) > 0:
                levels[kind].append(np.log(live / expected))
    return {kind: float(np.median(ratios)) for kind, ratios in levels.items()}


def _between_texts(seen: Sequence[Seen], kind: str) -> NDArray[np.float64]:
    """The same of every text of a kind, the mean over policies, ``[n]``."""
    pairs = [one.of(kind) for one in seen]
    positive = [np.log(y / x) for x, y in pairs if min(x.min(), y.min()) > 0]
    return np.asarray(np.mean(positive, 0)) if positive else np.zeros(1)


def _spread_of_all(
    between: Mapping[str, NDArray[np.float64]], apart: Mapping[str, float], usual: float
) -> float:
    """The spread between texts of a kind that all of them, and the kinds' levels, speak for.

    With n texts each, levels of kinds have 1 / n + 1 / ``KIND_TEXTS`` of the variance of texts.
    """
    squares = sum(map(_squares, between.values()), 0.0)
    freedom: float = sum(len(each) - 1 for each in between.values())
    scales = {kind: 1 / len(each) + 1 / KIND_TEXTS for kind, each in between.items()}
    squares += sum(apart[kind] ** 2 / scales[kind] for kind in apart)
    freedom += len(apart) - 1
    squares, freedom = squares + BELIEVED_BEFORE * usual**2, freedom + BELIEVED_BEFORE
    return float(np.sqrt(squares / freedom))


def _moderated(each: NDArray[np.float64], whole: float) -> float:
    """A kind's own spread, and that of all kinds as if some more texts had shown it."""
    squares = BELIEVED_OF_ALL * whole**2 + _squares(each)
    return float(np.sqrt(squares / (BELIEVED_OF_ALL + len(each) - 1)))


def _squares(each: NDArray[np.float64]) -> float:
    """Sum of squared deviations from the mean."""
    return float(((each - each.mean()) ** 2).sum())


def usual_spread(seen: Sequence[Sequence[Seen]]) -> float:
    """The spread between texts of a kind over several groups of policies, as ``levels_of`` takes.

    Args:
        seen: each group ran on texts of its own.
    """
    each = [_between_texts(group, kind) for group in seen for kind in sorted(set(group[0].kinds))]
    several = [texts for texts in each if len(texts) > 1]
    freedom = sum(len(texts) - 1 for texts in several)
    return float(np.sqrt(sum(map(_squares, several)) / freedom)) if freedom else 0.0
