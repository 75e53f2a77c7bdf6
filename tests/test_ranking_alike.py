"""What a few policies are off by, carried over to others: planted errors are found again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

POLICIES = 60


@pytest.fixture(scope="module")
def alike() -> ModuleType:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("ranking_alike")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def covariance(alike: ModuleType) -> NDArray[np.float64]:
    """Of policies in two groups that point apart, of all sizes."""
    points = np.repeat(np.eye(2), POLICIES // 2, 0) + 0.05
    points += np.random.default_rng(0).normal(0, 0.05, points.shape)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    said = np.tile(np.linspace(-6, 0, POLICIES // 2), 2)
    evicting = np.repeat([0.0, 1.0], POLICIES // 2)
    return np.asarray(alike.kernel(said, evicting, points @ points.T))


def test_what_likes_share_is_found_from_a_few_of_them(
    alike: ModuleType, covariance: NDArray[np.float64]
) -> None:
    off = np.repeat([0.2, 1.2], POLICIES // 2)
    rows = np.arange(0, POLICIES, 6)
    found = alike.carried(off[rows], covariance, rows)
    assert found == pytest.approx(off, abs=0.1)
    assert alike.carried(np.zeros(len(rows)), covariance, rows) == pytest.approx(0 * off)


def test_more_runs_are_never_worse_where_errors_are_as_the_process_believes(
    alike: ModuleType, covariance: NDArray[np.float64]
) -> None:
    rng, left = np.random.default_rng(1), []
    for count in (4, 8, 16, 32):
        rows = np.linspace(0, POLICIES - 1, count).astype(int)
        squares = []
        for _ in range(60):
            truth = rng.multivariate_normal(np.zeros(POLICIES), covariance)
            seen = truth[rows] + rng.normal(0, alike.NOISE, count)
            squares.append(np.mean((alike.carried(seen, covariance, rows) - truth) ** 2))
        left.append(np.mean(squares))
    assert left == sorted(left, reverse=True)
