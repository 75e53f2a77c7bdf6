"""Generation while the cache evicts: nothing lost with room for all, and replay agrees with it."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.benchmarks.decode_replay import full_attention, replay_decoding
from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.lazy_eviction import LazyEviction
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.testing.decode import decode_methods
from kvtune.runtime.generate import Generation, prompt_signals
from kvtune.runtime.generation_run import GenerationRun
from kvtune.runtime.live_policies import LivePolicy
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.tests.full_cache import observed_logits
from kvtune.tests.tiers import first

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, PROMPT, TOKENS, BUDGET = 3, 2, 33, 24, 9
LAZY = LazyEviction(window=5, threshold=0.03)
METHODS: list[DecodeMethod] = [
    LAZY if kind is LazyEviction else kind() for kind in decode_methods().values()
]


def uniform(method: Any, budget: Budget, **kwargs: Any) -> LivePolicy:
    return LivePolicy(Policy.uniform(Option(method, budget), LAYERS, HEADS), **kwargs)


@pytest.fixture(scope="module")
def prompt_ids() -> list[int]:
    drawn: list[int] = np.random.default_rng(4).integers(2, 258, PROMPT + 1).tolist()
    return drawn


def generate(
    model: Any, prompt_ids: list[int], policies: list[LivePolicy], **options: Any
) -> Generation:
    generation = Generation(model, prompt_ids, policies, room=TOKENS, **options)
    generation.advance(TOKENS)
    return generation


@pytest.fixture(scope="module")
def evicting(tiny_model: Any, prompt_ids: list[int]) -> Generation:
    policies = [uniform(method, Budget(tokens=BUDGET)) for method in METHODS]
    return generate(tiny_model, prompt_ids, policies)


def test_room_for_all_changes_nothing(tiny_model: Any, prompt_ids: list[int]) -> None:
    policies = [uniform(method, Budget(tokens=PROMPT + TOKENS)) for method in METHODS]
    for run in generate(tiny_model, prompt_ids, policies).results():
        assert run.kl.max() < 1e-5, run.name
        np.testing.assert_allclose(run.nll, run.full_nll, atol=1e-4)
        assert run.agrees.all()
        assert not run.evicted.any()
        assert not run.trimmed.any()
        assert (run.peak_entries == PROMPT + TOKENS).all()


def test_the_full_cache_generates_what_the_model_would(
    tiny_model: Any, prompt_ids: list[int], evicting: Generation
) -> None:
    tokens = evicting.token_ids
    logits = observed_logits(tiny_model, [*prompt_ids, *tokens[:-1]], TOKENS)
    assert logits.argmax(-1).tolist() == tokens
    nll = -logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    np.testing.assert_allclose(evicting.results()[0].full_nll, nll.numpy(), atol=1e-4)


def test_every_method_really_evicts_and_loses(evicting: Generation) -> None:
    for run, method in zip(evicting.results(), METHODS, strict=True):
        assert (run.trimmed == PROMPT - BUDGET).all()
        assert (run.evicted > 0).all(), run.name
        assert run.kl.mean() > 1e-3, run.name
        assert run.peak_entries.max() <= method.most(BUDGET, BUDGET)


def test_bytes_are_those_of_entries_and_statistics(evicting: Generation) -> None:
    runs = {run.name.split()[0]: run for run in evicting.results()}
    heads, entry, lengths = LAYERS * HEADS, 2 * 2 * 8, 4 * LAYERS * HEADS
    assert runs["streaming_llm"].mean_bytes == heads * BUDGET * entry + lengths
    assert runs["h2o"].mean_bytes == heads * BUDGET * (entry + 4) + lengths
    assert runs["h2o"].statistics_bytes == heads * BUDGET * 4
    assert runs["h2o"].peak_bytes == heads * (BUDGET + 1) * (entry + 4) + lengths
    assert runs["scissorhands"].mean_bytes < heads * BUDGET * (entry + 50) + lengths


def test_a_prompt_only_policy_keeps_what_is_generated(
    tiny_model: Any, prompt_ids: list[int]
) -> None:
    budget = Budget(tokens=BUDGET)
    policies = [uniform(H2O(), budget, evicts=False), uniform(SnapKV(window=4), budget)]
    for run in generate(tiny_model, prompt_ids, policies).results():
        assert not run.evicted.any()
        assert (run.trimmed == PROMPT - BUDGET).all()
        assert (run.peak_entries == BUDGET + TOKENS).all()


def test_heads_may_have_methods_and_budgets_of_their_own(
    tiny_model: Any, prompt_ids: list[int]
) -> None:
    heads = (
        (Option(H2O(), Budget(tokens=5)), Option(SnapKV(window=4), Budget(tokens=11))),
        (Option(Full(), ALL), Option(StreamingLLM(), Budget(tokens=7))),
        (Option(Tova(), Budget(tokens=6)), Option(Tova(), Budget(tokens=6))),
    )
    mixed, plain = LivePolicy(Policy("mixed", heads)), uniform(H2O(), Budget(tokens=5))
    runs = generate(tiny_model, prompt_ids, [mixed, plain]).results()
    assert runs[0].evicted.tolist() == [[TOKENS, 0], [0, TOKENS], [TOKENS, TOKENS]]
    assert runs[0].trimmed.tolist() == [
        [PROMPT - 5, PROMPT - 11],
        [0, PROMPT - 7],
        [PROMPT - 6] * 2,
    ]
    alone = generate(tiny_model, prompt_ids, [mixed]).results()[0]
    np.testing.assert_allclose(alone.kl, runs[0].kl, atol=1e-5)


def test_an_allocator_moves_decode_budgets_too(tiny_model: Any, prompt_ids: list[int]) -> None:
    option = Option(H2O(), Budget(tokens=BUDGET))
    pyramid = Policy.uniform(option, LAYERS, HEADS, allocator=Pyramid(beta=4.0))
    run = generate(tiny_model, prompt_ids, [LivePolicy(pyramid)]).results()[0]
    peaks = run.peak_entries[:, 0].tolist()
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]
    assert (run.peak_entries - 1).sum() == LAYERS * HEADS * BUDGET


def same(one: GenerationRun, other: GenerationRun) -> None:
    np.testing.assert_array_equal(one.kl, other.kl)
    np.testing.assert_array_equal(one.evicted, other.evicted)


def test_stretches_make_the_same_generation(
    tiny_model: Any, prompt_ids: list[int], evicting: Generation
) -> None:
    policies = [uniform(method, Budget(tokens=BUDGET)) for method in METHODS]
    other = Generation(tiny_model, prompt_ids, policies, room=TOKENS)
    for stretch in (1, 10, 3, 100):
        other.advance(stretch)
    assert other.generated == TOKENS
    assert other.token_ids == evicting.token_ids
    for one, two in zip(evicting.results(), other.results(), strict=True):
        same(one, two)


def test_steps_leave_no_tensor_behind(tiny_model: Any, prompt_ids: list[int]) -> None:
    """What every step adds lies in room taken before: a heap of leftovers between logits grows."""
    policies = [uniform(method, Budget(tokens=BUDGET)) for method in METHODS]
    generation = Generation(tiny_model, prompt_ids, policies, room=TOKENS)

    def tensors() -> int:
        gc.collect()
        return sum(type(each) is Tensor for each in gc.get_objects())

    generation.advance(TOKENS // 2)  # what is made at the first eviction stays
    before = tensors()
    generation.advance(TOKENS)
    assert tensors() == before


def test_tokens_are_drawn_by_seed_and_banned_ones_never(
    tiny_model: Any, prompt_ids: list[int]
) -> None:
    def drawn(seed: int, **options: Any) -> list[int]:
        return generate(tiny_model, prompt_ids, [], seed=seed, temperature=1.0, **options).token_ids

    assert drawn(1) == drawn(1) != drawn(2)
    banned = drawn(1)[0]
    assert banned not in drawn(1, banned=[banned])


@pytest.mark.parametrize(
    ("prompt", "live", "told"),
    [
        ([5], uniform(H2O(), Budget(tokens=4)), "a prompt of 1 tokens"),
        ([5, 6], LivePolicy(Policy.uniform(Option(), 2, 2)), "is for 2 layers"),
        (
            [5] * 41,
            LivePolicy(Policy.uniform(Option(Razor(), Budget(9)), 3, 2)),
            "stores more than",
        ),
        ([5, 6], LivePolicy(Policy.uniform(Option(Quest(), Budget(1)), 3, 2)), "stores more than"),
        ([5, 6], LivePolicy(Policy.uniform(Option(keys=Int4()), 3, 2)), "tokens share scales"),
    ],
    ids=["one token", "another model", "entries for many", "a reader", "int4"],
)
def test_what_cannot_be_generated_is_refused(
    tiny_model: Any, prompt: list[int], live: LivePolicy, told: str
) -> None:
    with pytest.raises(KvtuneError, match=told):
        Generation(tiny_model, prompt, [live], room=2)


def test_results_before_the_first_token_are_refused(tiny_model: Any, prompt_ids: list[int]) -> None:
    with pytest.raises(KvtuneError, match="nothing has been generated"):
        Generation(tiny_model, prompt_ids, [], room=2).results()


@pytest.mark.parametrize("prompt", first([3, 2, 7]))
def test_short_prompts_and_budgets_below_sinks_and_window(
    tiny_model: Any, prompt_ids: list[int], prompt: int
) -> None:
    policies = [
        uniform(method, Budget(tokens=budget)) for method in METHODS for budget in (1, 3, 5)
    ]
    runs = generate(tiny_model, prompt_ids[:prompt], policies).results()
    assert [run.name for run in runs if not np.isfinite(run.kl).all()] == []
    assert [run.name for run in runs if not (run.evicted > 0).all()] == []


# Replay


Seen = tuple[list[Tensor], ...]
"""Queries, keys and values of one row of one layer, step by step."""


def record(generation: Generation, layer: int, row: int) -> Seen:
    """Let one row of one layer's group remember queries, keys and values."""
    group = next(g for g in generation.layers[layer] if row in g.rows)
    own, step = group.rows.index(row), group.cache.attend
    seen: Seen = ([], [], [])

    def stepped(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        given = queries, keys, values
        for each, tensor in zip(seen, given, strict=True):
            each.append(tensor[own])
        return step(*given)

    group.cache.attend = stepped  # type: ignore[method-assign]
    return seen


@pytest.fixture(scope="module")
def recorded(tiny_model: Any, prompt_ids: list[int]) -> tuple[Generation, list[list[Seen]]]:
    """Every method's policy, and what each of its layers has seen; the full cache is row 0."""
    policies = [uniform(method, Budget(tokens=BUDGET)) for method in METHODS]
    generation = Generation(tiny_model, prompt_ids, policies, room=TOKENS)
    seen = [
        [record(generation, layer, 1 + row) for layer in range(LAYERS)]
        for row in range(len(METHODS))
    ]
    generation.advance(TOKENS)
    return generation, seen


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_replay_keeps_the_tokens_that_the_live_run_keeps(
    tiny_model: Any,
    prompt_ids: list[int],
    recorded: tuple[Generation, list[list[Seen]]],
    method: DecodeMethod,
) -> None:
    generation, seen = recorded
    row = METHODS.index(method)
    prompt = prompt_signals(tiny_model, prompt_ids, method.needs)
    for layer in range(LAYERS):
        queries, keys, values = (torch.stack(each, -2) for each in seen[row][layer])
        replay = LayerReplay(prompt(layer), queries, keys, values, torch.empty(0))
        found = replay_decoding(replay, method, np.full((1, HEADS), BUDGET))
        group = next(g for g in generation.layers[layer] if 1 + row in g.rows)
        own = group.rows.index(1 + row)
        assert found.cache.kept()[0] == group.cache.kept()[own]
        np.testing.assert_array_equal(found.cache.evicted[0], group.cache.evicted[own])


@pytest.fixture(scope="module")
def layer(tiny_trace: Any) -> LayerReplay:
    return LayerReplay.of(tiny_trace.layer(tiny_trace.samples[0].id, 1))


def test_replay_with_room_for_all_is_the_full_cache(layer: LayerReplay) -> None:
    found = replay_decoding(layer, H2O(), np.full((1, HEADS), 100))
    torch.testing.assert_close(found.output[0], layer.full, rtol=1e-4, atol=1e-5)
    for share in (found.mass, found.cosine):
        torch.testing.assert_close(share, torch.ones_like(share))


def test_replay_measures_the_mass_and_angle_of_what_it_saw(layer: LayerReplay) -> None:
    budgets = np.array([[6, 6], [20, 20]])
    found = replay_decoding(layer, StreamingLLM(sinks=2), budgets)
    rows, prompt = full_attention(layer), layer.signals.prompt_tokens
    for t in (0, 5, 11):
        now = prompt + t
        seen = [0, 1, *range(now - 4, now + 1)]  # four of the window before, and itself
        masked = torch.zeros_like(rows[:, :, t])
        masked[..., seen] = rows[:, :, t][..., seen]
        torch.testing.assert_close(found.mass[0, :, t], masked.sum(-1).mean(-1))
        cosine = torch.cosine_similarity(masked, rows[:, :, t], dim=-1).mean(-1)
        torch.testing.assert_close(found.cosine[0, :, t], cosine)
    assert (found.mass[1] > found.mass[0]).all()


def test_the_authors_lazy_eviction_holds_the_prompt_in_a_generation(
    tiny_model: Any, prompt_ids: list[int]
) -> None:
    run = generate(
        tiny_model, prompt_ids, [uniform(replace(LAZY, prompt="kept"), Budget(tokens=BUDGET))]
    ).results()[0]
    assert not run.trimmed.any()
    assert (run.peak_entries == PROMPT + LAZY.window).all()
