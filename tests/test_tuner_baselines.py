"""Baselines use the bytes they are given to the full; means and intervals count kinds alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int3, Int4, Int8
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Option
from kvtune.policies.policy import footprint_of_lengths
from kvtune.policies.testing import Case, make_signals
from kvtune.traces.signals import SIGNALS
from kvtune.tuner.baselines import (
    COSTS,
    FAMILIES,
    STRONG,
    candidates,
    fill,
    strong_families,
)
from kvtune.tuner.quality import bootstrap, estimate, estimate_by_kind, mean_over_kinds

PROMPT, LAYERS, HEADS, SIZE = 200, 4, 3, 16
SHAPE = (PROMPT, LAYERS, HEADS, SIZE)
FULL = 2 * 2 * PROMPT * SIZE * LAYERS * HEADS + footprint_of_lengths(LAYERS, HEADS)
FORMS: tuple[Format, ...] = (Bf16(), Int8(), Int4(), Int3(), Int2(exact_first=4))


def option_of(form: Format) -> Option:
    return Option(H2O(), keys=form, values=form)


def largest_token(option: Option) -> int:
    """The most bytes that one more token of one head may take: a group of scales may begin."""
    sizes = [option.footprint(n, PROMPT, SIZE) for n in range(PROMPT + 1)]
    return max(np.diff(sizes).tolist())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.sampled_from(FORMS), st.floats(0.005, 1.0))
def test_uniform_fills_the_bytes_to_a_token_of_a_head(form: Format, share: float) -> None:
    option, budget = option_of(form), int(share * FULL)
    policy = fill(option, AsGiven(), budget, *SHAPE)
    lengths = footprint_of_lengths(LAYERS, HEADS)
    if policy is None:
        assert option.footprint(1, PROMPT, SIZE) * LAYERS * HEADS + lengths > budget
        return
    taken = policy.footprint(PROMPT, SIZE)
    assert taken <= budget
    whole = option.footprint(PROMPT, PROMPT, SIZE) * LAYERS * HEADS + lengths
    assert taken == whole or budget - taken < largest_token(option)
    kept = policy.budgets(PROMPT)
    assert kept.max() - kept.min() <= 1


@pytest.mark.parametrize("share", [0.02, 0.06, 0.12, 0.25, 0.6])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.label)
@pytest.mark.parametrize("allocator", [AdaKV(), Pyramid()], ids=lambda a: a.name)
def test_the_other_families_fill_the_bytes_too(
    allocator: Allocator, form: Format, share: float
) -> None:
    option, budget = option_of(form), int(share * FULL)
    policy = fill(option, allocator, budget, *SHAPE)
    if policy is None:
        pytest.skip("not even one token a head")
    taken = policy.footprint(PROMPT, SIZE)
    assert taken <= budget
    whole = option.footprint(PROMPT, PROMPT, SIZE) * LAYERS * HEADS
    # a pyramid that is one token longer may move a few others between layers
    assert taken >= whole or budget - taken < LAYERS * largest_token(option)


@pytest.mark.parametrize(
    "budget", [0, 100, 2000, FULL // 50, FULL // 10, FULL // 2, FULL, 2 * FULL]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_candidate_fits(family: str, budget: int) -> None:
    found = candidates(family, budget, *SHAPE)
    for policy in found:
        assert policy.footprint(PROMPT, SIZE) <= budget
        policy.check_fits(LAYERS, HEADS)
        assert policy.budgets(PROMPT).max() <= PROMPT
    if budget < 2000:
        assert not found
    if budget >= FULL // 50:
        labels = {policy.heads[0][0].keys.label for policy in found}
        assert {"int4", "int2"} <= labels


def test_a_family_can_be_narrowed_to_methods_and_precisions() -> None:
    only = {(H2O(), Int4())}
    for family in FAMILIES:
        (policy,) = candidates(family, FULL // 20, *SHAPE, only=only)
        assert {(o.method, o.keys, o.values) for o in policy.options()} == {(H2O(), Int4(), Int4())}
        assert (policy.allocator, H2O()) in FAMILIES[family]


@pytest.mark.parametrize("family", STRONG)
@pytest.mark.parametrize("share", [0.05, 0.1])
def test_what_came_since_fits_too_and_is_tried_in_every_precision(
    family: str, share: float
) -> None:
    found = candidates(family, int(share * FULL), *SHAPE)
    assert {policy.heads[0][0].keys for policy in found} >= {Int4(), Int4(exact_first=4)}
    for policy in found:
        assert 0.9 * share * FULL < policy.footprint(PROMPT, SIZE) <= share * FULL
        assert (policy.allocator, policy.heads[0][0].method) in STRONG[family]


def test_a_family_is_tried_only_where_the_trace_holds_what_it_reads() -> None:
    assert strong_families(["column_sums"]) == ["keydiff", "cake"]
    assert "kvzip" in strong_families(["column_sums", "reconstruction"])
    assert strong_families(SIGNALS) == list(STRONG)
    assert set(COSTS) < set(STRONG)


def test_a_pyramid_leaves_every_layer_the_window_of_its_method() -> None:
    tokens, layers = 1024, 30
    budget = 4 * SIZE * tokens * layers * HEADS // 10
    for policy in candidates("pyramid", budget, tokens, layers, HEADS, SIZE, {(SnapKV(), Bf16())}):
        kept = policy.budgets(tokens)
        assert kept.min() >= SnapKV().window
        assert kept[0].sum() > 2 * kept[-1].sum()


def test_candidates_of_a_family_have_names_of_their_own() -> None:
    for family in FAMILIES:
        names = [policy.name for policy in candidates(family, FULL // 20, *SHAPE)]
        assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_a_candidate_bears_its_family_also_where_the_whole_prompt_fits(
    family: str, share: float
) -> None:
    names = [policy.name for policy in candidates(family, int(share * FULL), *SHAPE)]
    assert {name.split()[0] for name in names} == {family}


@pytest.mark.parametrize("family", ["pyramid", "adakv"])
def test_moving_budgets_keeps_the_sum_of_tokens(family: str) -> None:
    for policy in candidates(family, FULL // 8, *SHAPE):
        given_ = sum(o.budget.resolve(PROMPT) for o in policy.options())
        planned = policy.budgets(PROMPT)
        assert planned.sum() == given_
        signals = make_signals(Case(PROMPT, 0, kv_heads=HEADS, group=2))
        for layer in range(LAYERS):
            split = policy.split(layer, planned[layer].tolist(), signals)
            assert sum(split) == planned[layer].sum()
            assert max(split) <= PROMPT


def test_adakv_really_moves_tokens_between_heads() -> None:
    policy = fill(option_of(Int4()), AdaKV(), FULL // 20, *SHAPE)
    assert policy is not None
    signals = make_signals(Case(PROMPT, 0, kv_heads=HEADS, group=2))
    planned = policy.budgets(PROMPT)[0].tolist()
    assert policy.split(0, planned, signals) != planned


# Quality

KINDS = ("prose", "prose", "code", "code", "code", "retrieval", "retrieval")
LOSSES = (0.1, 0.2, 0.4, 0.5, 0.6, 1.0, 2.0)


def test_every_kind_counts_alike() -> None:
    assert mean_over_kinds(LOSSES, KINDS) == pytest.approx((0.15 + 0.5 + 1.5) / 3)


@given(st.lists(st.floats(0, 5), min_size=7, max_size=7))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_an_estimate_lies_inside_its_interval(losses: list[float]) -> None:
    found = estimate(losses, KINDS, "live")
    assert 0 <= found.low <= found.value <= found.high < np.inf
    assert (found.unit, found.tier) == ("nats/token", "live")


def test_equal_samples_leave_no_doubt_and_unequal_ones_do() -> None:
    same = estimate([0.3] * 7, KINDS, "table")
    assert same.low == pytest.approx(0.3)
    assert same.high == pytest.approx(0.3)
    spread = estimate(LOSSES, KINDS, "table")
    assert spread.low < spread.value < spread.high


@pytest.mark.parametrize("each", [3, 8])
@pytest.mark.parametrize("spread", [0.3, 0.7, 1.0])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(each: int, spread: float) -> None:
    """Few and skewed samples of kinds that differ, where percentiles of a bootstrap hold 70 %."""
    rng = np.random.default_rng(0)
    kinds = [kind for kind in "abc" for _ in range(each)]
    scale = np.repeat([0.01, 0.03, 0.1], each)
    truth = float(np.mean([0.01, 0.03, 0.1])) * np.exp(spread**2 / 2)
    hits = 0
    for _ in range(400):
        found = estimate(scale * rng.lognormal(0, spread, 3 * each), kinds, "live")
        hits += found.low <= truth <= found.high
    assert 0.88 <= hits / 400 <= 0.985


@pytest.mark.parametrize("each", [2, 4])
@pytest.mark.parametrize("spreads", [(0.3, 0.3, 0.3), (0.2, 0.4, 0.8)])
def test_the_interval_of_a_kind_holds_its_truth_about_as_often_as_it_says(
    each: int, spreads: tuple[float, ...]
) -> None:
    """The last kind of the second case scatters most and is held least often."""
    rng = np.random.default_rng(0)
    kinds, means = [kind for kind in "abc" for _ in range(each)], np.array([0.01, 0.03, 0.1])
    hits = np.zeros(3)
    for _ in range(300):
        draws = np.exp([rng.normal(-(s**2) / 2, s, each) for s in spreads])
        found = estimate_by_kind((means[:, None] * draws).ravel(), kinds, "live").values()
        hits += [e.low <= mean <= e.high for e, mean in zip(found, means, strict=True)]
    assert 0.9 <= hits.mean() / 300 <= 0.985
    assert hits.min() / 300 >= 0.78


def test_a_kind_of_one_text_borrows_its_spread_from_others_else_from_between_kinds() -> None:
    alone, _, _ = estimate_by_kind([1.0, 2.0, 2.4, 2.0, 2.4], list("abbcc"), "live").values()
    spread = 0.4 / 2**0.5 / 2.2
    assert alone.high == pytest.approx(np.exp(4.302653 * spread))
    singles = estimate_by_kind([1.0, 2.0, 3.0], list("abc"), "live")
    assert singles["b"].high == pytest.approx(2 * np.exp(4.302653 * 0.5))
    (lone,) = estimate_by_kind([1.0], ["a"], "live").values()
    assert (lone.low, lone.high) == (1.0, 1.0)


def test_signed_figures_have_a_plain_interval() -> None:
    found = estimate([-0.1, 0.1, 0.2, -0.2], ["a"] * 4, "live", "")
    assert found.low == pytest.approx(-found.high)
    assert found.high == pytest.approx(3.182446 * np.std([-0.1, 0.1, 0.2, -0.2], ddof=1) / 2)


def test_samples_are_redrawn_within_their_kind() -> None:
    """Two kinds far apart: mixing them would be far wider than either."""
    values, kinds = [1.0, 1.1, 9.0, 9.1], ["a", "a", "b", "b"]
    draws = bootstrap(values, kinds)
    assert draws.min() >= (1.0 + 9.0) / 2 - 1e-9
    assert draws.max() <= (1.1 + 9.1) / 2 + 1e-9


def test_single_samples_of_a_kind_are_redrawn_together() -> None:
    """A kind of one sample has no spread; pretending so would give an interval of no width."""
    values, kinds = [1.0, 2.0, 6.0], ["a", "b", "c"]
    draws = bootstrap(values, kinds)
    assert draws.min() == pytest.approx(1.0)
    assert draws.max() == pytest.approx(6.0)
    found = estimate(values, kinds, "live")
    assert found.value == pytest.approx(3.0)
    assert found.low < 2.5 < 3.5 < found.high
    lone = bootstrap([*values, 6.5], [*kinds, "c"])
    assert np.ptp(lone) > 1


def test_the_same_seed_redraws_the_same_samples() -> None:
    one, other = bootstrap(LOSSES, KINDS), bootstrap(np.array(LOSSES) * 2, KINDS)
    np.testing.assert_allclose(other, 2 * one)
    assert not np.array_equal(one, bootstrap(LOSSES, KINDS, seed=1))


# Validation's figures


def run_of(kept: Any, correct: Any, kl: float) -> Any:
    from kvtune.runtime.live import LiveRun

    rows = np.full(4, kl, np.float32)
    return LiveRun(
        kl=rows,
        nll=rows + 1,
        full_nll=np.ones(4, np.float32),
        correct=np.array(correct),
        full_correct=np.ones(4, bool),
        kept=np.array(kept),
        footprint_bytes=100,
    )


def test_live_runs_are_summed_up(make_samples: Any) -> None:
    from kvtune.tuner.validate import summarise

    samples = make_samples(2, tokens=12, observed=4)  # rows 0 and 3 are answers, one needle each
    runs = [
        run_of([[8, 2], [8, 8]], [True, False, False, False], 0.1),
        run_of([[8, 8], [1, 8]], [True, False, False, True], 0.3),
    ]
    found = summarise(runs, samples)
    assert found.live.value == pytest.approx(0.2)
    assert found.perplexity_change is not None
    assert found.perplexity_change.value == pytest.approx(np.expm1(0.2), rel=1e-5)
    assert found.retrieval_accuracy is not None
    assert found.full_cache_accuracy is not None
    assert found.retrieval_accuracy.value == pytest.approx(3 / 4)
    assert found.retrieval_accuracy.low < 0.75 < found.retrieval_accuracy.high <= 1
    assert found.full_cache_accuracy.value == found.full_cache_accuracy.high == 1
    assert found.full_cache_accuracy.low < 0.8  # two needles prove little
    assert found.counters == {
        "tokens_offered": 64, "tokens_kept": 51, "heads_run": 8, "heads_that_evicted": 2,
    }  # fmt: skip
    assert (found.prompt_bytes, found.samples) == (100, 2)
    (kind,) = {sample.kind for sample in samples}
    assert found.by_kind == {kind: found.live}


def test_each_kind_of_text_has_a_loss_of_its_own(make_samples: Any) -> None:
    from kvtune.tuner.validate import summarise

    samples = [
        dataclasses.replace(sample, kind=kind)
        for sample, kind in zip(make_samples(5, tokens=12, observed=4), "abbba", strict=True)
    ]
    losses = [0.1, 0.5, 0.6, 0.7, 0.1]
    runs = [run_of([[8, 8], [8, 8]], [True] * 4, loss) for loss in losses]
    found = summarise(runs, samples)
    assert [*found.by_kind] == ["a", "b"]
    first, second = found.by_kind.values()
    # a's own texts are alike; those of b lend it their relative spread with two of its three
    # degrees of freedom, and a's lends b one beside its own two
    spread = 0.1 / 0.6
    reach = np.exp(3.182446 * (2 / 3) ** 0.5 * spread / 2**0.5)
    assert (first.value, first.low, first.high) == pytest.approx((0.1, 0.1 / reach, 0.1 * reach))
    reach = np.exp(3.182446 * (2 / 3) ** 0.5 * spread / 3**0.5)
    assert (second.value, second.low, second.high) == pytest.approx((0.6, 0.6 / reach, 0.6 * reach))
    assert {one.tier for one in (first, second)} == {"live"}
    assert found.live.value == pytest.approx((0.1 + 0.6) / 2)  # kinds count alike
