"""Long generations: entries of fewer bits leave one by one, and a bound on bytes holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.rotated import RotatedInt3, RotatedInt4
from kvtune.policies.methods.a2sf import A2SF
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.slot_bytes import ROLES, held_bytes, stores_apart
from kvtune.runtime.generate import Generation
from kvtune.runtime.live_policies import LivePolicy
from kvtune.simulator.quality.decoding import all_layers, build_decode_tables, decode_features
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.tuner.long.bound import mean_full_bytes
from kvtune.tuner.long.menu import LongMenu, most_bytes
from kvtune.tuner.long.plans import Generated, candidates, choose

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, PROMPT, TOKENS = 3, 2, 33, 24  # windows of 3 tokens fill and are stored
FORM = RotatedInt4(group=8)
MENU = LongMenu(
    methods=(A2SF(), StreamingLLM(sinks=2)), shares=(0.1, 0.3), formats=(Bf16(), FORM), residual=3
)


@pytest.fixture(scope="module")
def prompt_ids() -> list[int]:
    drawn: list[int] = np.random.default_rng(4).integers(2, 258, PROMPT + 1).tolist()
    return drawn


def uniform(option: Option, **kwargs: Any) -> LivePolicy:
    return LivePolicy(Policy.uniform(option, LAYERS, HEADS), **kwargs)


@pytest.mark.parametrize("form", [Bf16(), RotatedInt4(), RotatedInt3(), Int4(keys_by="token")])
def test_a_token_that_is_stored_apart_takes_what_its_buffers_take(form: Format) -> None:
    assert stores_apart(form)
    vectors = torch.randn(1, 64)
    stored = sum(form.encode(vectors, role).nbytes for role in ROLES)
    assert held_bytes(np.array(5), (form, form), 0, 0, 64) == 5 * stored


@pytest.mark.parametrize(
    "form", [Int4(), RotatedInt4(keys_by="channel"), RotatedInt4(exact_first=4)]
)
def test_tokens_that_share_scales_are_not_stored_apart(form: Format) -> None:
    assert not stores_apart(form)


def test_the_residual_window_is_counted_in_16_bits() -> None:
    exact, stored = 4 * 64, 2 * RotatedInt4().bound(1, 64, "keys")
    found = held_bytes(np.array([2, 10]), (RotatedInt4(), RotatedInt4()), 3, 32, 64)
    assert found.tolist() == [2 * (exact + 4), 6 * exact + 4 * stored + 10 * 4]


def watched(generation: Generation, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Let the first cache of a layer of a policy remember the keys that enter."""
    group = next(g for g in generation.layers[layer] if 1 in g.rows)
    step = group.cache.attend
    seen: list[tuple[Tensor, Tensor]] = []

    def stepped(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        seen.append((keys.clone(), values.clone()))
        return step(queries, keys, values)

    group.cache.attend = stepped  # type: ignore[method-assign]
    return seen


def test_a_generated_token_is_stored_once_when_it_leaves_the_residual_window(
    tiny_model: Any, prompt_ids: list[int]
) -> None:
    option = Option(StreamingLLM(sinks=2), Budget(tokens=12), FORM, FORM)
    generation = Generation(tiny_model, prompt_ids, [uniform(option, residual=3)], room=TOKENS)
    seen = watched(generation, 1)
    generation.advance(TOKENS)
    cache = next(g for g in generation.layers[1] if 1 in g.rows).cache
    one = torch.ones(1, HEADS, dtype=torch.int64)
    for slot, position in enumerate(cache.state.positions[0, 0].tolist()):
        if position < PROMPT:
            continue
        entered = seen[position - PROMPT]
        old = position <= cache.state.now - 3
        for held, came, role in zip((cache.keys, cache.values), entered, ROLES, strict=True):
            stored = FORM.roundtrip(came[:, :, None], one, role)[:, :, 0] if old else came
            torch.testing.assert_close(held[:, 0, slot], stored[:, 0])


def test_fewer_bits_lose_something_and_hold_less(tiny_model: Any, prompt_ids: list[int]) -> None:
    options = [Option(A2SF(), Budget(tokens=16), form, form) for form in (Bf16(), FORM)]
    generation = Generation(tiny_model, prompt_ids, [uniform(o) for o in options], room=TOKENS)
    generation.advance(TOKENS)
    exact, narrow = generation.results()
    assert narrow.mean_bytes < exact.mean_bytes
    assert (narrow.kl != exact.kl).any()
    assert (narrow.evicted > 0).all()


def test_a_plan_that_could_exceed_its_limit_does_not_start(
    tiny_model: Any, prompt_ids: list[int]
) -> None:
    option = Option(A2SF(), Budget(tokens=9), FORM, FORM)
    each = most_bytes(option, PROMPT, TOKENS, 3, 8)
    most = LAYERS * HEADS * (each + 4)  # a length beside each head
    for limit, starts in ((most, True), (most - 1, False)):
        live = uniform(option, residual=3, limit_bytes=limit)
        if not starts:
            with pytest.raises(KvtuneError, match="could come to hold"):
                Generation(tiny_model, prompt_ids, [live], room=TOKENS)
            continue
        generation = Generation(tiny_model, prompt_ids, [live], room=TOKENS)
        generation.advance(TOKENS)
        assert generation.results()[0].peak_bytes == most


def test_a_cache_that_comes_to_hold_more_is_stopped(tiny_model: Any, prompt_ids: list[int]) -> None:
    live = uniform(Option(A2SF(), Budget(tokens=9)), limit_bytes=10**6)
    generation = Generation(tiny_model, prompt_ids, [live], room=TOKENS)
    cache = next(g for g in generation.layers[0] if 1 in g.rows).cache
    cache.peak = cache.peak + 10**6
    with pytest.raises(KvtuneError, match="holds"):
        generation.advance(1)


def test_layers_step_side_by_side_as_each_alone(tiny_trace: Any) -> None:
    sample = tiny_trace.samples[0]
    options = MENU.options(sample.prompt + sample.observed)
    together = decode_features(all_layers(tiny_trace, sample, "cpu"), options, 3, 4)
    alone = [
        decode_features(LayerReplay.of(tiny_trace.layer(sample.id, layer)), options, 3, 4)
        for layer in range(LAYERS)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-6)


def test_keeping_everything_in_16_bits_loses_nothing_by_replay(tiny_trace: Any) -> None:
    menu = replace(MENU, shares=(0.2, 1.0))
    first = tiny_trace.samples[0]
    options = menu.options(first.prompt + first.observed)
    tables = build_decode_tables(tiny_trace, options, block=4)
    for column, option in enumerate(options):
        whole = option.method == Full() or option.budget.tokens == first.prompt + first.observed
        nothing = whole and option.keys == Bf16()
        assert (tables.loss[..., column].max() < 1e-8) == nothing


def test_every_candidate_keeps_the_bound_and_the_live_one_is_chosen(tiny_trace: Any) -> None:
    samples = tiny_trace.samples
    tokens = samples[0].prompt + samples[0].observed
    tables = build_decode_tables(tiny_trace, MENU.options(tokens), block=4)
    judged = [replace(s, split="select") if s.split == "evaluate" else s for s in tables.samples]
    tables = replace(tables, samples=tuple(judged))
    full = mean_full_bytes(PROMPT, TOKENS, LAYERS * HEADS, 8)
    asked = Generated(PROMPT, TOKENS, int(0.3 * full), MENU)
    found = candidates(tables, asked)
    assert all(plan.most_bytes <= asked.bound_bytes for plan in found)
    assert any(not plan.is_uniform for plan in found)
    for plan in (
        plan for plan in found if plan.is_uniform and plan.policy.heads[0][0].budget != ALL
    ):
        option = plan.policy.heads[0][0]
        wider = replace(option, budget=Budget(tokens=(option.budget.tokens or 0) + 1))
        more = most_bytes(wider, *asked.shape(8)) + 4
        assert plan.most_bytes <= asked.bound_bytes < LAYERS * HEADS * more
    assert [p.predicted for p in found] == sorted(p.predicted for p in found)
    plan, rounds = choose(found, lambda plans: [float(-n) for n in range(len(plans))])
    assert plan.name == list(rounds)[-1]
    with pytest.raises(KvtuneError, match="no plan holds"):
        candidates(tables, replace(asked, bound_bytes=100))


def test_options_stand_in_the_same_order_for_every_length() -> None:
    short, long = MENU.options(50), MENU.options(5000)
    assert [(o.method, o.keys) for o in short] == [(o.method, o.keys) for o in long]
    assert most_bytes(Option(Full(), ALL), 100, 50, 0, 64) == 150 * 256
    assert most_bytes(Option(H2O(), Budget(tokens=20)), 100, 50, 0, 64) == 21 * (256 + 4)


@pytest.mark.full
def test_no_generation_of_a_hundred_holds_more_than_its_bound(tiny_model: Any) -> None:
    """Random plans, each with no more than it was counted to need; entries are counted in slots."""
    rng = np.random.default_rng(0)
    menu = replace(MENU, shares=(0.1, 0.3, 0.7))
    options = menu.options(PROMPT + TOKENS)
    for number in range(100):
        picked = [[options[n] for n in rng.integers(0, len(options), HEADS)] for _ in range(LAYERS)]
        policy = Policy(f"random {number}", tuple(map(tuple, picked)))
        each = [most_bytes(o, PROMPT, TOKENS, 3, 8) for o in policy.options()]
        limit = sum(each) + 4 * len(each)
        ids = rng.integers(2, 258, PROMPT + 1).tolist()
        live = LivePolicy(policy, residual=3, limit_bytes=limit)
        generation = Generation(tiny_model, ids, [live], room=TOKENS)
        for _ in range(TOKENS):
            generation.advance(1)
            assert in_slots(generation) <= limit
        assert generation.results()[0].peak_bytes <= limit


def in_slots(generation: Generation) -> float:
    """Bytes of what lies in the slots of the policy, by the positions that are live."""
    total = 4.0 * LAYERS * HEADS
    for layer in generation.layers:
        for group in (group for group in layer if 1 in group.rows):
            cache = group.cache
            positions = cache.state.positions[group.rows.index(1)]
            live = (positions >= 0).sum(-1).numpy()
            exact = (positions > max(cache.state.now - 3, PROMPT - 1)).sum(-1).numpy()
            both = zip(cache.forms, ROLES, strict=True)
            stored = sum(form.bound(1, 8, role) for form, role in both)
            bits = 0 if cache.method is None else cache.method.entry_bits
            total += float((live * (stored + bits / 8) + exact * (32 - stored)).sum())
    return total
