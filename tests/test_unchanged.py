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
