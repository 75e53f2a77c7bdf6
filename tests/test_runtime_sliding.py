"""Sliding-window layers in the paged cache: exactly their window, beyond it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.profiles.models import find_model
from kvtune.runtime import load_cache
from kvtune.runtime.admission import read_for_all
from kvtune.runtime.cache.sliding import Ring, places_of
from kvtune.runtime.graph import generate
from kvtune.tests.padded import ids

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

WINDOW = 24
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
FULL = Policy.uniform(Option(), 3, 2)


@pytest.fixture
def gemma(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    """Two layers of three slide."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(**tiny_fields, sliding_window=WINDOW, layer_types=LAYERS)
    network = make_network(config).eval()
    network.generation_config.eos_token_id = None
    return network


@pytest.mark.parametrize("prompt", [60, 10])
def test_gemma_generates_what_its_own_cache_does_beyond_its_window(gemma: Any, prompt: int) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 55, "do_sample": False}
    expected = gemma.generate(**ids(prompt), **asked)
    cache = load_cache(FULL, gemma, new_tokens=100)
    found = gemma.generate(**ids(prompt), **asked, past_key_values=cache)
    assert torch.equal(found, expected)
    lengths = [layer.paged.lengths.sum(0).tolist() for layer in cache.layers]
    assert lengths == [[WINDOW] * 2, [prompt + 54] * 2, [WINDOW] * 2]
    for layer in cache.layers:
        assert layer.paged.paged.lengths.tolist() == layer.paged.lengths.ravel().tolist()
    cache.pool.check_integrity()


