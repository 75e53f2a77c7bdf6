"""Attention times over batch and length from scattered measured points, for many head geometries.

Each geometry's points are first fitted by ``t = floor + a x work + b x tokens``; what is left, the
logarithm of measured over fitted, varies slowly and is interpolated bilinearly in the logarithms of
batch and length. Points that were not measured are filled in between their neighbours and from the
other geometries by a matrix of low rank. Noise that would make more work take less time is evened
out. Beyond the grid times go on as the fit does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Features = Callable[[FloatArray, FloatArray], FloatArray]
"""Of batch and length arrays: the terms of the fit, along a last axis."""

_RANK, _ROUNDS, _SHRINK = 6, 25, 0.15
_FINER = 4
_FEWEST = 8  # points of a geometry below which it is not fitted


@dataclass(frozen=True, eq=False)
class GeometryGrid:
    """One geometry's times.

    Args:
        batches: ascending.
        lengths: ascending.
        log_s: ``[batches, lengths]`` logarithms of the seconds, falling along neither axis.
        weights: of the fit's terms, seconds; they say how times go on beyond the grid.
        features: terms of the fit.
    """

    batches: FloatArray
    lengths: FloatArray
    log_s: FloatArray
    weights: FloatArray
    features: Features

    def at(self, batch: npt.ArrayLike, length: npt.ArrayLike) -> FloatArray:
        """Seconds at these batches and lengths, broadcast against each other."""
        b, n = np.broadcast_arrays(
            np.asarray(batch, dtype=np.float64), np.maximum(np.asarray(length, np.float64), 1.0)
        )
        inside_b = np.clip(b, self.batches[0], self.batches[-1])
        inside_n = np.clip(n, self.lengths[0], self.lengths[-1])
        rows, row_share = _between(self.batches, inside_b)
        columns, share = _between(self.lengths, inside_n)
        t = self.log_s
        low = t[rows, columns] * (1 - share) + t[rows, columns + 1] * share
        high = t[rows + 1, columns] * (1 - share) + t[rows + 1, columns + 1] * share
        seconds = np.exp(low * (1 - row_share) + high * row_share)
        if np.array_equal(inside_b, b) and np.array_equal(inside_n, n):
            return np.asarray(seconds)
        beyond = (self.features(b, n) @ self.weights) / (
            self.features(inside_b, inside_n) @ self.weights
        )
        return np.asarray(seconds * beyond)


def _between(points: FloatArray, asked: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Index of the point below and the share of the way to the next in logarithms, within 0-1."""
    logs = np.log(points)
    index = np.clip(np.searchsorted(points, asked, side="right") - 1, 0, len(points) - 2)
    share = (np.log(asked) - logs[index]) / (logs[index + 1] - logs[index])
    return index, np.clip(share, 0.0, 1.0)


def fit_grids(
    geometries: list[dict[tuple[int, int], float]], features: Features
) -> list[GeometryGrid | None]:
    """Grids of several geometries of one kernel.

    Args:
        geometries: of each, seconds by batch and length.
        features: terms of the fit.

    Returns:
        In the same order; None where a geometry has too few points.
    """
    batches = _axis({b for points in geometries for b, _ in points})
    lengths = _axis({n for points in geometries for _, n in points})
    grid = np.meshgrid(batches, lengths, indexing="ij")
    terms = features(grid[0], grid[1])
    weights, residuals, kept = [], [], []
    for index, points in enumerate(geometries):
        logs = _matrix(points, batches, lengths)
        if np.sum(~np.isnan(logs)) < _FEWEST:
            continue
        fitted = _fit(terms, logs)
        weights.append(fitted)
        residuals.append(logs - np.log(terms @ fitted))
        kept.append(index)
    found: list[GeometryGrid | None] = [None] * len(geometries)
    for index, weight, filled in zip(kept, weights, _complete(residuals), strict=True):
        found[index] = _grid(batches, lengths, weight, filled, features)
    return found


