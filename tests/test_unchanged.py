"""Which figures of a GPU run are worse than the committed ones."""

from __future__ import annotations

from kvtune.benchmarks.unchanged import slowdowns

BEFORE = {
    "plan": {"ms": 5.0, "kernels": [["nvjet_sm90", 90.0, 32.0], ["decode_attention", 40.0, 32.0]]},
    "largest": {"tokens a second": 100.0, "ms": 9.0},
}
AFTER = {
    "plan": {"ms": 5.5, "kernels": [["nvjet_sm90", 99.0, 32.0], ["decode_attention", 30.0, 32.0]]},
    "largest": {"tokens a second": 50.0, "ms": "failed: no room"},
}


def test_slower_is_above_one_whichever_way_a_figure_counts() -> None:
    assert slowdowns(BEFORE, AFTER) == {
        "largest / tokens a second": 2.0,
        "plan / ms": 1.1,
        "plan / kernels / libraries', us": 1.1,
        "plan / kernels / kvtune's, us": 0.75,
    }
    assert set(slowdowns(AFTER, AFTER).values()) == {1.0}


def estimate(low: float, high: float, unit: str, tier: str = "measured") -> dict[str, object]:
    return {"value": (low + high) / 2, "low": low, "high": high, "unit": unit, "tier": tier}


def test_estimates_are_compared_by_the_nearest_ends_of_their_intervals() -> None:
    before = {
        "prefill": estimate(0.5, 0.6, "s"),
        "step": estimate(0.004, 0.006, "s"),
        "tokens_per_second": estimate(400.0, 500.0, "tokens/s"),
        "predicted": estimate(0.1, 0.2, "s", "fitted"),
    }
    after = {
        "prefill": estimate(0.9, 1.0, "s"),
        "step": estimate(0.005, 0.009, "s"),
        "tokens_per_second": estimate(100.0, 200.0, "tokens/s"),
        "predicted": estimate(0.8, 0.9, "s", "fitted"),
    }
    assert slowdowns(before, after) == {
        "tokens_per_second": 2.0,
        "prefill": 0.9 / 0.6,
        "step": 1.0,
    }
