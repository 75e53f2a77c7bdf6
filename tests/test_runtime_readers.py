"""Readers that choose no pages, in the paged runtime: step by step they read what replay reads."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.apply import apply
from kvtune.policies.attention import attend
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.host_pages import host_sequence_bytes
from kvtune.policies.method import Method, methods
from kvtune.policies.methods.actqkv import ActQKV
from kvtune.policies.methods.infllm import InfLLM
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.recycled import Recycled
from kvtune.policies.methods.retrieval_attention import RetrievalAttention
from kvtune.policies.methods.sentencekv import SentenceKV
from kvtune.policies.methods.shadowkv import ShadowKV
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.option import Budget, Option
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.policies.reader import Reader
from kvtune.policies.signals import Signals
from kvtune.runtime import load_cache
from kvtune.runtime.cache.leaving import free
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.sentences import SentenceEnds
from kvtune.runtime.kernels.launch import Scratch
from kvtune.tests.tiers import first

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

PROMPT, STEPS = 100, 5
INDEX = RetrievalAttention(sinks=4, recent=8, degree=4, near=8, beam=12)
LISTS = replace(INDEX, joins="lists", scanned=0.4)
CODES = replace(INDEX, joins="codes", scanned=0.7)
VOTES = TokenSelect(sinks=4, recent=8, similarity=0.3)
READERS: tuple[Method, ...] = (
    Quest(block=16),
    Landmark(block=8),
    VOTES,
    InfLLM(block=8, sinks=4, recent=8),
    ActQKV(block=8, sinks=4, recent=8),
    ShadowKV(rank=8, chunk=4, recent=2),
    Recycled(stride=3),
    INDEX,
    CODES,
    LISTS,
)
OTHERS = [method for method in READERS if method not in (LISTS, VOTES)]


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**tiny_fields), tried=True).float().eval()


def uniform(option: Option, network: Any) -> Policy:
    config = network.config
    return Policy.uniform(option, config.num_hidden_layers, config.num_key_value_heads)


def prompts(count: int = 1, tokens: int = PROMPT) -> Tensor:
    return torch.randint(1, 60, (count, tokens), generator=torch.Generator().manual_seed(3))


def read(
    network: Any, policy: Policy, ids: Tensor | None = None, tokenizer: Any = None
) -> tuple[PolicyCache, list[Signals]]:
    """A cache that has read the prompt, and what each layer was shown of it."""
    cache, seen = load_cache(policy, network, tokenizer=tokenizer), []
    original = type(cache.layers[0]).take_in

    def spying(layer: Any, signals: list[Signals]) -> None:
        seen.extend(signals)
        original(layer, signals)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(cache.layers[0]), "take_in", spying)
        network(prompts() if ids is None else ids, past_key_values=cache)
    return cache, seen


@pytest.mark.parametrize("form", first([None, Int4()]), ids=["16 bits", "int4"])
@pytest.mark.parametrize("method", READERS, ids=lambda method: method.label)
def test_a_reader_chooses_step_by_step_what_it_chooses_in_replay(
    network: Any, method: Method, form: Int4 | None
) -> None:
    option = Option(method, Budget(tokens=30))
    option = option if form is None else replace(option, keys=form, values=form)
    policy = uniform(option, network)
    if form is None:
        network.bfloat16()  # so that what 16 bits store is what was seen
    cache, seen = read(network, policy)
    assert cache.prompt_bytes() == policy.footprint(PROMPT, 8)
    heads = policy.kv_heads
    for number, signals in enumerate(seen[:2]):
        part = apply(policy, number, [30] * heads, replace(signals, _memo={}))
        generator = torch.Generator().manual_seed(number)
        q = torch.randn(heads, 2, STEPS, 8, generator=generator)
        visible = part.visible(q)
        assert visible is not None
        assert not visible.all()
        layer = cache.layers[number].paged
        for step in range(STEPS):
            scratch = Scratch(heads, layer.slots, 2, 8, "cpu")
            ours = layer.attend(q[:, :, step], scratch, signals.scale)
            mask = visible[..., min(step, visible.shape[-2] - 1), :]
            keys, values = part.keys.float(), part.values.float()
            theirs, _ = attend(q[:, :, step], keys, values, mask, signals.scale)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [TokenSelect(4, 8, 0.3), Quest(block=16), LISTS], ids=repr)
def test_sequences_side_by_side_read_as_each_alone(network: Any, method: Method) -> None:
    policy, ids = uniform(Option(method, Budget(tokens=30)), network), prompts(3)
    together = generated(network, policy, ids)
    alone = torch.cat([generated(network, policy, row[None]) for row in ids], 1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def generated(network: Any, policy: Policy, ids: Tensor) -> Tensor:
    """Logits of a prompt's last token and of three more, through the cache."""
    with load_cache(policy, network) as cache, torch.no_grad():
        found = [network(ids, past_key_values=cache).logits[:, -1]]
        for token in (5, 7, 5):
            more = torch.full((len(ids), 1), token)
            found.append(network(more, past_key_values=cache).logits[:, -1])
    return torch.stack(found)


