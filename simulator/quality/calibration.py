"""From predicted to live: how many times its prediction a policy loses, by regime and size.

Prediction is of second order and open loop. What that leaves out depends on what is done: storing
in fewer bits hardly differs from its prediction, a token that is gone errs at every layer and the
errors feed on each other, and where the text asks for what was read this hurts most. So there is a
curve for each of the three, ratio against predicted loss, with the scatter that was seen on texts
and policies that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtune.common.bounds import Finite, Name, NotNegative, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.stored import checked
from kvtune.simulator.quality.levels import Levels

Regime = Literal["quantising", "evicting", "evicting what is asked for"]
ASKED = frozenset(
    ("retrieval", "recall", "copy", "single", "multikey", "tracking", "common", "frequent", "turns",
     "instruction", "leak")
)  # fmt: skip
"""Kinds of text whose observed tokens ask for what the prompt said."""

_SMALLEST = 1e-7  # nats/token: below this a prediction is rounding
_STEP = float(np.log(2.5))  # between knots
_SMOOTHNESS = 3.0
_ROUNDS = 20
_LEAST_RESIDUAL = 0.03


def regime_of(kind: str, evicts: bool) -> Regime:
    """Which curve a policy follows on a kind of text."""
    if not evicts:
        return "quantising"
    return "evicting what is asked for" if kind.split(",")[0] in ASKED else "evicting"


@dataclass(frozen=True)
class Curve:
    """Logarithm of live over predicted, linear between knots and constant beyond them.

    Args:
        knots: predicted losses, rising, nats/token; none leaves predictions as they are.
        log_ratios: at each of them.
        residuals: logarithms of live over calibrated where it was not fitted, rising.
    """

    knots: tuple[float, ...] = ()
    log_ratios: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()

    def value(self, predicted: float) -> float:
        """What a live run should show, nats/token."""
        if predicted <= _SMALLEST or not self.knots:
            return predicted
        at = np.interp(np.log(predicted), np.log(self.knots), self.log_ratios)
        return float(predicted * np.exp(at))

    def levelled(self, level: float) -> Curve:
        """The same with all ratios ``level`` higher, in logarithms."""
        ratios = tuple(ratio + level for ratio in self.log_ratios) or (level,)
        return replace(self, knots=self.knots or (1.0,), log_ratios=ratios)

    def believed(self, share: float) -> Curve:
        """The same with ratios nearer to one: a share of their logarithms."""
        return replace(self, log_ratios=tuple(share * ratio for ratio in self.log_ratios))

    def reach(self, level: float) -> float:
        """How far live lies from calibrated, to either side, with probability ``level``.

        Of a model that nobody has run it is not known to which side of the curve it lies.
        """
        return conformal([abs(residual) for residual in self.residuals], level)


def conformal(sizes: Sequence[float], level: float) -> float:
    """What the next size is below with a probability (split conformal; Vovk et al. 2005)."""
    count = len(sizes)
    return sorted(sizes)[min(int(np.ceil((count + 1) * level)), count) - 1] if count else 0.0


@dataclass(frozen=True)
class AfterRounds:
    """What recorded runs were off by after live rounds, none by what was fitted on itself.

    Args:
        spread: standard deviation between texts of a kind, of the logarithm of live over printed.
        sizes: how many of its standard deviations each plan lay off by, rising.
    """

    spread: float = 0.0
    sizes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """A curve a regime, and the model's level where live runs have shown it.

    Args:
        curves: by regime; one that is missing leaves predictions as they are.
        after_rounds: how far live losses are from what is printed once the level is known.
        level: logarithm of live over what the curves say that is usual of a stack.
        levels: what live runs have shown beside it of policies that evict; None before any ran.
        levels_all: whether both are of all policies: of a stack that also stores answers.
        runs: live runs of a policy on a sample that are behind it; 0 for none.
    """

    curves: Mapping[Regime, Curve] = field(default_factory=dict)
    after_rounds: AfterRounds = AfterRounds()
    level: float = 0.0
    levels: Levels | None = None
    levels_all: bool = False
    runs: int = 0

    def curve(self, kind: str, evicts: bool) -> Curve:
        """What holds for a policy on a kind of text."""
        curve = self.curves.get(regime_of(kind, evicts), Curve())
        if not self._levels(evicts):
            return curve
        return curve.levelled(self.level + (self.levels.of(kind) if self.levels else 0.0))

    def _levels(self, evicts: bool) -> bool:
        """Whether a level is known that a policy follows."""
        return (evicts or self.levels_all) and (self.levels is not None or self.level != 0)

    def value(self, predicted: float, kind: str, evicts: bool) -> float:
        """What a live run on a kind of text should show, nats/token."""
        return self.curve(kind, evicts).value(predicted)

    def by_kind(self, losses: ArrayLike, kinds: Sequence[str], evicts: bool) -> dict[str, float]:
        """Calibrated means of a policy's predicted losses on samples, by kind of text."""
        array, labels = np.asarray(losses, float), np.asarray(kinds)
        return {
            kind: self.value(float(array[labels == kind].mean()), kind, evicts)
            for kind in sorted(set(kinds))
        }

    def applied(self, losses: ArrayLike, kinds: Sequence[str], evicts: bool) -> NDArray[np.float64]:
        """Losses on samples, those of a kind scaled alike, so that their means are calibrated."""
        array, means = np.asarray(losses, float), self.by_kind(losses, kinds, evicts)
        labels = np.asarray(kinds)
        before = {kind: float(array[labels == kind].mean()) for kind in means}
        scales = {kind: means[kind] / before[kind] if before[kind] else 1.0 for kind in means}
        return np.asarray(array * np.array([scales[kind] for kind in kinds]))

    def mean(self, losses: ArrayLike, kinds: Sequence[str], evicts: bool) -> float:
        """The same over kinds that count alike."""
        return float(np.mean(list(self.by_kind(losses, kinds, evicts).values())))

    def reach(
        self, means: Mapping[str, float], texts: Mapping[str, int], evicts: bool, level: float
    ) -> float:
        """How far a live mean over kinds may lie from the calibrated one, in logarithms.

        Args:
            means: calibrated losses by kind of text, nats/token.
            texts: how many texts of each kind the live loss is a mean of.
            evicts: whether the policy keeps less than all tokens.
            level: probability that it lies no further, to either side.
        """
        if self.levels is None or not self.after_rounds.sizes or not self._levels(evicts):
            return float(np.mean([self.curve(kind, evicts).reach(level) for kind in means]))
        return conformal(self.after_rounds.sizes, level) * self.levels.deviation(means, texts)

    def levelled(self, levels: Levels | None, runs: int) -> Calibration:
        """With what live runs have shown beside it; None where none of them evicted."""
        return replace(self, levels=levels, runs=self.runs + runs)


