"""The sentence that a search comes to, and when it says that the plan is not better."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvtune.common.estimate import BAND, Estimate
from kvtune.tuner.verdict import Verdict, limit_words


def loss(value: float, tier: Any = "table") -> Estimate:
    return Estimate(value, 0.5 * value, 2 * value, "nats/token", tier)


@dataclasses.dataclass(frozen=True)
class Policy:
    name: str
    predicted: Estimate
    live: Estimate | None = None
    times_the_plan: Estimate | None = None
    prompt_bytes: int = 1000
    host_bytes: int = 0
    family: str = "greedy"


def share(value: float) -> Estimate:
    return Estimate(value, value, value, "share", "live")


def verdict(*others: Policy, **changes: Any) -> Verdict:
    plan = Policy("kvtune plan", loss(0.02), loss(0.011, "live"))
    asked: dict[str, Any] = {
        "sequences": 6,
        "full_cache_sequences": 1,
        "context_tokens": 2048,
        "memory_bytes": 2**30,
        "kl": loss(0.011, "live"),
        "stand_in": "",
        "stack": "",
        "policies": (plan, *others),
        "retrieval": share(0.9),
        "full_cache_accuracy": share(0.9),
        "largest_kl": 0.02,
        "weights": "bf16",
        "step": Estimate(0.05, 0.04, 0.06, "s", "assumed"),
    }
    return Verdict(**asked | changes)


def test_the_sentence_can_be_quoted() -> None:
    assert verdict().sentence == (
        "6 prompts of 2 048 tokens instead of 1 in 1 GiB at 0.011 nats per token (measured live); "
        "needles 100 % of the full cache's"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"full_cache_sequences": 0}, "where none fits uncompressed in"),
        ({"full_cache_sequences": 6}, "where 6 fit uncompressed in"),
        ({"sequences": 1, "full_cache_sequences": 0}, "1 prompt of"),
        ({"stand_in": "smollm2-135m"}, "predicted from smollm2-135m, which stands in"),
        ({"kl": loss(0.01)}, "nats per token (predicted)"),
        ({"stack": "vllm"}, "token (measured live, as vllm stores prompts and answers); needles"),
        ({"retrieval": share(0.45)}, "needles 50 % of"),
        ({"full_cache_accuracy": share(0.45)}, "needles 200 % of"),
        ({"largest_kl": 0.001}, "more than the 0.001 that was accepted"),
        (
            {"weights": "int4"},
            "in 1 GiB with int4 weights, whose own loss is not counted, at 0.011",
        ),
        (
            {"step": Estimate(3.13, 2.9, 3.4, "s", "assumed")},
            "; a token takes 3.13 s [2.9 s, 3.4 s]",
        ),
    ],
)
def test_it_says_what_it_is_worth(changes: dict[str, Any], said: str) -> None:
    assert said in verdict(**changes).sentence


def test_nothing_is_said_of_needles_that_were_not_sought() -> None:
    assert "needles" not in verdict(full_cache_accuracy=None).sentence


def test_it_says_where_the_compared_ran_if_that_is_not_the_stack() -> None:
    other = Policy("greedy", loss(9), loss(0.11, "live"))
    assert verdict(other, stack="vllm").comparison.endswith("not as vllm runs them.")
    assert "own runtime" not in verdict(other).comparison


@pytest.mark.parametrize("value", [0.001, 0.011, 0.0219])
def test_a_policy_within_or_below_the_interval_is_not_beaten(value: float) -> None:
    other = Policy("greedy", loss(9), loss(value, "live"))
    assert "not shown to be better than greedy" in verdict(other).comparison


def test_one_above_the_interval_is_beaten_by_so_much() -> None:
    other = Policy("uniform", loss(0.0001), loss(0.11, "live"))  # predictions do not count
    assert verdict(other).comparison.endswith("uniform comes next and loses 10 times as much.")


def test_a_rule_that_has_no_use_for_so_many_bytes_is_not_beaten_at_equal_ones() -> None:
    words = [
        verdict(Policy("uniform", loss(9), loss(0.11, "live"), prompt_bytes=size)).comparison
        for size in (1000, 300)
    ]
    assert ["at equal bytes" in each for each in words] == [True, False]
    assert "in at least as many bytes" in words[1]


def test_losses_by_other_estimators_are_not_compared() -> None:
    other = Policy("adakv", loss(0.0001, "interpolated"))
    assert "not better" not in verdict(other).comparison
    assert "Of adakv the loss is estimated in another way" in verdict(other).comparison


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (16 * 10**9, "16 GB"),
        (2**30, "1 GiB"),
        (17 * 2**30, "17 GiB"),
        (16_060_000_001, "14.96 GiB"),
    ],
)
def test_a_limit_is_in_the_unit_that_it_is_round_in(size: int, words: str) -> None:
    assert limit_words(size) == words


def test_a_ratio_on_the_same_samples_decides_where_both_ran() -> None:
    """Single losses overlap where texts differ much; their ratio can still be sure, or not."""

    def other(low: float, high: float) -> Policy:
        ratio = Estimate(1.5, low, high, "times", "live")
        return Policy("greedy", loss(0.03), loss(0.0165, "live"), times_the_plan=ratio)

    told = verdict(other(1.2, 1.9)).comparison
    assert told.endswith("greedy comes next and loses 1.5 times as much (1.2 to 1.9).")
    assert "not shown to be better than greedy" in verdict(other(0.9, 2.4)).comparison
    sure = Policy("uniform", loss(1.0), loss(1.0, "live"), times_the_plan=None)
    assert "not better" not in verdict(sure).comparison


@pytest.mark.parametrize(("ran", "where"), [(0.02, "within"), (0.001, "below"), (0.9, "above")])
def test_what_the_plans_own_kind_of_rule_lost_live_on_a_stand_in_is_no_rival(
    ran: float, where: str
) -> None:
    curve = Policy("uniform rules, live", loss(ran), family="uniform")
    plan = Policy("uniform full all int4", loss(0.02))
    said = verdict(stand_in="smollm2-135m", policies=(plan, curve)).comparison
    assert said.endswith(
        f"The best such rule lost {ran:.2g} when smollm2-135m ran it, {where} the plan's band."
    )
    assert "not better" not in said
    assert "lost when" not in verdict(curve).comparison
    rule = Policy("kvzip+model_wide 9% int4+4", loss(0.02))
    said = verdict(stand_in="smollm2-135m", policies=(rule, curve)).comparison
    assert "The plan is a uniform rule" not in said
    assert "uniform rules, live" in said, "which a plan of another family is compared with"


def test_a_ratio_of_bands_says_whose_losses_it_is_of() -> None:
    """The table prints the bands' ends, whose ratio is another: what is compared must be there."""
    plan, other = Policy("kvzip", loss(0.05, BAND)), Policy("h2o", loss(0.6, BAND))
    said = verdict(stand_in="smollm2-135m", policies=(plan, other)).comparison
    assert said.startswith(
        "On smollm2-135m itself the plan loses 0.05, less than the other at equal"
    )
    assert "h2o comes next there with 0.6, 12 times as much." in said