FAISS = [replace(INDEX, joins="hnsw")] if importlib.util.find_spec("faiss") else []


@pytest.mark.parametrize("method", [INDEX, LISTS, CODES, *FAISS], ids=repr)
def test_an_index_on_the_host_finds_what_it_finds_on_the_device(
    network: Any, method: Method
) -> None:
    here, ids = Option(method, Budget(tokens=30)), prompts(2)
    there = uniform(replace(here, tier="host"), network)
    expected = generated(network, uniform(here, network), ids)
    torch.testing.assert_close(generated(network, there, ids), expected, atol=1e-5, rtol=0)
    cache, _ = read(network, there)
    stored = 4 * 8 * PROMPT * there.layers * there.kv_heads
    assert cache.host_bytes() == stored
    assert cache.prompt_bytes() == there.footprint(PROMPT, 8) < stored
    assert not cache.can_be_captured
    assert host_sequence_bytes(there, PROMPT, 8) > stored  # the index lies there too
    on_device = sequence_bytes(uniform(here, network), PROMPT, 8, Growth(0))
    assert on_device - sequence_bytes(there, PROMPT, 8, Growth(0)) > stored


def test_heads_of_a_layer_may_read_in_several_ways(network: Any) -> None:
    kinds = [
        Option(TokenSelect(4, 8), Budget(tokens=30), Int4(), Int4()),
        Option(SnapKV(window=4), Budget(tokens=30)),
        Option(LISTS, Budget(tokens=30), tier="host"),
        Option(Quest(block=64), Budget(tokens=64)),
    ]
    layers, heads = network.config.num_hidden_layers, network.config.num_key_value_heads
    rows = [[kinds[(layer * heads + head) % 4] for head in range(heads)] for layer in range(layers)]
    found = generated(network, Policy("mixed", tuple(map(tuple, rows))), prompts(2))
    assert found.isfinite().all()


def test_a_reader_of_sentences_is_refused_with_the_reason(network: Any) -> None:
    with pytest.raises(KvtuneError, match="sentences"):
        load_cache(uniform(Option(SentenceKV(), Budget(tokens=30)), network), network)


SENTENCES = SentenceKV(held=2, window=8)


def test_sentences_are_read_step_by_step_as_in_replay(network: Any, tokenizer: Any) -> None:
    """What replay is given as flags of all tokens, the cache finds out as tokens come."""
    policy = uniform(Option(SENTENCES, Budget(tokens=30)), network.bfloat16())
    ids, more = texts(tokenizer)[:1], tokenizer("It is. So it was.").input_ids
    cache, seen = read(network, policy, ids, tokenizer)
    every = torch.tensor([[*ids[0].tolist(), *more]])
    decoded = [tokenizer.decode(token) for token in every[0].tolist()]
    ends = torch.tensor([text.rstrip()[-1:] in (".", "!", "?") for text in decoded])
    assert ends[: ids.shape[1]].sum() > 2
    assert ends[ids.shape[1] : -1].any()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(policy.kv_heads, 2, len(more), 8, generator=generator)
    part = apply(policy, 0, [30] * policy.kv_heads, replace(seen[0], sentence_ends=ends, _memo={}))
    visible = part.visible(q)
    assert visible is not None
    layer = cache.layers[0].paged
    assert cache.sentences is not None
    for step, token in enumerate(more):
        cache.sentences.told(torch.tensor([[token]]), range(1))
        scratch = Scratch(policy.kv_heads, layer.slots, 2, 8, "cpu")
        ours = layer.attend(q[:, :, step], scratch, seen[0].scale)
        keys, values = part.keys.float(), part.values.float()
        theirs, _ = attend(q[:, :, step], keys, values, visible[:, :, step], seen[0].scale)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_sequences_were_given_is_joined_only_when_it_is_asked_for(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's cost must not grow with what came before it."""
    joined: list[int] = []
    original = torch.cat

    def counted(pieces: list[Tensor]) -> Tensor:
        joined.append(len(pieces))
        return original(pieces)

    monkeypatch.setattr(torch, "cat", counted)
    ends, given = SentenceEnds(tokenizer), tokenizer("It is. So it was.").input_ids
    for token in given:
        ends.told(torch.tensor([[token]]), range(2))
    assert not joined
    flags = ends.of(1, 1)
    assert flags.tolist() == [tokenizer.decode(t).rstrip()[-1:] in (".", "!", "?") for t in given]
    assert flags.any()
    assert joined == [len(given)]


def test_padded_prompts_read_the_sentences_that_each_alone_reads(
    network: Any, tokenizer: Any
) -> None:
    policy = uniform(Option(SENTENCES, Budget(tokens=30)), network)
    ids, more = texts(tokenizer), tokenizer("No. But it").input_ids
    short = ids.shape[1] - 9
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :9], mask[1, :9] = tokenizer("...").input_ids[0], 0
    together = with_tokens(network, policy, tokenizer, padded, more, mask)
    first = with_tokens(network, policy, tokenizer, ids[:1], more)
    second = with_tokens(network, policy, tokenizer, ids[1:, -short:], more)
    torch.testing.assert_close(together, torch.cat([first, second], 1), atol=1e-4, rtol=1e-4)


