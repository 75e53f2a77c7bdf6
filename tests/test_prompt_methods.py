"""Prompt-time methods against slow versions of themselves, and where they must be one another."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.rotary import mean_turn, turn
from kvtune.policies.allocator import allocators
from kvtune.policies.allocators.cake_layers import CakeLayers
from kvtune.policies.allocators.compresskv_layers import CompressKVLayers
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.apply import apply, apply_options, apply_together
from kvtune.policies.method import Method, ScoredMethod, methods
from kvtune.policies.methods.cake import Cake
from kvtune.policies.methods.compresskv import CompressKV
from kvtune.policies.methods.ems import EMSReconstruction
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.hindsight import FutureAttention, ProbeGreedy
from kvtune.policies.methods.keydiff import KeyDiff, KeyDiffBlockwise
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.oscar import Oscar
from kvtune.policies.methods.random_tokens import RandomTokens
from kvtune.policies.methods.shadowkv import ShadowKV
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.tova import Tova
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import Budget, Option
from kvtune.policies.parts import PartPlan, entries_of
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.policies.testing import Case, PlainRope, make_signals, uniform
from kvtune.policies.work import LayerShape
from kvtune.tests.tiers import each

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_METHOD = [kind() for _, kind in sorted(methods().items())]
DROPPING = [m for m in EVERY_METHOD if m.plan(9, 75) == (PartPlan(9),)]
"""Methods that keep as many tokens as their budget, and nothing else."""
CASE = Case(75, 0, kv_heads=2, group=3, seed=3)


def stored_by(method: Method, signals: Signals, budget: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads under one method, in full precision."""
    stored = apply_options([Option(method)], budget, signals)
    return stored.keys[0], stored.values[0]


def name_of(method: Method) -> str:
    return method.name


def keep(method: Method, budget: int, signals: Signals | None = None) -> list[list[int]]:
    kept: list[list[int]] = method.keep(signals or make_signals(CASE), budget).tolist()
    return kept


# Bad input: what every method does with it


@pytest.mark.parametrize("method", EVERY_METHOD, ids=name_of)
def test_small_budgets_short_prompts_and_odd_lengths_are_filled_to_the_budget(
    method: Method,
) -> None:
    """Budgets below sinks and window, windows beyond the prompt, prompts below the budget."""
    for tokens, budget in product((1, 2, 3, 4, 5, 31, 33), (0, 1, 3, 30, 1000)):
        signals = make_signals(Case(tokens, 0, kv_heads=2, group=3))
        keys, values = stored_by(method, signals, budget)
        held = entries_of(method.plan(budget, tokens))
        assert keys.shape == values.shape == (2, held, 16), (tokens, budget)
        assert keys.isfinite().all(), (tokens, budget)
        assert values.isfinite().all(), (tokens, budget)


@pytest.mark.parametrize("method", EVERY_METHOD, ids=name_of)
def test_a_budget_of_the_whole_prompt_changes_nothing(method: Method) -> None:
    signals = make_signals(CASE)
    for budget in (75, 76, 10_000):
        keys, values = stored_by(method, signals, budget)
        if isinstance(method, (Oscar, ShadowKV, WeightedKeys)):  # turned or scaled, and back
            torch.testing.assert_close(keys, signals.keys, atol=1e-4, rtol=0)
            torch.testing.assert_close(values, signals.values, atol=1e-4, rtol=0)
        else:
            assert torch.equal(keys, signals.keys)
            assert torch.equal(values, signals.values)


@pytest.mark.parametrize("method", EVERY_METHOD, ids=name_of)
def test_padding_to_other_policies_of_a_batch_changes_nothing(method: Method) -> None:
    """Rows of a batch are padded to the longest one: a policy is stored as if it were alone."""
    signals = make_signals(CASE)
    ours = Policy.uniform(Option(method, Budget(11)), 1, 2)
    longer = Policy.uniform(Option(H2O(), Budget(60)), 1, 2)
    alone = apply(ours, 0, [11, 7], signals)
    both = apply_together([longer, ours], 0, [[60, 60], [11, 7]], signals)
    for head, count in enumerate((11, 7)):
        assert torch.equal(both.keys[1, head, :count], alone.keys[head, :count])
        assert torch.equal(both.values[1, head, :count], alone.values[head, :count])
    assert both.footprint_bytes[1] == alone.footprint_bytes[0]