NONE = Calibration()


@dataclass(frozen=True)
class _StoredCurve:
    knots: tuple[NotNegative, ...]
    log_ratios: tuple[Finite, ...]
    residuals: tuple[Finite, ...]


@dataclass(frozen=True)
class _StoredAfterRounds:
    spread: NotNegative
    sizes: tuple[NotNegative, ...]


@dataclass(frozen=True)
class _Stored:
    """The form of a calibration in a file; what belongs to one search is not stored."""

    format: Literal[4]
    made_by: Name
    runs: Whole
    curves: dict[Regime, _StoredCurve]
    after_rounds: _StoredAfterRounds


def read_calibration(plain: Any, where: str) -> Calibration:
    """A calibration from JSON.

    Raises:
        KvtuneError: it is none, or its curves do not fit together.
    """
    stored = checked(_Stored, plain, where, "install kvtune again.")
    for regime, curve in stored.curves.items():
        if len(curve.knots) != len(curve.log_ratios) or list(curve.knots) != sorted(curve.knots):
            raise KvtuneError(f"the knots of {regime!r} do not fit its ratios", where=where)
        if list(curve.residuals) != sorted(curve.residuals):
            raise KvtuneError(f"the residuals of {regime!r} are not in order", where=where)
    after = AfterRounds(stored.after_rounds.spread, stored.after_rounds.sizes)
    if list(after.sizes) != sorted(after.sizes):
        raise KvtuneError("the sizes after rounds are not in order", where=where)
    curves = {
        regime: Curve(curve.knots, curve.log_ratios, curve.residuals)
        for regime, curve in stored.curves.items()
    }
    return Calibration(curves, after, runs=stored.runs)


