"""What is said of a loss at another length than it was measured at, against the recorded runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import BAND, Estimate
from kvtune.common.progress import Silent
from kvtune.policies.method import Method
from kvtune.policies.methods.attention_matching import AttentionMatching
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.tests.made_up import llama
from kvtune.tuner import answer
from kvtune.tuner.checks import check_request
from kvtune.tuner.lengths import (
    FITTED_ON,
    LONGER,
    SHORTER,
    Carried,
    carried_to,
    length_note,
    lengths_to_run,
)
from kvtune.tuner.search_options import search_request

ROOT = Path(__file__).parents[1]
JUDGED = json.loads((ROOT / FITTED_ON).read_text())
LIVE = Estimate(0.01, 0.008, 0.02, "nats/token", "live")


def ratios(longer: bool, floors: bool) -> list[tuple[float, float]]:
    """Logarithms of prompt tokens and of losses, straight from the files that were judged."""
    found = []
    for name in JUDGED["recorded"]:
        recorded = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        losses = recorded["losses at"]
        observed = 64 if "C=64" in recorded.get("workload", "") else 128
        home = {
            (row["found at"], row["share"]): row["live"]
            for at, rows in losses.items()
            for row in rows
            if row["found at"] == int(at)
        }
        for at, rows in losses.items():
            for row in rows:
                was, here = row["found at"], int(at)
                if was != here and (here > was) == longer and row.get("floors", False) == floors:
                    there = sum(row["live"]) / sum(home[was, row["share"]])
                    found.append((math.log((here - observed) / (was - observed)), math.log(there)))
    return found


@pytest.mark.parametrize(
    ("name", "carried", "longer"),
    [("longer", LONGER, True), ("shorter, with floors", SHORTER, False)],
)
def test_the_power_is_that_of_least_squares_on_the_recorded_runs(
    name: str, carried: Carried, longer: bool
) -> None:
    rows = ratios(longer, not longer)
    power = sum(x * y for x, y in rows) / sum(x * x for x, _ in rows)
    assert carried.power == JUDGED[name]["power"] == round(power, 3)
    assert carried.reach == JUDGED[name]["reach"]
    assert carried.most == JUDGED[name]["most"]
    assert len(rows) == JUDGED[name]["plans"]


@pytest.mark.parametrize(
    ("carried", "longer"), [(LONGER, True), (SHORTER, False)], ids=["longer", "shorter"]
)
def test_the_interval_holds_at_least_three_quarters_of_the_recorded_plans(
    carried: Carried, longer: bool
) -> None:
    held = []
    for lengths, losses in ratios(longer, not longer):
        _, low, high = carried.times(math.exp(lengths))
        held.append(low <= math.exp(losses) <= high)
    assert sum(held) >= 0.75 * len(held)


def test_the_interval_for_longer_prompts_holds_what_was_left_out_as_often_as_it_says() -> None:
    for left_out, held in JUDGED["longer"]["held with one left out"].items():
        assert 0.75 <= held <= 0.9, left_out


@pytest.mark.parametrize("carried", [LONGER, SHORTER])
def test_the_factor_goes_one_way_with_length_and_not_beyond_what_was_run(carried: Carried) -> None:
    steps = [carried.times(2**n)[0] for n in range(-8, 9)]
    assert steps in (sorted(steps), sorted(steps, reverse=True))
    assert carried.times(1.0)[0] == 1.0
    assert carried.times(2.0**20) == carried.times(carried.most)
    assert carried.times(2.0**-20) == carried.times(1 / carried.most)


def test_a_loss_is_carried_with_its_interval_and_a_band_with_both_ends() -> None:
    value, low, high = LONGER.times(8.0)
    there = carried_to(LIVE, 1024, 8192)
    assert there.prompt_tokens == 8192
    assert there.samples == 0
    assert there.kl == Estimate(0.01 * value, 0.01 * low, 0.01 * high, "nats/token", "fitted")
    band = carried_to(Estimate(0.01, 0.008, 0.02, "nats/token", BAND), 1024, 8192).kl
    assert (band.low, band.high, band.tier) == (0.008 * low, 0.02 * high, BAND)
    shorter = carried_to(LIVE, 1792, 896).kl
    assert shorter.value == pytest.approx(0.01 * 0.5**SHORTER.power)


def test_the_note_says_what_is_expected_or_what_was_measured() -> None:
    fitted = length_note(carried_to(LIVE, 896, 8192), 896)
    assert "measured on prompts of 896 tokens" in fitted
    assert "heads keep shares of the prompt" in fitted
    assert FITTED_ON in fitted
    shorter = length_note(carried_to(LIVE, 1792, 896), 1792)
    assert "heads keep as many tokens as of prompts of 1 792 tokens" in shorter


def test_lengths_that_no_plan_could_run_at_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match="no weights of llama-3"):
        check_request(llama(tmp_path, lengths=(448,)))
    with pytest.raises(KvtuneError, match="takes 8 192 tokens, not 16 384 tokens"):
        search_request("smollm2-135m", "4090", "1GiB", run_dir=tmp_path, lengths="2k,16k")
    assert search_request(
        "smollm2-135m", "4090", "1GiB", run_dir=tmp_path, lengths="2k, 448,2048"
    ).lengths == (2048, 448)


def test_a_plan_runs_at_the_lengths_asked_for_and_at_its_context_on_a_gpu(tmp_path: Path) -> None:
    request = llama(tmp_path)
    assert lengths_to_run(request, "cpu", 896, 8192) == []
    assert lengths_to_run(request, "cuda", 896, 8192) == [8192]
    assert lengths_to_run(request, "cuda", 896, 896) == []
    assert lengths_to_run(request, "cuda", 896, 64 * 1024) == []
    asked = llama(tmp_path, lengths=(448, 896))
    assert lengths_to_run(asked, "cpu", 896, 8192) == [448]


@pytest.mark.parametrize(
    ("method", "floor", "context", "told"),
    [
        (SnapKV(), True, 448, [448]),
        (SnapKV(), False, 448, []),
        (AttentionMatching(), True, 448, []),  # which gets no floor
        (AttentionMatching(), True, 1792, [1792]),
    ],
)
def test_losses_at_shorter_prompts_are_told_only_of_plans_with_floors(
    method: Method, floor: bool, context: int, told: list[int]
) -> None:
    option = Option(method, Budget(share=0.125))
    policy = Policy.uniform(option.with_floor(896) if floor else option, 2, 2)
    found: Any = SimpleNamespace(
        source=SimpleNamespace(loaded=None, tables=SimpleNamespace(prompt_tokens=896))
    )
    chosen: Any = SimpleNamespace(context=context)
    quality: Any = SimpleNamespace(kl=LIVE)
    there = answer._elsewhere(found, chosen, policy, quality, Silent())
    assert [each.prompt_tokens for each in there] == told