@pytest.mark.parametrize(
    "method", [KVzip(), CompressKV(), FutureAttention(), ProbeGreedy(), ExpectedAttention()]
)
def test_a_signal_that_was_not_recorded_is_named(method: Method) -> None:
    full = make_signals(CASE)
    bare = Signals(full.queries[:, -10:], full.keys, full.values, full.scale)
    with pytest.raises(KvtuneError, match="was not recorded"):
        method.keep(bare, 5)


# Degenerate equalities


def test_tova_of_one_kv_head_is_snapkv_of_one_query() -> None:
    signals = make_signals(Case(60, 0, kv_heads=1, group=4))
    ours, theirs = (m.scores(signals) for m in (SnapKV(window=1, kernel=1), Tova()))
    torch.testing.assert_close(ours[:, :-1], theirs[:, :-1])


def test_cake_without_variance_is_snapkv_with_mean_pooling() -> None:
    theirs = SnapKV(window=16, kernel=5, pooling="mean")
    assert keep(Cake(window=16, gamma=0), 30) == keep(theirs, 30)
    assert keep(Cake(window=16, gamma=1000), 30) != keep(theirs, 30)


def test_compresskv_with_every_head_voting_is_layer_wide_snapkv() -> None:
    signals = make_signals(Case(60, 0, kv_heads=1, group=4))
    theirs = SnapKV(window=8, kernel=5, pooling="mean")
    assert keep(CompressKV(voters=4), 20, signals) == keep(theirs, 20, signals)
    assert keep(CompressKV(voters=1), 20, signals) != keep(theirs, 20, signals)


def test_keydiff_looks_at_directions_alone() -> None:
    signals = make_signals(CASE)
    lengths = 0.1 + uniform(9, 2, 75, 1).square()
    scaled = replace(signals, keys=signals.keys * lengths, _memo={})
    assert keep(KeyDiff(), 20, scaled) == keep(KeyDiff(), 20)


def test_keydiff_in_one_block_is_keydiff() -> None:
    assert keep(KeyDiffBlockwise(block=1000), 20) == keep(KeyDiff(), 20)
    assert keep(KeyDiffBlockwise(block=10), 20) != keep(KeyDiff(), 20)


def test_expected_attention_of_equal_queries_is_a_plain_softmax() -> None:
    full, rope = make_signals(CASE), PlainRope((0.0,) * 8)  # no rotation: a mean is a query
    signals = replace(full, queries=full.queries[:, :1].expand(-1, 75, -1), rope=rope, _memo={})
    scores = ExpectedAttention(sinks=0, value_norm=False).scores(signals)
    torch.testing.assert_close(scores, signals.window_attention(1)[:, :, 0].mean(1))


def test_ems_that_finds_nothing_alike_is_pure_eviction() -> None:
    signals, method = make_signals(CASE), EMSReconstruction(window=8, threshold=1.01)
    kept = method.keep(signals, 30)
    keys, values = stored_by(method, signals, 30)
    for head, row in enumerate(kept):
        torch.testing.assert_close(keys[head], signals.keys[head, row])
        torch.testing.assert_close(values[head], signals.values[head, row])


def test_ems_without_a_local_term_ranks_as_h2o() -> None:
    signals = make_signals(CASE)
    flat = signals.column_sums()[..., None, :] / 75  # a window that saw what all queries saw
    signals._memo["window 8"] = flat.expand(-1, -1, 8, -1)
    ours = EMSReconstruction(window=8).scores(signals)[:, :67].argsort(-1)
    assert torch.equal(ours, H2O().scores(signals)[:, :67].argsort(-1))


