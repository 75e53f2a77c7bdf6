"""What is said of a loss at another length than it was measured at, against the recorded runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtune.cli.command_line_of import command_of
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
from kvtune.tuner.config_file import read_config
from kvtune.tuner.lengths import (
    FITTED_ON,
    LONGER,
    SHORTER,
    Carried,
    LossAt,
    carried_to,
    failed_note,
    length_note,
    lengths_to_run,
    losses_at,
    nothing_ran_note,
    without,
)
from kvtune.tuner.run_directory import record_config
from kvtune.tuner.search_options import search_request

ROOT = Path(__file__).parents[1]
JUDGED = json.loads((ROOT / FITTED_ON).read_text())
LIVE = Estimate(0.01, 0.008, 0.02, "nats/token", "live")


def ratios(longer: bool, floors: bool) -> list[tuple[float, float, float]]:
    """Logarithms of prompt tokens and of losses, and the tokens that plans hold where they were
    found, straight from the files that were judged."""
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
                    ratio = math.log((here - observed) / (was - observed))
                    found.append((ratio, math.log(there), row["share"] * (was - observed)))
    return found


DIRECTIONS = pytest.mark.parametrize(
    ("name", "carried", "longer"),
    [("longer", LONGER, True), ("shorter, with floors", SHORTER, False)],
    ids=["longer", "shorter"],
)


@DIRECTIONS
def test_the_power_is_that_of_least_squares_on_the_recorded_runs(
    name: str, carried: Carried, longer: bool
) -> None:
    rows = ratios(longer, not longer)
    terms = [(x, x * math.log(kept))[: 1 if longer else 2] for x, _, kept in rows]
    fitted = np.linalg.lstsq(np.array(terms), np.array([y for _, y, _ in rows]), rcond=None)[0]
    assert JUDGED[name]["weights"] == [round(float(weight), 4) for weight in fitted]
    assert [carried.power, carried.by_kept][: len(fitted)] == JUDGED[name]["weights"]
    assert carried.reach == JUDGED[name]["reach"]
    assert carried.most == JUDGED[name]["most"]
    assert len(rows) == JUDGED[name]["plans"]
    if not longer:
        assert list(carried.kept) == JUDGED[name]["tokens kept"]


@DIRECTIONS
def test_the_interval_holds_at_least_three_quarters_of_the_recorded_plans(
    name: str, carried: Carried, longer: bool
) -> None:
    held = []
    for lengths, losses, kept in ratios(longer, not longer):
        _, low, high = carried.times(math.exp(lengths), kept)
        held.append(low <= math.exp(losses) <= high)
    assert sum(held) >= 0.75 * len(held)


@DIRECTIONS
def test_the_interval_holds_what_was_left_out_as_often_as_it_says(
    name: str, carried: Carried, longer: bool
) -> None:
    assert len(JUDGED[name]["held with one left out"]) == 4
    for left_out, held in JUDGED[name]["held with one left out"].items():
        assert 0.75 <= held <= 0.9, left_out


@DIRECTIONS
def test_no_simpler_function_foretells_left_out_plans_better(
    name: str, carried: Carried, longer: bool
) -> None:
    errors = JUDGED[name]["error at what is left out"]
    chosen = errors[JUDGED[name]["function"]]
    for simpler in ("nothing changes", "a constant", "a power of the length"):
        assert all(chosen[group] <= errors[simpler][group] for group in chosen), simpler


@pytest.mark.parametrize("kept", [1.0, 29.0, 200.0, 2016.0, 1e5])
@pytest.mark.parametrize("carried", [LONGER, SHORTER])
def test_the_factor_goes_one_way_with_length(carried: Carried, kept: float) -> None:
    steps = [carried.times(2**n, kept)[0] for n in range(-3, 4)]
    assert steps in (sorted(steps), sorted(steps, reverse=True))
    assert carried.times(1.0, kept)[0] == 1.0


def test_plans_that_hold_fewer_or_more_tokens_than_any_that_ran_are_taken_for_the_nearest() -> None:
    fewest, most = SHORTER.kept
    assert SHORTER.times(0.5, 1.0) == SHORTER.times(0.5, fewest)
    assert SHORTER.times(0.5, 1e6) == SHORTER.times(0.5, most)
    assert SHORTER.times(0.5, fewest)[0] < SHORTER.times(0.5, most)[0] < 1


def carried_far(kl: Estimate, measured: int, tokens: int, kept: float = 100.0) -> LossAt:
    found = carried_to(kl, measured, tokens, kept)
    assert found is not None
    return found


def test_a_loss_is_carried_with_the_factors_interval_and_a_band_with_both_ends() -> None:
    value, low, high = LONGER.times(8.0, 100.0)
    there = carried_far(LIVE, 1024, 8192)
    assert there.prompt_tokens == 8192
    assert there.samples == 0
    assert there.kl == Estimate(0.01 * value, 0.01 * low, 0.01 * high, "nats/token", "fitted")
    band = carried_far(Estimate(0.01, 0.008, 0.02, "nats/token", BAND), 1024, 8192).kl
    assert (band.low, band.high, band.tier) == (0.008 * low, 0.02 * high, BAND)
    shorter = carried_far(LIVE, 1792, 896)
    power = SHORTER.power + SHORTER.by_kept * math.log(100)
    assert shorter.kl.value == pytest.approx(0.01 * 0.5**power)


def test_a_loss_of_nothing_is_carried_with_its_own_upper_end() -> None:
    there = carried_far(Estimate(0.0, 0.0, 0.002, "nats/token", "live"), 1024, 8192)
    assert (there.kl.value, there.kl.low) == (0, 0)
    assert there.kl.high == 0.002 * LONGER.times(8.0, 100.0)[2]
    assert "0 to 0.0016 nats a token" in length_note(there, 1024)


@pytest.mark.parametrize(
    ("measured", "tokens"), [(1792, 32768), (448, 8192), (896, 100), (8192, 896 // 2), (80, 40)]
)
def test_nothing_is_foretold_of_lengths_that_nothing_was_run_at(measured: int, tokens: int) -> None:
    assert carried_to(LIVE, measured, tokens, 100.0) is None
    note = nothing_ran_note(tokens, measured)
    assert "Nothing was run at such lengths" in note
    assert "nats" not in note


def test_the_note_says_what_is_expected_or_what_was_measured() -> None:
    fitted = length_note(carried_far(LIVE, 896, 8192), 896)
    assert "measured on prompts of 896 tokens" in fitted
    assert "heads keep shares of the prompt" in fitted
    assert FITTED_ON in fitted
    shorter = length_note(carried_far(LIVE, 1792, 896), 1792)
    assert "heads keep as many tokens as of prompts of 1 792 tokens" in shorter


def test_lengths_that_no_plan_could_run_at_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match="no weights of llama-3"):
        check_request(llama(tmp_path, lengths=(448,)))
    for beyond in ("2k,16k", "8k", "8065"):  # 128 tokens of 8,192 are observed behind a prompt
        with pytest.raises(KvtuneError, match="takes 8 192 tokens, of which 128") as error:
            search_request("smollm2-135m", "4090", "1GiB", run_dir=tmp_path, lengths=beyond)
        assert error.value.hint == "--lengths 8064 is the most."
    with pytest.raises(KvtuneError, match="of which 256 are observed"):
        search_request(
            "smollm2-135m", "4090", "1GiB", run_dir=tmp_path, lengths="8000", workload="full"
        )
    assert search_request(
        "smollm2-135m", "4090", "1GiB", run_dir=tmp_path, lengths="8064"
    ).lengths == (8064,)
    assert search_request(
        "smollm2-135m", "4090", "1GiB", run_dir=tmp_path, lengths="2k, 448,2048"
    ).lengths == (2048, 448)


def test_a_plan_runs_at_the_lengths_asked_for_and_at_its_context_on_a_gpu(tmp_path: Path) -> None:
    request = llama(tmp_path)
    assert lengths_to_run(request, "cpu", 896, 8192) == ()
    assert lengths_to_run(request, "cuda", 896, 8192) == (8192,)
    assert lengths_to_run(request, "cuda", 896, 896) == ()
    assert lengths_to_run(request, "cuda", 896, 64 * 1024) == ()
    asked = llama(tmp_path, lengths=(448, 896))
    assert lengths_to_run(asked, "cpu", 896, 8192) == (448,)
    small = search_request("smollm2-135m", "4090", "1GiB", run_dir=tmp_path)
    assert lengths_to_run(small, "cuda", 896, 8192) == (8064,)  # 128 are observed behind it


def test_whatever_fails_at_a_length_is_told_and_loses_nothing() -> None:
    errors = {
        1: KvtuneError("too little text", hint="give more."),
        2: MemoryError("out"),
        4: RuntimeError("of our own"),
    }

    def run(tokens: int) -> LossAt:
        if tokens in errors:
            raise errors[tokens]
        return LossAt(tokens, LIVE, 2)

    ran, failed = losses_at([1, 2, 3, 4, 5], run)
    assert [at.prompt_tokens for at in ran] == [3, 5]
    assert failed[1] == "too little text; give more."
    assert failed[2] == "MemoryError, out."
    assert failed[4] == "RuntimeError, of our own."
    assert "--lengths 2 tries it again" in failed_note(2, failed[2])


def test_what_failed_is_no_part_of_what_was_answered(tmp_path: Path) -> None:
    asked = llama(tmp_path, lengths=(448, 2048))
    assert without(asked, {2048}) == llama(tmp_path, lengths=(448,))
    assert without(llama(tmp_path), {8192}) == llama(tmp_path)


def test_the_card_repeats_the_lengths(tmp_path: Path) -> None:
    record_config(llama(tmp_path, lengths=(448, 2048)))
    assert read_config(tmp_path).lengths == [448, 2048]
    study = SimpleNamespace(
        folder=tmp_path,
        facts=SimpleNamespace(
            shape=SimpleNamespace(name="llama-3.1-8b"), gpu="rtx-4090", seed=0, trials=1,
            memory_bytes=2**34,
        ),
    )  # fmt: skip
    assert "--lengths 448,2048" in command_of(study)  # type: ignore[arg-type]


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
    method: Method, floor: bool, context: int, told: list[int], tmp_path: Path
) -> None:
    option = Option(method, Budget(share=0.125))
    policy = Policy.uniform(option.with_floor(896) if floor else option, 2, 2)
    found: Any = SimpleNamespace(
        request=llama(tmp_path),
        source=SimpleNamespace(loaded=None, tables=SimpleNamespace(prompt_tokens=896)),
    )
    chosen: Any = SimpleNamespace(context=context)
    quality: Any = SimpleNamespace(kl=LIVE)
    there = answer._elsewhere(found, chosen, policy, quality, Silent())
    assert [each.prompt_tokens for each in there.losses] == told