def write_calibration(calibration: Calibration, made_by: str) -> dict[str, Any]:
    """The form that goes into JSON."""

    def rounded(row: Sequence[float]) -> list[float]:
        return [float(f"{x:.5g}") for x in row]

    curves = {
        regime: {
            "knots": rounded(curve.knots),
            "log_ratios": rounded(curve.log_ratios),
            "residuals": rounded(curve.residuals),
        }
        for regime, curve in calibration.curves.items()
    }
    after = calibration.after_rounds
    spread, sizes = rounded([after.spread])[0], rounded(after.sizes)
    return {
        "format": 4,
        "made_by": made_by,
        "runs": calibration.runs,
        "curves": curves,
        "after_rounds": {"spread": spread, "sizes": sizes},
    }


def fit_curve(predicted: ArrayLike, live: ArrayLike) -> Curve:
    """A smooth curve through pairs of losses, by least absolute deviations.

    Args:
        predicted: of policies on kinds of text, nats/token.
        live: the same, run.
    """
    x, y = np.asarray(predicted, float), np.asarray(live, float)
    real = (x > _SMALLEST) & (y > _SMALLEST)
    x, y = np.log(x[real]), np.log(y[real])
    if not len(x):
        return Curve()
    count = max(int(np.ceil(np.ptp(x) / _STEP)), 1) + 1
    knots = np.linspace(x.min(), max(x.max(), x.min() + 1e-6), count)
    return Curve(tuple(np.exp(knots).tolist()), tuple(_smooth(knots, x, y - x).tolist()))


def _smooth(
    knots: NDArray[np.float64], x: NDArray[np.float64], ratio: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Values at the knots: absolute deviations by reweighting, neighbours differing little."""
    basis = np.stack([np.interp(x, knots, row) for row in np.eye(len(knots))], 1)
    steps = np.sqrt(_SMOOTHNESS) * np.diff(np.eye(len(knots)), axis=0)
    weights = np.ones(len(x))
    values = np.zeros(len(knots))
    for _ in range(_ROUNDS):
        left = np.concatenate([basis * weights[:, None] ** 0.5, steps])
        right = np.concatenate([ratio * weights**0.5, np.zeros(len(steps))])
        values = np.linalg.lstsq(left, right)[0]
        weights = 1 / np.maximum(np.abs(ratio - basis @ values), _LEAST_RESIDUAL)
        weights *= len(weights) / weights.sum()
    return values


def fit_left_out(
    predicted: ArrayLike, live: ArrayLike, groups: Sequence[object], believed: float = 1.0
) -> Curve:
    """A curve with the scatter that is seen when each group in turn is left out of the fit.

    Args:
        predicted: as of ``fit_curve``.
        live: likewise.
        groups: what belongs together, one a pair: a text, a model.
        believed: share of what one group shows that is believed of another.
    """
    x, y = np.asarray(predicted, float), np.asarray(live, float)
    numbers = np.unique(list(groups), return_inverse=True)[1]
    residuals: list[float] = []
    for number in range(int(numbers.max()) + 1 if len(numbers) else 0):
        mine = numbers == number
        rest = fit_curve(x[~mine], y[~mine]).believed(believed)
        residuals += [
            float(np.log(b / rest.value(a)))
            for a, b in zip(x[mine], y[mine], strict=True)
            if min(a, b) > _SMALLEST
        ]
    whole = fit_curve(x, y).believed(believed)
    return replace(whole, residuals=thinned(residuals))


def thinned(values: Sequence[float], most: int = 199) -> tuple[float, ...]:
    """Evenly spaced order statistics, so that a file stays small."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return tuple(ordered)
    at = np.linspace(0, len(ordered) - 1, most).round().astype(int)
    return tuple(ordered[row] for row in at)