def test_model_wide_keeps_the_best_scores_of_the_model() -> None:
    layers = [make_signals(replace(CASE, seed=seed)) for seed in range(3)]
    rows = [[KVzip(sinks=0)] * 2] * 3
    budgets = ModelWide().settle(np.full((3, 2), 20), rows, layers.__getitem__)
    scores = torch.stack([signals.given("reconstruction") for signals in layers])
    best = scores.flatten().topk(120).indices // 75
    assert budgets.flatten().tolist() == best.bincount(minlength=6).tolist()


def test_equal_layers_get_equal_budgets() -> None:
    signals, rows = make_signals(CASE), [[Cake()] * 2] * 4
    for allocator in (CakeLayers(window=8), CompressKVLayers(least=4)):
        budgets = allocator.settle(np.full((4, 2), 20), rows, lambda _: signals)
        assert (budgets == 20).all()


def test_layers_that_suffer_get_more() -> None:
    layers = [replace(make_signals(CASE), layer_error=error) for error in (0.1, 0.3, 0.6)]
    budgets = CompressKVLayers(least=4).settle(
        np.full((3, 2), 24), [[CompressKV()] * 2] * 3, layers.__getitem__
    )
    assert budgets[:, 0].tolist() == [10, 22, 40]


def test_cake_prefers_spread_and_shifting_attention() -> None:
    calm = make_signals(CASE)
    focused = replace(calm, queries=torch.zeros_like(calm.queries), _memo={})
    allocator = CakeLayers(window=8)
    assert allocator.preference(focused) < allocator.preference(calm) / 10  # queries are alike
    pair = [calm, focused]
    budgets = allocator.settle(np.full((2, 2), 20), [[Cake()] * 2] * 2, pair.__getitem__)
    assert budgets.sum() == 80
    assert budgets[0].min() >= 30
    assert budgets[1].min() >= 8


def test_a_pyramid_too_steep_for_its_window_stays_uniform() -> None:
    flat = np.full((6, 2), 40)
    assert (Pyramid(beta=20, window=8, floor="required").plan(flat, 200) == flat).all()
    assert (Pyramid(beta=4, window=8, floor="required").plan(flat, 200)[0] == 70).all()


def test_a_pyramid_over_windows_leaves_every_layer_its_window() -> None:
    """The authors' line: from hi to lo = base / beta over what the windows leave over."""
    budgets = Pyramid(beta=4, window=8).plan(np.full((5, 2), 40), 200)[:, 0]
    assert budgets.tolist() == [8 + 56, 8 + 44, 8 + 32, 8 + 20, 8 + 8]
    flat = np.full((5, 2), 7)
    assert (Pyramid(beta=4, window=8).plan(flat, 200) == flat).all()


# Against slow versions


