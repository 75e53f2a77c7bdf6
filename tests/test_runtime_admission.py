"""Prompts that are read one after another give the tokens and pages of prompts read together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.sentencekv import SentenceKV
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime.admission import in_chunks, read_different, read_prompts, together
from kvtune.runtime.cache.layer import CacheLayer
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.graph import DecodeLoop, generate
from kvtune.tests.padded import ids
from kvtune.tests.test_runtime_ended import CACHES, LAYERS
from kvtune.tests.tiers import first
from kvtune.traces.models import wrap

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

SHAPE = 3, 2
KEPT = Budget(tokens=24)
MIXED = Policy(
    "mixed",
    (
        (Option(SnapKV(window=4), KEPT, Int4(exact_first=4), Int4(exact_first=4)), Option()),
        (Option(H2O(), KEPT, Int2(), Int2()), Option(SnapKV(window=4), KEPT, Fp8(), Fp8())),
        (Option(H2O(), KEPT), Option(H2O(), Budget(share=0.5), Int4(), Int4())),
    ),
)
POLICIES = {
    "uncompressed": Policy.uniform(Option(), *SHAPE),
    "mixed": MIXED,
    "across heads": Policy.uniform(Option(H2O(), KEPT), *SHAPE, allocator=AdaKV()),
    "waits": Policy.uniform(Option(SnapKV(window=4), KEPT), *SHAPE, allocator=ModelWide()),
    "beside": Policy.uniform(Option(Razor(), KEPT), *SHAPE),
    "reader": Policy.uniform(Option(Quest(block=64), Budget(tokens=64)), *SHAPE),
}
LENGTHS = 90, 53, 90, 90, 17, 129


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return wrap(make_network(LlamaConfig(**tiny_fields), tried=True), None, name="tiny").model


def at_once(network: Any, policy: Policy, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """What the model says when it is given all prompts in one padded batch."""
    cache = load_cache(policy, network, new_tokens=20, **settings)
    mask = inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = network(
            **inputs, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
    loop = DecodeLoop(network, cache, logits.argmax(-1), places[:, -1] + 1, 20)
    return cache, loop.run()


@pytest.mark.parametrize("name", first(POLICIES, 2))
def test_one_after_another_says_what_all_at_once_does(network: Any, name: str) -> None:
    policy, inputs = POLICIES[name], ids(*LENGTHS)
    expected, tokens = at_once(network, policy, inputs)
    cache = load_cache(policy, network, new_tokens=20)
    found = generate(network, cache, *inputs.values(), new_tokens=20)
    assert torch.equal(found, tokens)
    assert cache.kept() == expected.kept()
    assert cache.prompt_bytes() == expected.prompt_bytes()
    assert cache.page_bytes() == expected.page_bytes()
    cache.pool.check_integrity()


@pytest.mark.parametrize("settings", [{"evicts": True}, {"residual": 0}])
def test_what_happens_while_generating_is_the_same(network: Any, settings: Any) -> None:
    option = Option(
        StreamingLLM(), Budget(tokens=12), *(() if "evicts" in settings else (Int4(),) * 2)
    )
    policy, inputs = Policy.uniform(option, *SHAPE), ids(*LENGTHS)
    expected, tokens = at_once(network, policy, inputs, **settings)
    cache = load_cache(policy, network, new_tokens=20, **settings)
    assert torch.equal(generate(network, cache, *inputs.values(), new_tokens=20), tokens)
    assert cache.evicted() == expected.evicted()


def test_a_layer_never_sees_more_tokens_than_a_chunk_or_one_prompt(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = CacheLayer.prompt

    def spying(layer: CacheLayer, q: Tensor, *rest: Any) -> Any:
        seen.append(q.shape[0] * q.shape[2])
        return original(layer, q, *rest)

    cache = load_cache(MIXED, network)
    monkeypatch.setattr(CacheLayer, "prompt", spying)
    read_prompts(network, cache, **ids(*LENGTHS), chunk_tokens=100)
    assert seen[::3] == [90, 53, 90, 90, 17, 129]


@pytest.mark.parametrize("name", first(POLICIES, 2))
def test_neighbours_that_are_the_same_are_read_once_and_stored_as_if_each_were(
    network: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven prompts of three texts; the last two make a chunk, and are read as in service."""
    policy = POLICIES[name]
    a, b, c = ids(90, 90, 90)["input_ids"]
    prompts = torch.stack([a, a, a, b, b, c, c])

    def tokens(read: Callable[..., Tensor]) -> tuple[Tensor, int, int]:
        cache = load_cache(policy, network, new_tokens=20)
        begun = read(network, cache, prompts, chunk_tokens=180).argmax(-1)
        held = cache.prompt_bytes(), cache.page_bytes()
        loop = DecodeLoop(network, cache, begun, torch.full_like(begun, 90), 20)
        return loop.run(), *held

    expected = tokens(read_prompts)
    passes: list[range] = []
    original = CacheLayer.prompt

    def counted(layer: CacheLayer, *given: Any) -> Any:
        if layer.number == 0 and layer.cache.reading is not None:
            passes.append(layer.cache.reading)
        return original(layer, *given)

    monkeypatch.setattr(CacheLayer, "prompt", counted)
    found = tokens(read_different)
    assert passes[-3:] == [range(3), range(3, 5), range(5, 7)]
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