def _grid(
    batches: FloatArray,
    lengths: FloatArray,
    weights: FloatArray,
    residual: FloatArray,
    features: Features,
) -> GeometryGrid:
    """Fit and residual put together on a finer grid, then made to fall nowhere."""
    rows, columns = _finer(batches), _finer(lengths)
    across = np.array([np.interp(np.log(columns), np.log(lengths), row) for row in residual])
    fine = np.array([np.interp(np.log(rows), np.log(batches), one) for one in across.T]).T
    grid = np.meshgrid(rows, columns, indexing="ij")
    logs = np.log(features(grid[0], grid[1]) @ weights) + fine
    for axis in (0, 1):
        rising = np.maximum.accumulate(logs, axis=axis)
        falling = np.flip(np.minimum.accumulate(np.flip(logs, axis), axis=axis), axis)
        logs = (rising + falling) / 2
    return GeometryGrid(rows, columns, logs, weights, features)


def _finer(axis: FloatArray) -> FloatArray:
    """With so many points more between each two, evenly in the logarithms."""
    places = np.arange(_FINER * (len(axis) - 1) + 1) / _FINER
    return np.asarray(np.exp(np.interp(places, np.arange(len(axis)), np.log(axis))))


def _axis(values: set[int]) -> FloatArray:
    """Ascending; with a second point where there is one alone, so that there is a between."""
    found = sorted(values)
    return np.array(found if len(found) > 1 else [*found, found[0] + 1], dtype=np.float64)


def _matrix(
    points: dict[tuple[int, int], float], batches: FloatArray, lengths: FloatArray
) -> FloatArray:
    logs = np.full((len(batches), len(lengths)), np.nan)
    rows = np.searchsorted(batches, [b for b, _ in points])
    columns = np.searchsorted(lengths, [n for _, n in points])
    logs[rows, columns] = np.log(list(points.values()))
    return logs


def _fit(terms: FloatArray, logs: FloatArray) -> FloatArray:
    """Weights, none negative, that make relative errors small; never zero in all terms."""
    from scipy.optimize import nnls  # takes half a second to import, and most commands fit nothing

    known = ~np.isnan(logs)
    seconds = np.exp(logs[known])
    weights, _ = nnls(terms[known] / seconds[:, None], np.ones(len(seconds)))
    return np.asarray(weights + 1e-12)


def _complete(residuals: list[FloatArray]) -> list[FloatArray]:
    """The residuals without holes: half from neighbours, half from the other geometries."""
    if not residuals:
        return []
    near = [_fill(residual) for residual in residuals]
    if len(residuals) < 4:
        return near
    known = np.array([~np.isnan(residual).ravel() for residual in residuals])
    start = np.array([filled.ravel() for filled in near])
    filled = start.copy()
    for _ in range(_ROUNDS):
        left, sizes, right = np.linalg.svd(filled, full_matrices=False)
        sizes = np.maximum(sizes - _SHRINK, 0.0)
        sizes[_RANK:] = 0.0
        filled = np.where(known, start, (left * sizes) @ right)
    return [row.reshape(near[0].shape) for row in (filled + start) / 2]


def _fill(residual: FloatArray) -> FloatArray:
    """Holes between two known points on their line in index, weighted by nearness; else nearest."""
    filled = residual.copy()
    known = ~np.isnan(residual)
    for row, column in zip(*np.nonzero(~known), strict=True):
        guesses = [
            guess
            for values, seen, at in (
                (residual[row], known[row], column),
                (residual[:, column], known[:, column], row),
            )
            if (guess := _on_line(values, seen, at)) is not None
        ]
        if guesses:
            weights = [1 / gap**2 for _, gap in guesses]
            filled[row, column] = np.average([value for value, _ in guesses], weights=weights)
    return _spread(filled)


def _on_line(values: FloatArray, known: npt.NDArray[np.bool_], at: int) -> tuple[float, int] | None:
    """Between the nearest known points on both sides, with the distance between these."""
    places = np.nonzero(known)[0]
    after = int(np.searchsorted(places, at))
    if after in (0, len(places)):
        return None
    low, high = int(places[after - 1]), int(places[after])
    share = (at - low) / (high - low)
    return float(values[low] * (1 - share) + values[high] * share), high - low


def _spread(filled: FloatArray) -> FloatArray:
    """What is still unknown takes the residual of the nearest cell by index."""
    unknown = np.isnan(filled)
    if unknown.any():
        places = np.argwhere(~unknown)
        for row, column in np.argwhere(unknown):
            nearest = np.argmin(np.sum((places - (row, column)) ** 2, axis=1))
            filled[row, column] = filled[tuple(places[nearest])]
    return filled