@given(steps=st.integers(-50, 50), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_turning_is_rotation_by_complex_numbers(steps: int, seed: int) -> None:
    rope, vectors = PlainRope((1.0, 0.3, 0.02)), uniform(seed, 4, 8)  # two dimensions stand still
    turned = turn(vectors, torch.full((4,), steps), rope)
    pairs = torch.complex(vectors[:, :3].double(), vectors[:, 3:6].double())
    angles = torch.tensor(rope.inverse_frequencies).double() * steps
    expected = pairs * torch.polar(torch.ones(3).double(), angles)
    torch.testing.assert_close(turned[:, :3].double(), expected.real, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[:, 3:6].double(), expected.imag, atol=1e-5, rtol=1e-5)
    assert torch.equal(turned[:, 6:], vectors[:, 6:])
    torch.testing.assert_close(turn(turned, torch.full((4,), -steps), rope), vectors)


def test_the_mean_turn_is_the_mean_of_turns() -> None:
    rope, vectors = PlainRope((1.0, 0.3)), uniform(1, 5, 4)
    each = [turn(vectors, torch.full((5,), at), rope) for at in range(7, 12)]
    expected = torch.stack(each).mean(0)
    torch.testing.assert_close(mean_turn(vectors, 7, 5, rope), expected)


def test_query_moments_are_those_of_the_queries_turned_back() -> None:
    signals = make_signals(Case(20, 0, kv_heads=1, group=2))
    rope = signals.rope
    assert rope is not None
    plain = turn(signals.queries, -torch.arange(20), rope)[:, 4:].double()
    mean, covariance = signals.query_moments()
    torch.testing.assert_close(mean[0].double(), plain.mean(1), atol=1e-5, rtol=1e-4)
    for head in range(2):
        expected = torch.cov(plain[head].T, correction=0)
        torch.testing.assert_close(covariance[0, head].double(), expected, atol=1e-5, rtol=1e-4)


def naive_future(signals: Signals) -> Tensor:
    """Attention of the observed queries over all keys, query by query, ``[Hq, C, P + C]``."""
    future = signals.given("future")
    heads, group = signals.keys.shape[0], signals.queries.shape[0] // signals.keys.shape[0]
    keys = torch.cat((signals.keys, future.keys), 1).double()
    rows = torch.zeros(heads * group, future.queries.shape[1], keys.shape[1]).double()
    for head in range(heads * group):
        for at, query in enumerate(future.queries[head].double()):
            seen = keys[head // group, : signals.prompt_tokens + at + 1]
            rows[head, at, : len(seen)] = (seen @ query * signals.scale).softmax(0)
    return rows


@pytest.mark.parametrize("method", DROPPING, ids=name_of)
def test_no_method_keeps_more_future_attention_than_the_oracle(method: Method) -> None:
    signals = make_signals(CASE)
    mass = naive_future(signals)[..., :75].sum(1).unflatten(0, (2, 3)).mean(1)
    for budget in (5, 20, 60):
        ours, best = (
            mass.gather(1, m.keep(signals, budget)).sum(1) for m in (method, FutureAttention())
        )
        assert (ours <= best + 1e-6).all()


def test_probe_greedy_first_drops_the_token_that_the_loss_minds_least() -> None:
    signals = make_signals(Case(14, 0, kv_heads=1, group=2, seed=5))
    future = signals.given("future")
    attention = naive_future(signals)
    values = torch.cat((signals.values, future.values), 1)[0].double()

    def response(gone: int) -> Tensor:
        left = attention.clone()
        left[..., gone] = 0
        change = left / left.sum(-1, keepdim=True) @ values - attention @ values  # [Hq, C, D]
        by_position = torch.einsum("hcd,schd->sc", change, signals.probes().double())
        blocks: Tensor = torch.nn.functional.pad(by_position, (0, 1)).unflatten(1, (2, 4)).sum(-1)
        return blocks

    costs = [float(response(token).square().sum()) for token in range(14)]
    order = ProbeGreedy(block=4).scores(signals)[0]
    assert int(order.argmin()) == int(np.argmin(costs))
    assert sorted(order.tolist()) == list(range(14))


def test_probe_greedy_drops_as_if_every_loss_were_measured_again_at_every_step() -> None:
    """Response by response in double precision, nothing updated: the order is the same."""
    signals = make_signals(Case(33, 0, kv_heads=2, group=2, seed=6))
    attention = naive_future(signals)
    values = torch.cat((signals.values, signals.given("future").values), 1).double()
    probes = signals.probes().double().unflatten(2, (2, 2)).permute(2, 0, 3, 1, 4)
    order = ProbeGreedy(block=4, refresh=0.2).scores(signals)
    for head in range(2):
        rows, own = attention.unflatten(0, (2, 2))[head], probes[head]
        assert naive_order(rows, values[head], own, 33, refresh=0.2) == order[head].tolist()


def naive_order(
    attention: Tensor, values: Tensor, probes: Tensor, tokens: int, refresh: float
) -> list[int]:
    """When each token of one head ``[G, C, n]`` goes, by the losses ``[tokens]`` of every step."""

    def blocks(output: Tensor) -> Tensor:
        by_position = (probes * output).sum((1, 3))  # [S, C]
        padded = torch.nn.functional.pad(by_position, (0, -by_position.shape[1] % 4))
        summed: Tensor = padded.unflatten(1, (-1, 4)).sum(-1).flatten()
        return summed

    def output(gone: list[int]) -> Tensor:
        left = attention.clone()
        left[..., gone] = 0
        return left / left.sum(-1, keepdim=True) @ values

    gone: list[int] = []
    while len(gone) < tokens:
        now = output(gone)
        response = blocks(now - output([]))
        adds = {j: blocks(output([*gone, j]) - now) for j in range(tokens) if j not in gone}
        for _ in range(max(1, int((tokens - len(gone)) * refresh))):
            least = min(adds, key=lambda j: float((response + adds[j]).square().sum()))
            response = response + adds.pop(least)
            gone.append(least)
    return [gone.index(token) for token in range(tokens)]


def test_ems_merges_into_the_likest_centre_by_score() -> None:
    """Two tokens alike in keys and values: the lesser is averaged into the greater one."""
    signals = make_signals(Case(30, 0, kv_heads=1, group=1, seed=8))
    method = EMSReconstruction(window=4, mass=1.0, threshold=0.99)
    order = method.scores(signals)[0, :26].argsort(descending=True)
    centre, lesser = int(order[0]), int(order[15])
    signals.keys[0, lesser] = 2 * signals.keys[0, centre]
    signals.values[0, lesser] = 3 * signals.values[0, centre]
    fresh = replace(signals, _memo={})
    scores = method.scores(fresh)[0]
    kept = method.keep(fresh, 10)
    if lesser in kept[0].tolist() or centre not in kept[0].tolist():
        pytest.fail("the case no longer has a kept centre and a dropped twin")
    keys, values = stored_by(method, fresh, 10)
    at = kept[0].tolist().index(centre)
    weights = scores[[centre, lesser]] / scores[[centre, lesser]].sum()
    expected = weights[0] * fresh.values[0, centre] + weights[1] * fresh.values[0, lesser]
    torch.testing.assert_close(values[0, at], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keys[0, at], fresh.keys[0, centre], rtol=1e-4, atol=1e-5)


def test_random_tokens_differ_by_layer_and_seed_and_nothing_else() -> None:
    signals = make_signals(CASE)
    other = replace(signals, queries=signals.queries * 2, _memo={})
    assert keep(RandomTokens(), 20, signals) == keep(RandomTokens(), 20, other)
    deeper = replace(signals, layer=signals.layer + 1, _memo={})
    assert keep(RandomTokens(), 20, signals) != keep(RandomTokens(), 20, deeper)
    assert keep(RandomTokens(), 20, signals) != keep(RandomTokens(seed=1), 20, signals)


def test_declared_work_follows_what_a_method_looks_at() -> None:
    shape = LayerShape(4096, 32, 8, 128)
    window, columns, keys = (m.work(shape, 256) for m in (SnapKV(), H2O(), KeyDiff()))
    assert window.flops == 2 * 32 * 4096 * 128 * 32
    assert columns.softmax_flops == 2 * 32 * 128 * 4096**2
    assert keys.softmax_flops == 0
    assert KVzip().work(shape, 256).passes == 1


def test_references_say_that_they_look_ahead() -> None:
    assert {m.name for m in EVERY_METHOD if m.looks_ahead} == {"future_attention", "probe_greedy"}


def test_every_scoring_method_is_scored_in_float32() -> None:
    for method in EVERY_METHOD:
        if isinstance(method, ScoredMethod):
            assert method.scores(make_signals(CASE)).dtype == torch.float32


@each("name", sorted({**methods(), **allocators()}))
def test_the_page_of_policies_names_everything(name: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "policies.md").read_text(encoding="utf-8")
    assert f"| `{name}`" in page