def test_a_curve_that_ends_before_the_plans_bytes_says_nothing_of_its_band() -> None:
    curve = Policy("uniform rules, live", loss(0.9), family="uniform", prompt_bytes=300)
    plan = Policy("uniform full all bf16", loss(0.02))
    assert "its band" not in verdict(stand_in="smollm2-135m", policies=(plan, curve)).comparison


def test_bands_are_compared_as_the_table_shows_them() -> None:
    """What comes next on the stand-in itself need not have the lowest band: both are said."""

    def policy(name: str, value: float, low: float, high: float) -> Policy:
        return Policy(name, Estimate(value, low, high, "nats/token", BAND))

    plan = policy("kvzip", 0.02, 0.01, 0.2)
    others = policy("streaming_llm", 0.23, 0.045, 2.0), policy("adakv", 0.26, 0.034, 2.4)
    said = verdict(stand_in="smollm2-135m", policies=(plan, *others)).comparison
    assert "streaming_llm comes next there with 0.23, 12 times as much" in said
    assert said.endswith("As bands they overlap; adakv's reaches lowest, to 0.034.")
    above = policy("h2o", 0.9, 0.3, 3.0)
    said = verdict(stand_in="smollm2-135m", policies=(plan, above)).comparison
    assert said.endswith("Its band lies below all of theirs.")
