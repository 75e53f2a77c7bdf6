"""What is said of a loss that was measured at another length, against the recorded run."""

from __future__ import annotations

import json
from pathlib import Path

from kvtune.common.estimate import Estimate
from kvtune.tuner.lengths import LONGER, SHORTER, length_note

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_the_factors_hold_what_every_plan_lost_at_other_lengths() -> None:
    found = json.loads((RESULTS / "lengths-h200.json").read_text())["judged"]
    for pair, times in found["live over live where found"].items():
        home, at = (int(n) for n in pair.split(",")[0].split(" to "))
        low, high = LONGER if at > home else SHORTER
        assert low <= times <= high, pair


def test_the_note_says_where_the_loss_may_lie_at_the_other_length() -> None:
    kl = Estimate(0.01, 0.008, 0.02, "nats/token", "live")
    longer, shorter = length_note(kl, 896, 8192), length_note(kl, 1792, 1024)
    assert "prompts of 896 tokens" in longer
    assert "carried over to 8 192 tokens" in longer
    assert "0.0034 to 0.027 nats" in longer
    assert "On shorter prompts" in shorter
    assert "0.0096 to 0.72 nats" in shorter
