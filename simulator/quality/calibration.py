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

from kvtune.common.bounds import Count, Finite, Name, NotNegative, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.stored import checked

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
        levelled_residuals: the same where live rounds had first shown the model's level, by the
            tokens of the prompts that it was seen on.
    """

    knots: tuple[float, ...] = ()
    log_ratios: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()
    levelled_residuals: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def value(self, predicted: float) -> float:
        """What a live run should show, nats/token."""
        if predicted <= _SMALLEST or not self.knots:
            return predicted
        at = np.interp(np.log(predicted), np.log(self.knots), self.log_ratios)
        return float(predicted * np.exp(at))

    def levelled(self, level: float, prompt_tokens: int) -> Curve:
        """The same with all ratios ``level`` higher, in logarithms, and what then is left."""
        ratios = tuple(ratio + level for ratio in self.log_ratios) or (level,)
        left = self.left_at(prompt_tokens)
        return replace(self, knots=self.knots or (1.0,), log_ratios=ratios, residuals=left)

    def left_at(self, prompt_tokens: int) -> tuple[float, ...]:
        """The residuals after live rounds that were seen on prompts nearest in length.

        Short samples observe fewer tokens, and their losses scatter more.
        """
        if not self.levelled_residuals:
            return self.residuals
        lengths = self.levelled_residuals
        return lengths[min(lengths, key=lambda n: abs(np.log(n / prompt_tokens)))]

    def believed(self, share: float) -> Curve:
        """The same with ratios nearer to one: a share of their logarithms."""
        return replace(self, log_ratios=tuple(share * ratio for ratio in self.log_ratios))

    def scatter(self, level: float) -> tuple[float, float]:
        """Least and greatest log ratio of live over calibrated, with probability ``level``.

        Split conformal (Vovk et al. 2005) on the residuals' sizes: of a model that nobody has run
        it is not known to which side of the curve it lies.
        """
        count = len(self.residuals)
        if not count:
            return 0.0, 0.0
        sizes = sorted(abs(residual) for residual in self.residuals)
        reach = sizes[min(int(np.ceil((count + 1) * level)), count) - 1]
        return -reach, reach


@dataclass(frozen=True)
class Calibration:
    """A curve a regime, and the model's level where live runs have shown it.

    Args:
        curves: by regime; one that is missing leaves predictions as they are.
        level: logarithm of live over what the curves say of evicting policies; None where none
            was run.
        levels_all: whether the level is that of all policies: of a stack that also stores answers.
        apart: how much further than that live losses on a kind of text lie.
        prompt_tokens: of the samples that showed the level.
        runs: live runs of a policy on a sample that are behind it; 0 for none.
    """

    curves: Mapping[Regime, Curve] = field(default_factory=dict)
    level: float | None = None
    levels_all: bool = False
    runs: int = 0
    prompt_tokens: int = 1
    apart: Mapping[str, float] = field(default_factory=dict)

    def curve(self, kind: str, evicts: bool) -> Curve:
        """What holds for a policy on a kind of text."""
        curve = self.curves.get(regime_of(kind, evicts), Curve())
        if self.level is None or not (evicts or self.levels_all):
            return curve
        return curve.levelled(self.level + self.apart.get(kind, 0.0), self.prompt_tokens)

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

    def factors(self, kinds: Sequence[str], evicts: bool, level: float) -> tuple[float, float]:
        """How far below and above its calibrated value a mean over kinds may lie."""
        each = [self.curve(kind, evicts).scatter(level) for kind in set(kinds)]
        low, high = np.mean(each, 0) if each else (0.0, 0.0)
        return float(np.exp(low)), float(np.exp(high))

    def levelled(
        self,
        level: float | None,
        runs: int,
        prompt_tokens: int,
        apart: Mapping[str, float] | None = None,
    ) -> Calibration:
        """With what live runs have shown beside it; None where none of them evicted."""
        return replace(
            self, level=level, runs=self.runs + runs, prompt_tokens=prompt_tokens,
            apart=apart or {},
        )  # fmt: skip


NONE = Calibration()


@dataclass(frozen=True)
class _StoredResiduals:
    prompt_tokens: Count
    residuals: tuple[Finite, ...]


@dataclass(frozen=True)
class _StoredCurve:
    knots: tuple[NotNegative, ...]
    log_ratios: tuple[Finite, ...]
    residuals: tuple[Finite, ...]
    levelled_residuals: tuple[_StoredResiduals, ...]


@dataclass(frozen=True)
class _Stored:
    """The form of a calibration in a file; what belongs to one search is not stored."""

    format: Literal[3]
    made_by: Name
    runs: Whole
    curves: dict[Regime, _StoredCurve]


def read_calibration(plain: Any, where: str) -> Calibration:
    """A calibration from JSON.

    Raises:
        KvtuneError: it is none, or its curves do not fit together.
    """
    stored = checked(_Stored, plain, where, "install kvtune again.")
    for regime, curve in stored.curves.items():
        if len(curve.knots) != len(curve.log_ratios) or list(curve.knots) != sorted(curve.knots):
            raise KvtuneError(f"the knots of {regime!r} do not fit its ratios", where=where)
        after = (each.residuals for each in curve.levelled_residuals)
        for residuals in (curve.residuals, *after):
            if list(residuals) != sorted(residuals):
                raise KvtuneError(f"the residuals of {regime!r} are not in order", where=where)
    curves = {
        regime: Curve(
            curve.knots,
            curve.log_ratios,
            curve.residuals,
            {each.prompt_tokens: each.residuals for each in curve.levelled_residuals},
        )
        for regime, curve in stored.curves.items()
    }
    return Calibration(curves, runs=stored.runs)


def write_calibration(calibration: Calibration, made_by: str) -> dict[str, Any]:
    """The form that goes into JSON."""

    def rounded(row: Sequence[float]) -> list[float]:
        return [float(f"{x:.5g}") for x in row]

    curves = {
        regime: {
            "knots": rounded(curve.knots),
            "log_ratios": rounded(curve.log_ratios),
            "residuals": rounded(curve.residuals),
            "levelled_residuals": [
                {"prompt_tokens": length, "residuals": rounded(left)}
                for length, left in sorted(curve.levelled_residuals.items())
            ],
        }
        for regime, curve in calibration.curves.items()
    }
    return {"format": 3, "made_by": made_by, "runs": calibration.runs, "curves": curves}


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