def test_tokens_without_text_are_refused_where_sentences_count(
    network: Any, tokenizer: Any
) -> None:
    policy = uniform(Option(SENTENCES, Budget(tokens=30)), network)
    hooks = network.base_model._forward_pre_hooks
    with load_cache(policy, network, tokenizer=tokenizer) as cache, torch.no_grad():
        assert hooks
        with pytest.raises(KvtuneError, match="embeddings"):
            network(inputs_embeds=torch.zeros(1, 5, 32), past_key_values=cache)
    del cache
    gc.collect()
    assert not hooks


def texts(tokenizer: Any) -> Tensor:
    """Two texts of equally many tokens with sentences of different lengths."""
    words = "It was so. We saw it! Was it so, as we said that it was? No, it was not so. " * 3
    both = [tokenizer(words).input_ids, tokenizer(words[20:] + words[:20]).input_ids]
    count = min(PROMPT, *map(len, both))
    return torch.tensor([each[:count] for each in both])


def with_tokens(
    network: Any,
    policy: Policy,
    tokenizer: Any,
    ids: Tensor,
    more: list[int],
    mask: Tensor | None = None,
) -> Tensor:
    """Logits after a prompt and after each of some more tokens."""
    mask = torch.ones_like(ids) if mask is None else mask
    with load_cache(policy, network, tokenizer=tokenizer) as cache, torch.no_grad():
        given = {"past_key_values": cache, "use_cache": True}
        places = (mask.cumsum(1) - 1).clamp_min(0)
        found = [network(ids, attention_mask=mask, position_ids=places, **given).logits[:, -1]]
        for token in more:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            places = places[:, -1:] + 1
            step = torch.full((len(ids), 1), token)
            step = network(step, attention_mask=mask, position_ids=places, **given)
            found.append(step.logits[:, -1])
    return torch.stack(found)


