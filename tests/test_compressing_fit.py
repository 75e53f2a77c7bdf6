"""The fit of the rates of compressing prompts, on times that were made up from known rates."""

from __future__ import annotations

import math

import pytest

from kvtune.benchmarks.compressing import METHODS, cases, predicted_ms
from kvtune.benchmarks.compressing_fit import Point, fitted, points, summary
from kvtune.policies.method import find_method
from kvtune.simulator.latency.compression import Rates

CASE = cases(tiny=False)[0]


@pytest.mark.full
def test_rates_are_found_again_in_times_that_were_made_from_them() -> None:
    rates = Rates(bandwidth=0.7, compute=0.2, softmax=0.3, launch_s=5e-6)
    made = [
        Point(case, name, predicted_ms(case, find_method(name)(), rates)[0])
        for case in cases(tiny=False)
        for name in METHODS
    ]
    found = fitted(made)
    assert found.launch_s == pytest.approx(rates.launch_s, rel=0.05)
    assert found.softmax == pytest.approx(rates.softmax, rel=0.1)


def test_what_failed_or_drowns_in_noise_is_no_point() -> None:
    of_case = {
        "reading ms": 100.0 * CASE.batch,
        "snapkv": {"measured": 5.0},
        "h2o": {"measured": 0.5},
        "tova": "OutOfMemoryError: no memory",
    }
    assert points({CASE.name: of_case}) == [Point(CASE, "snapkv", 5.0)]


def test_errors_are_counted_by_their_logarithms() -> None:
    told = summary([1.0, 2.5, 0.8])
    assert told["median error"] == pytest.approx(math.expm1(-math.log(0.8)), abs=1e-3)
    assert told["within 1.5"] == told["within 2"] == pytest.approx(2 / 3, abs=1e-3)