SENTENCES = Option(SentenceKV(held=2, window=8), Budget(tokens=30))
SEVERAL = CACHES | {"sentences chosen": (SENTENCES, {})}


@pytest.mark.parametrize("name", SEVERAL)
def test_sequences_that_were_read_as_one_go_their_own_ways(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], tokenizer: Any, name: str
) -> None:
    """Each is given other tokens behind the prompt that they share; one of them ends."""
    from transformers import LlamaConfig

    network = make_network(LlamaConfig(**tiny_fields | {"num_hidden_layers": LAYERS}), tried=True)
    (option, asked), (_, full_stop) = SEVERAL[name], tokenizer(".").input_ids
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randint(2, 250, (2, 90), generator=generator)
    more = torch.randint(2, 250, (10, 5, 1), generator=generator)
    a[5::17], b[9::11], more[1::3, 1], more[2::4, 4] = (full_stop,) * 4

    def answers(read: Callable[..., Tensor]) -> tuple[Tensor, list[int]]:
        policy = Policy.uniform(option, LAYERS, 2)
        cache = load_cache(policy, network, new_tokens=20, tokenizer=tokenizer, **asked)
        found = [read(network, cache, torch.stack([a, a, a, b, b]), chunk_tokens=90)]
        held = [cache.prompt_bytes(), cache.page_bytes(), cache.host_bytes()]
        for step, tokens in enumerate(more):
            if step == 6:
                cache.free(1)
            found.append(network(tokens, past_key_values=cache).logits[:, -1])
        cache.pool.check_integrity()
        stays = [0, 2, 3, 4]
        return torch.stack(found)[:, stays], [*held, cache.page_bytes(), cache.host_bytes()]

    with torch.no_grad():
        expected, found = answers(read_prompts), answers(read_different)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    assert found[1] == expected[1]
    assert not torch.allclose(found[0][-1, 0], found[0][-1, 1], atol=1e-2)


def test_a_second_turn_goes_on_where_the_first_has_ended(network: Any) -> None:
    network.set_attn_implementation("sdpa")
    inputs = ids(40, 25)
    cache = load_cache(POLICIES["uncompressed"], network, new_tokens=20)
    first = generate(network, cache, *inputs.values(), new_tokens=5)
    whole = torch.cat([inputs["input_ids"], first], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(first)], 1)
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    found = network.generate(whole, past_key_values=cache, **asked)
    cache.close()
    assert torch.equal(found, network.generate(whole, **asked))


def test_shorter_prompts_are_read_together_and_longer_ones_alone() -> None:
    found = list(together([10, 10, 10, 10, 10, 25, 25, 100, 100, 3], 40))
    assert [list(rows) for rows in found] == [[0, 1, 2, 3], [4], [5], [6], [7], [8], [9]]


def test_feed_forward_parts_work_on_chunks_and_are_put_back(network: Any) -> None:
    widths: list[int] = []
    mlp = network.model.layers[1].mlp
    handle = mlp.down_proj.register_forward_pre_hook(
        lambda _, given: widths.append(given[0].shape[1])
    )
    tokens = ids(50)["input_ids"]
    with torch.no_grad():
        expected = network(tokens).logits
        with in_chunks(network, 16):
            assert torch.allclose(network(tokens).logits, expected, atol=1e-5)
        network(tokens)
    handle.remove()
    assert widths == [50, 16, 16, 16, 2, 50]
    assert not [m for m in network.modules() if isinstance(m, nn.Module) and "forward" in vars(m)]


def test_a_part_that_gives_more_than_a_tensor_is_given_the_prompt_whole() -> None:
    class Pair(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return hidden + 1, hidden

    model = nn.ModuleDict({"mlp": Pair()})
    with in_chunks(model, 4):
        both = model["mlp"](torch.zeros(1, 10, 3))
    assert [x.shape for x in both] == [(1, 10, 3)] * 2