def test_every_layer_of_a_mistral_slides(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    """Token for token, told what its own cache generates; pages hold bf16, the model float32."""
    from transformers import MistralConfig

    network = make_network(MistralConfig(**tiny_fields, sliding_window=20)).eval()
    text = network.generate(**ids(30), max_new_tokens=50, min_new_tokens=50, do_sample=False)
    with torch.no_grad():
        expected = network(text).logits[0, 29:]
        cache = load_cache(FULL, network)
        found = [network(text[:, :30], past_key_values=cache).logits[:, -1]]
        for at in range(30, 80):
            step = {"position_ids": torch.tensor([[at]]), "past_key_values": cache}
            found.append(network(text[:, at : at + 1], **step).logits[:, -1])
    torch.testing.assert_close(torch.cat(found), expected, atol=0.3, rtol=0.05)
    assert [layer.paged.lengths.sum(0).tolist() for layer in cache.layers] == [[20, 20]] * 3


@pytest.mark.parametrize("seed", range(6))
def test_what_a_ring_holds_is_what_its_window_shows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    window, prompt = int(rng.integers(1, 40)), int(rng.integers(1, 60))
    read = min(window, prompt)
    kept = [np.flatnonzero(rng.random(read) < share) for share in (0.0, 0.3, 0.8, 1.0)]
    ring = Ring(places_of([torch.from_numpy(row) for row in kept], [read] * 4, window))
    held: list[dict[int, int]] = [
        {place: at + prompt - read for place, at in enumerate(row.tolist())} for row in kept
    ]
    lengths = np.array([len(row) for row in kept])
    while ring.entered < 3 * window:
        tokens = int(rng.integers(1, 4))
        for newest in range(prompt + ring.entered, prompt + ring.entered + tokens):
            for row, mine in enumerate(held):
                place = int(ring.places[row, (newest - prompt) % window])
                assert place <= len(mine)  # fresh ones come in order
                mine[place] = newest
                chosen = {*(kept[row] + prompt - read).tolist(), *range(prompt, newest + 1)}
                assert set(mine.values()) == {p for p in chosen if p > newest - window}
        lengths = ring.after(lengths, tokens)
        ring.entered += tokens
        assert lengths.tolist() == [len(mine) for mine in held]


def test_the_window_bounds_the_budget_and_methods_choose_inside_it(gemma: Any) -> None:
    options = (Option(H2O(), Budget(tokens=10)), Option(SnapKV(window=4), Budget(share=0.5)))
    cache = load_cache(Policy("mixed", (options,) * 3), gemma)
    gemma(**ids(100), past_key_values=cache)
    assert cache.kept() == [[10, WINDOW], [10, 50], [10, WINDOW]]
    assert cache.prompt_bytes() == sum(4 + 32 * n for row in cache.kept() for n in row)


def test_bytes_are_those_of_the_models_shape(gemma: Any) -> None:
    shape = replace(find_model("gemma-3-1b"), layers=3, kv_heads=2, head_dim=8)
    shape = replace(shape, windows=(WINDOW, None, WINDOW))
    for tokens in (100, 12):
        cache = load_cache(FULL, gemma)
        gemma(**ids(tokens), past_key_values=cache)
        assert cache.prompt_bytes() == shape.kv_bytes(tokens) + 4 * 6


def test_padded_sequences_slide_as_each_alone(gemma: Any) -> None:
    options = (Option(SnapKV(window=4), Budget(tokens=9)), Option())
    policy, inputs, lengths = Policy("mixed", (options,) * 3), ids(40, 17), (40, 17)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = load_cache(policy, gemma)
    alone = [load_cache(policy, gemma) for _ in lengths]
    with torch.no_grad():
        gemma(**inputs, position_ids=places, past_key_values=together)
        for row, (cache, length) in enumerate(zip(alone, lengths, strict=True)):
            gemma(inputs["input_ids"][row : row + 1, 40 - length :], past_key_values=cache)
        for turn in range(30):
            tokens, at = torch.tensor([[5], [9]]) + turn, torch.tensor([[40], [17]]) + turn
            both = gemma(tokens, position_ids=at, past_key_values=together).logits[:, -1]
            for row, cache in enumerate(alone):
                mine = slice(row, row + 1)
                one = gemma(tokens[mine], position_ids=at[mine], past_key_values=cache)
                torch.testing.assert_close(both[row], one.logits[0, -1], atol=1e-3, rtol=1e-3)


def test_padding_before_every_prompt_is_nothing_that_a_window_loses(gemma: Any) -> None:
    inputs = {name: F.pad(each, (30, 0)) for name, each in ids(10, 7).items()}
    found = generate(gemma, load_cache(FULL, gemma, new_tokens=8), *inputs.values(), new_tokens=8)
    less = generate(
        gemma, load_cache(FULL, gemma, new_tokens=8), *ids(10, 7).values(), new_tokens=8
    )
    assert torch.equal(found, less)


def test_the_decode_loop_slides_too(gemma: Any) -> None:
    inputs = ids(30, 21)
    cache = load_cache(FULL, gemma, new_tokens=40)
    found = generate(gemma, cache, *inputs.values(), new_tokens=40)
    gemma.set_attn_implementation("sdpa")
    theirs = gemma.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert torch.equal(found, theirs[:, 30:])


def test_the_others_slide_on_beside_a_sequence_that_has_ended(gemma: Any) -> None:
    twin, ours = (load_cache(FULL, gemma, new_tokens=100) for _ in range(2))
    for cache in (twin, ours):
        gemma.generate(**ids(40, 40), max_new_tokens=7, past_key_values=cache)
    ours.free(0)
    for entered in range(WINDOW + 3):
        step = torch.full((2, 1), 5 + entered)
        expected, found = (gemma(step, past_key_values=x).logits for x in (twin, ours))
        torch.testing.assert_close(found[1], expected[1])
    layer = ours.layers[0].paged
    assert layer.lengths.sum(0).tolist() == [0, 0, WINDOW, WINDOW]
    assert layer.paged.lengths.tolist() == layer.lengths.ravel().tolist()
    ours.pool.check_integrity()


def test_what_cannot_slide_is_refused(gemma: Any) -> None:
    coded = Policy.uniform(Option(Full(), ALL, Int4(), Int4()), 3, 2)
    with pytest.raises(KvtuneError, match="layer 0 slides over 24 tokens"):
        gemma(**ids(20), past_key_values=load_cache(coded, gemma, new_tokens=5))
    gemma(**ids(20), past_key_values=load_cache(coded, gemma, new_tokens=4))
    for reader in (Quest(block=16), TokenSelect(sinks=2, recent=4)):
        chosen = Policy.uniform(Option(reader, Budget(tokens=64)), 3, 2)
        with pytest.raises(KvtuneError, match="chooses among entries that would have to leave"):
            gemma(**ids(20), past_key_values=load_cache(chosen, gemma, new_tokens=5))
        gemma(**ids(20), past_key_values=load_cache(chosen, gemma, new_tokens=4))
    short = load_cache(FULL, gemma, new_tokens=4)
    with pytest.raises(KvtuneError, match="did not expect"):
        gemma.generate(**ids(20), max_new_tokens=10, past_key_values=short)
    waiting = Policy.uniform(Option(H2O(), Budget(tokens=5)), 3, 2, allocator=ModelWide())
    with pytest.raises(KvtuneError, match="waits for the whole prompt"):
        gemma(**ids(40), past_key_values=load_cache(waiting, gemma))


def test_a_cache_filled_with_one_prompt_slides_as_one_that_read_it(gemma: Any) -> None:
    caches = [load_cache(FULL, gemma, new_tokens=9) for _ in range(2)]
    read_for_all(gemma, caches[0], ids(40)["input_ids"], 2)
    step = {"input_ids": torch.tensor([[5], [9]]), "position_ids": torch.tensor([[40], [40]])}
    with torch.no_grad():
        gemma(ids(40)["input_ids"].repeat(2, 1), past_key_values=caches[1])
        answers = [gemma(**step, past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*answers)
    assert caches[0].kept() == caches[1].kept() == [[WINDOW] * 4, [40] * 4, [WINDOW] * 4]