def test_rows_that_are_freed_read_nothing(network: Any) -> None:
    policy = uniform(Option(LISTS, Budget(tokens=30)), network)
    with load_cache(policy, network) as cache, torch.no_grad():
        network(prompts(2), past_key_values=cache)
    layer = cache.layers[0].paged
    rows, scratch = layer.rows, Scratch(layer.rows, layer.slots, 2, 8, "cpu")
    q = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(0))
    before = layer.attend(q, scratch, 1.0)
    free(layer, 0)
    after = layer.attend(q, scratch, 1.0)
    assert not after[: rows // 2].any()
    torch.testing.assert_close(after[rows // 2 :], before[rows // 2 :])


@pytest.mark.parametrize(
    "method", first([LISTS, SENTENCES, VOTES, *OTHERS], 3), ids=lambda method: method.label
)
def test_sequences_freed_in_any_order_leave_the_others_and_nothing_behind(
    network: Any, tokenizer: Any, method: Method
) -> None:
    """Beside a twin of which nothing is freed, step by step, in a drawn order; the last one stays
    longest, whose number is then above that of rows."""
    option = Option(method, Budget(tokens=30))
    stored = [option, replace(option, keys=Int4(), values=Int4())]
    heads = network.config.num_key_value_heads
    row = tuple(stored[head % 2] for head in range(heads))
    policy = Policy("two forms", (row,) * network.config.num_hidden_layers)
    ids, draw = texts(tokenizer)[[0, 1, 0]], np.random.default_rng(11)
    twin, ours = (read(network, policy, ids, tokenizer)[0].layers[0].paged for _ in range(2))
    stays = torch.ones(ours.rows, dtype=torch.bool)
    order = draw.permutation(3).tolist()
    assert order[-1] == 2
    for step, sequence in enumerate([-1, *order]):
        if sequence >= 0:
            free(ours, sequence)
            stays[heads * sequence : heads * (sequence + 1)] = False
        q = torch.randn(ours.rows, 2, 8, generator=torch.Generator().manual_seed(step))
        scratch = Scratch(ours.rows, ours.slots, 2, 8, "cpu")
        expected, found = (layer.attend(q, scratch, 1.0) for layer in (twin, ours))
        torch.testing.assert_close(found[stays], expected[stays])
        assert not found[~stays].any()
        left, all_of_it = (sum(x.nbytes for x in each.searched) for each in (ours, twin))
        assert left * len(stays) == all_of_it * int(stays.sum())
        for rows in ours.searched:
            assert rows.sequences.unique().tolist() == [*range(int(rows.sequences.max()) + 1)]
    assert not ours.searched


@pytest.mark.parametrize(
    "method", first([LISTS, SENTENCES, *READERS[:-1]], 2), ids=lambda method: method.label
)
def test_a_prompts_queries_and_keys_are_forgotten_behind_the_first_step(
    network: Any, tokenizer: Any, method: Method
) -> None:
    policy = uniform(Option(method, Budget(tokens=30)), network)
    ids = texts(tokenizer)[:1]
    layer = read(network, policy, ids, tokenizer)[0].layers[0].paged
    q = torch.randn(layer.rows, 2, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        layer.attend(q, Scratch(layer.rows, layer.slots, 2, 8, "cpu"), 1.0)
    for each in layer.searched:
        for forgotten in (each.signals.queries, each.signals.keys):
            assert forgotten.untyped_storage().nbytes() == 0
        assert each.signals.prompt_tokens == ids.shape[1]


@pytest.mark.parametrize("method", [INDEX, LISTS, CODES, *FAISS], ids=lambda method: method.joins)
def test_an_index_holds_no_keys_beside_those_that_are_stored(network: Any, method: Any) -> None:
    """A search compares those that the cache holds; ``index_bytes`` counts no others."""
    layer = read(network, uniform(Option(method, Budget(tokens=30)), network))[0].layers[0].paged
    q = torch.randn(layer.rows, 2, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        layer.attend(q, Scratch(layer.rows, layer.slots, 2, 8, "cpu"), 1.0)
    (rows,) = layer.searched
    indices = [*rows.signals._memo.values()]
    assert len(indices) == layer.rows
    assert all(each.keys.untyped_storage().nbytes() == 0 for each in indices)


@pytest.mark.parametrize("name", [n for n, kind in methods().items() if kind().reader(1)])
def test_what_is_remembered_has_an_item_a_row_and_does_not_grow(
    network: Any, tokenizer: Any, name: str
) -> None:
    made = {each.name: each for each in READERS if each.name != "retrieval_attention"}
    made |= {"retrieval_attention": LISTS, "sentencekv": SENTENCES}
    policy = uniform(Option(made[name], Budget(tokens=30)), network)
    layer = read(network, policy, texts(tokenizer)[:1], tokenizer)[0].layers[1].paged
    sizes = []
    for step in range(3 * STEPS):
        q = torch.randn(layer.rows, 2, 8, generator=torch.Generator().manual_seed(step))
        layer.attend(q, Scratch(layer.rows, layer.slots, 2, 8, "cpu"), 1.0)
        (rows,) = layer.searched
        assert bool(rows.memory) is (type(rows.reader).follow is not Reader.follow)
        assert all(len(each) == len(rows.rows) for each in rows.memory.values())
        sizes.append({n: x.shape for n, x in rows.memory.items() if isinstance(x, Tensor)})
    assert all(each == sizes[0] for each in sizes)
