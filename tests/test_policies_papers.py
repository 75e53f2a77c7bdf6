"""Methods and allocators against straight-line references, written from the papers' formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.cake_layers import CakeLayers
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.method import ScoredMethod, methods
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.policy_file.document import read_policy
from kvtune.policies.testing import Case, make_signals
from kvtune.tests.tiers import each


def attention_rows(signals: Any, window: int) -> np.ndarray:
    """Causal attention of the last queries, ``[H, G, W, P]``, one row at a time."""
    keys = signals.keys.double().numpy()
    heads, tokens, _ = keys.shape
    queries = signals.queries.double().numpy().reshape(heads, -1, tokens, keys.shape[-1])
    found = np.zeros((heads, queries.shape[1], window, tokens))
    for head in range(heads):
        for member in range(queries.shape[1]):
            for row in range(window):
                at = tokens - window + row
                logits = keys[head, : at + 1] @ queries[head, member, at] * signals.scale
                weights = np.exp(logits - logits.max())
                found[head, member, row, : at + 1] = weights / weights.sum()
    return found


def max_pooled(scores: np.ndarray, kernel: int) -> np.ndarray:
    reach = kernel // 2
    return np.array(
        [scores[max(at - reach, 0) : at + reach + 1].max() for at in range(len(scores))]
    )


def snapkv_scores(signals: Any, window: int, kernel: int, group: str) -> Any:
    """Before the window, ``[H, P - W]``."""
    prefix = signals.prompt_tokens - window
    drawn = attention_rows(signals, window).mean(2)[..., :prefix]
    if group == "averaged":
        return np.array([max_pooled(head.mean(0), kernel) for head in drawn])
    return np.array([np.mean([max_pooled(one, kernel) for one in head], 0) for head in drawn])


@pytest.mark.parametrize("group", ["averaged", "pooled"])
@pytest.mark.parametrize("seed", range(4))
def test_snapkv_scores_are_the_formulas(group: Any, seed: int) -> None:
    signals = make_signals(Case(70, 0, kv_heads=3, group=4, seed=seed))
    ours = SnapKV(window=8, group=group).scores(signals).numpy()[:, :62]
    np.testing.assert_allclose(ours, snapkv_scores(signals, 8, 7, group), rtol=1e-4)
    other = snapkv_scores(signals, 8, 7, "pooled" if group == "averaged" else "averaged")
    assert np.abs(ours / other - 1).max() > 0.01  # or the order would not matter


@each("safeguard, seed", [(x, y) for x in (0.0, 0.2, 0.5, 1.0) for y in range(6)])
def test_adakv_budgets_are_the_papers(safeguard: float, seed: int) -> None:
    """B = (1 - a) B* + a mean, B* from the layer's best scores; rounding is within one token."""
    signals = make_signals(Case(80, 0, kv_heads=4, group=2, seed=seed))
    budget, window = 24, 8
    base = budget - window
    scores = snapkv_scores(signals, window, 7, "averaged")
    best = np.argsort(-scores, axis=None)[: base * 4]
    won = np.bincount(best // scores.shape[1], minlength=4)
    wanted = (1 - safeguard) * won + safeguard * base + window
    split = AdaKV(safeguard=safeguard).split([budget] * 4, [SnapKV(window=window)] * 4, signals)
    assert sum(split) == 4 * budget
    assert np.abs(np.array(split) - wanted).max() < 1


def test_adakv_blends_where_kvpress_guarantees() -> None:
    signals, method = make_signals(Case(80, 0, kv_heads=4, group=2)), SnapKV(window=8)
    blend, floor = (
        AdaKV(safeguard=0.5, rule=rule).split([24] * 4, [method] * 4, signals)
        for rule in ("blend", "floor")
    )
    free = AdaKV(safeguard=0.0).split([24] * 4, [method] * 4, signals)
    assert blend != floor
    assert np.ptp(blend) < np.ptp(floor) <= np.ptp(free)


def authors_pyramid(capacity: int, window: int, beta: int, layers: int, tokens: int) -> list[int]:
    base = capacity - window
    if tokens < 2 * base:
        return [capacity] * layers
    least = base // beta
    most = 2 * base - least
    if most >= tokens - window:
        most = tokens - window
        least = 2 * base - most
    step = (most - least) // (layers - 1)
    return [most - layer * step + window for layer in range(layers)]


@pytest.mark.parametrize("beta", [1, 5, 20])
@pytest.mark.parametrize("capacity", [64, 128, 300, 520, 700, 980])
def test_pyramid_budgets_are_the_authors_but_for_rounding(capacity: int, beta: int) -> None:
    """At 1,000 tokens the line is steep, then capped by the prompt, then given up."""
    theirs = np.array(authors_pyramid(capacity, 32, beta, 12, 1000))
    ours = Pyramid(beta=beta, window=32).plan(np.full((12, 2), capacity), 1000)
    assert ours.sum() == 12 * 2 * capacity
    assert (ours[:, 0] == ours[:, 1]).mean() > 0.4  # a rest may go to one head of a layer
    assert np.abs(ours - theirs[:, None]).max() <= 13  # their step is floored, 11 layers long
    assert ours[0, 0] - theirs[0] in (-1, 0, 1)


def test_pyramid_above_half_the_prompt_is_even() -> None:
    even = np.full((6, 2), 600)
    assert (Pyramid(window=32).plan(even, 1000) == even).all()
    assert (Pyramid(window=32).plan(np.full((6, 2), 500), 1000) != 500).any()


def authors_cake(preference: Any, total: int, most: int) -> Any:
    """Shares cut to whole tokens; what exceeds a layer goes evenly to those with room."""
    budgets = (preference / preference.sum() * total).astype(int)
    while (over := (budgets - most).clip(0).sum()) > 0:
        budgets = budgets.clip(None, most)
        free = np.flatnonzero(budgets < most)
        if len(free) == 0:
            return budgets
        budgets[free] += over // len(free)
        budgets[free[: over % len(free)]] += 1
    while (missing := total - budgets.sum()) > 0:
        free = np.flatnonzero(budgets < most)[:missing]
        if len(free) == 0:
            break
        budgets[free] += 1
    return budgets


@pytest.mark.parametrize("capacity", [20, 40, 55])
@pytest.mark.parametrize("seed", range(4))
def test_cake_layers_budgets_are_the_authors_but_for_rounding(capacity: int, seed: int) -> None:
    layers, window, tokens = 5, 8, 60
    prompts = [
        make_signals(Case(tokens, 0, kv_heads=2, group=2, seed=10 * seed + at))
        for at in range(layers)
    ]
    for at, prompt in enumerate(prompts):  # from sharp to flat attention
        prompts[at] = replace(prompt, queries=prompt.queries * 4.0 ** (1 - at), _memo={})
    preference = []
    for prompt in prompts:
        drawn = attention_rows(prompt, window)[..., : tokens - window]
        entropy = -(drawn * np.log(drawn + 1e-10)).sum()
        preference.append(entropy * drawn.var(2, ddof=1).sum())
    theirs = window + authors_cake(
        np.array(preference), (capacity - window) * layers, tokens - window
    )
    given = np.full((layers, 2), capacity)
    ours = CakeLayers(window=window).settle(
        given, [[SnapKV(window=window)] * 2] * layers, prompts.__getitem__
    )
    assert ours.sum() == given.sum()
    assert np.ptp(theirs) > 5  # or nothing is tried
    assert np.abs(ours - theirs[:, None]).max() <= layers


WITHOUT_SCORES = [
    name
    for name, kind in methods().items()
    if not issubclass(kind, ScoredMethod) or kind.shape != "scored"
]


def test_some_methods_have_no_scores_to_compare() -> None:
    assert {"full", "streaming_llm", "keydiff_blockwise"} <= set(WITHOUT_SCORES)


@each("allocator, name", [(x, y) for x in ("adakv", "model_wide") for y in WITHOUT_SCORES])
def test_comparing_scores_that_a_method_lacks_is_refused_when_read(
    allocator: str, name: str
) -> None:
    text = f"kvtune_policy: 1\nallocator: {allocator}\npolicy: {{method: {name}, budget: 25%}}\n"
    with pytest.raises(KvtuneError, match=f"{allocator} compares .* not {name}") as caught:
        read_policy(text)
    assert caught.value.where == "policy:2"
    kind = AdaKV if allocator == "adakv" else ModelWide
    with pytest.raises(KvtuneError, match="one scoring method"):
        kind().check([[methods()[name]()] * 2])


def test_methods_that_differ_are_refused_where_scores_are_compared() -> None:
    heads = "options: {a: {method: snapkv, budget: 9}, b: {method: h2o, budget: 9}}\n"
    mixed = "heads: [[a, b], [a, a]]\n"
    apart = "heads: [[a, a], [b, b]]\n"
    with pytest.raises(KvtuneError, match="one scoring method for a layer, not snapkv, h2o"):
        read_policy(f"kvtune_policy: 1\nallocator: adakv\n{heads}{mixed}")
    read_policy(f"kvtune_policy: 1\nallocator: adakv\n{heads}{apart}")
    with pytest.raises(KvtuneError, match="one scoring method for the model"):
        read_policy(f"kvtune_policy: 1\nallocator: model_wide\n{heads}{apart}")
