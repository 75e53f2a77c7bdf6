"""Evicting from pages while tokens are generated, held against the slots of live generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.format import Format
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.formats.rotated import RotatedInt3, RotatedInt4
from kvtune.policies.methods.a2sf import PREFILL
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.lazy_eviction import LazyEviction
from kvtune.policies.methods.scissorhands import Scissorhands
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.paging import head_pages
from kvtune.policies.policy import Policy
from kvtune.policies.testing.decode import decode_methods
from kvtune.runtime import load_cache
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.segments import GROWN
from kvtune.runtime.generate import Generation
from kvtune.runtime.graph import generate
from kvtune.runtime.live_policies import LivePolicy
from kvtune.tests.padded import ids
from kvtune.tests.tiers import first
from kvtune.traces.models import wrap

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

PROMPT, TOKENS, BUDGET = 40, 20, 20
METHODS: list[DecodeMethod] = [
    LazyEviction(window=7, threshold=0.02) if kind is LazyEviction else kind()
    for kind in decode_methods().values()
]
KEPT_PROMPT = LazyEviction(window=7, threshold=0.02, prompt="kept")


def name_of(method: DecodeMethod) -> str:
    return method.label


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    """In bf16, which is what pages hold: nothing is rounded on its way into them."""
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**tiny_fields), tried=True).bfloat16().eval()


def uniform(method: Any, budget: Budget | None = None, **formats: Any) -> Policy:
    return Policy.uniform(Option(method, budget or Budget(tokens=BUDGET), **formats), 3, 2)


def positions(cache: PolicyCache) -> list[list[list[int]]]:
    """What each KV head of the first sequence holds, by layer."""
    by_row = [{k: v for e in layer.evictors for k, v in e.kept().items()} for layer in cache.layers]
    return [[rows[head] for head in range(2)] for rows in by_row]


def step(network: Any, cache: PolicyCache, tokens: Tensor, at: Tensor) -> Tensor:
    """Logits ``[B, vocabulary]`` of one more token a sequence."""
    return turned(network, cache, tokens[:, None], at[:, None])[:, -1]


@torch.no_grad()
def turned(network: Any, cache: PolicyCache, tokens: Tensor, at: Tensor) -> Tensor:
    """Logits ``[B, T, vocabulary]`` of some more tokens a sequence."""
    logits: Tensor = network(tokens, position_ids=at, past_key_values=cache).logits
    return logits.float()


IN_DEFAULT_TIER = (H2O, Tova)
EACH = [
    pytest.param(one, marks=[] if isinstance(one, IN_DEFAULT_TIER) else [pytest.mark.full])
    for one in [*METHODS, KEPT_PROMPT]
]


@pytest.mark.parametrize("method", EACH, ids=name_of)
def test_pages_hold_and_answer_what_slots_do(
    network: Any, tokenizer: Any, method: DecodeMethod
) -> None:
    policy, prompt = uniform(method), ids(PROMPT)["input_ids"][0].tolist()
    policies = [LivePolicy(policy)]
    no_ties = [1]  # the padding token's embedding is zero: it looks at all keys alike
    loaded = wrap(network, tokenizer, name="tiny")
    live = Generation(loaded, prompt, policies, room=TOKENS, banned=no_ties)
    held = []
    for _ in range(TOKENS):
        live.advance(1)
        groups = [next(g for g in layer if 1 in g.rows) for layer in live.layers]
        held.append([group.cache.kept()[group.rows.index(1)] for group in groups])
    cache = load_cache(policy, network, evicts=True)
    network(torch.tensor([prompt[:-1]]), past_key_values=cache)
    nll = []
    for at, token in enumerate(live.tokens_of(0)[:-1]):
        logits = step(network, cache, token[None], torch.tensor([PROMPT - 1 + at]))
        nll.append(-logits[0].log_softmax(-1)[live.tokens_of(0)[at + 1]])
        assert positions(cache) == held[at]
    run = live.results()[0]
    torch.testing.assert_close(torch.stack(nll), torch.tensor(run.nll), atol=0.1, rtol=0.02)
    assert cache.evicted() == run.evicted.tolist()
    assert (run.evicted > 0).all()
    cache.pool.check_integrity()


Int4Token = Int4(keys_by="token")
CODED = [
    (H2O(), Int4Token, 0), (Tova(), RotatedInt3(), 4), (StreamingLLM(), RotatedInt4(), 16),
    (PREFILL, Int8(keys_by="token"), 3), (KEPT_PROMPT, Int4Token, 5),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", first(CODED, 2), ids=lambda case: f"{case[0].name} {case[1].label}"
)
def test_pages_of_few_bits_hold_and_answer_what_slots_do(
    network: Any, tokenizer: Any, case: tuple[DecodeMethod, Format, int]
) -> None:
    method, form, residual = case
    policy, prompt = uniform(method, keys=form, values=form), ids(PROMPT)["input_ids"][0].tolist()
    loaded = wrap(network, tokenizer, name="tiny")
    policies = [LivePolicy(policy, residual=residual)]
    live = Generation(loaded, prompt, policies, room=TOKENS, banned=[1])
    held = []
    for _ in range(TOKENS):
        live.advance(1)
        groups = [next(g for g in layer if 1 in g.rows) for layer in live.layers]
        held.append([group.cache.kept()[group.rows.index(1)] for group in groups])
    cache = load_cache(policy, network, evicts=True, residual=residual, new_tokens=TOKENS)
    network(torch.tensor([prompt[:-1]]), past_key_values=cache)
    nll, memory = [], cache.pool.memory.numel()
    for at, token in enumerate(live.tokens_of(0)[:-1]):
        logits = step(network, cache, token[None], torch.tensor([PROMPT - 1 + at]))
        nll.append(-logits[0].log_softmax(-1)[live.tokens_of(0)[at + 1]])
        assert positions(cache) == held[at]
        newest = [layer.paged.paged.lengths[2:4].tolist() for layer in cache.layers]
        assert max(map(max, newest)) <= cache.growth.window
    run = live.results()[0]
    torch.testing.assert_close(torch.stack(nll), torch.tensor(run.nll), atol=0.1, rtol=0.02)
    assert cache.evicted() == run.evicted.tolist()
    assert (run.evicted > 0).all()
    assert cache.pool.memory.numel() == memory  # what was reserved was enough
    planned = head_pages(policy.heads[0][0], BUDGET, PROMPT - 1, 8, cache.growth)
    assert cache.page_bytes() == 6 * sum(x.page_bytes * n for x, n in planned.items())
    cache.pool.check_integrity()


MIXED = (
    (Option(H2O(), Budget(tokens=70), Int4Token, Int4Token), Option(H2O(), Budget(tokens=20))),
    (Option(Tova("kv_head"), Budget(tokens=9), RotatedInt4(), RotatedInt3()), Option()),
    (Option(Full(), ALL, Int4(), Int4()), Option(H2O(), Budget(tokens=90), Int4Token, Int4Token)),
)


def test_sequences_that_evict_from_few_bits_together_are_as_each_alone(network: Any) -> None:
    """Tables are made anew on the way: more tokens come than there was room for at first."""
    policy, inputs, lengths = Policy("mixed", MIXED), ids(75, 41), (75, 41)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = load_cache(policy, network, evicts=True, residual=4, new_tokens=8)
    network(**inputs, position_ids=places, past_key_values=together)
    alone = [load_cache(policy, network, evicts=True, residual=4) for _ in lengths]
    for row, (cache, length) in enumerate(zip(alone, lengths, strict=True)):
        network(inputs["input_ids"][row : row + 1, 75 - length :], past_key_values=cache)
    for turn in range(0, 30, 10):
        new = turn + torch.arange(10)
        tokens, at = (torch.tensor(each)[:, None] + new for each in ((5, 9), lengths))
        logits = turned(network, together, tokens, at)
        for row, cache in enumerate(alone):
            one = turned(network, cache, tokens[row : row + 1], at[row : row + 1])
            torch.testing.assert_close(logits[row], one[0], atol=0.03, rtol=0.03)
    assert together.evicted() == [
        [evicted for cache in alone for evicted in cache.evicted()[layer]] for layer in range(3)
    ]
    held = [layer.paged.paged.lengths.view(3, -1).sum(0).tolist() for layer in together.layers]
    assert held == [[70, 20, 70, 20], [9, 105, 9, 71], [105, 90, 71, 71]]
    together.pool.check_integrity()


def test_a_pool_that_would_exceed_its_limit_is_refused_before_the_prompt(network: Any) -> None:
    policy = uniform(H2O(), keys=Int4Token, values=Int4Token)
    cache = load_cache(policy, network, evicts=True)
    network(**ids(50), past_key_values=cache)
    enough = cache.pool.memory.numel()
    network(**ids(50), past_key_values=load_cache(policy, network, evicts=True, limit_bytes=enough))
    tight = load_cache(policy, network, evicts=True, limit_bytes=enough - 1)
    with pytest.raises(KvtuneError, match="its limit is"):
        network(**ids(50), past_key_values=tight)


def test_bounded_heads_stay_bounded(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    """A head a method, more tokens than two budgets: the pages of the first few, no more memory."""
    from transformers import LlamaConfig

    heads, budget, tokens = len(METHODS), 24, 50
    shape = {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": 8 * heads}
    fields = {**tiny_fields, **shape, "num_hidden_layers": 1}
    network = make_network(LlamaConfig(**fields)).eval()
    options = tuple(Option(method, Budget(tokens=budget)) for method in METHODS)
    cache = load_cache(Policy("all", (options,)), network, evicts=True, new_tokens=64)
    network(**ids(36), past_key_values=cache)
    layer, memory, taken = cache.layers[0].paged, cache.pool.memory.numel(), []
    for at in range(tokens):
        step(network, cache, torch.tensor([2 + at]), torch.tensor([36 + at]))
        taken.append([len(cells) for cells in layer.pages[GROWN]])
    most = [-(-method.most(budget, budget) // 16) for method in METHODS]
    assert (torch.tensor(taken) <= torch.tensor(most)).all()
    assert cache.page_bytes() == layer.growing_layout.page_bytes * sum(taken[-1])
    assert cache.pool.memory.numel() == memory
    assert min(cache.evicted()[0]) > tokens - budget
    assert layer.paged.lengths.tolist() == layer.lengths.ravel().tolist()
    cache.pool.check_integrity()


def test_pages_that_bulk_drops_give_back_are_used_again(network: Any) -> None:
    policy = uniform(Scissorhands(drop_share=0.75), Budget(tokens=64))
    cache = load_cache(policy, network, evicts=True, new_tokens=64)
    network(**ids(70), past_key_values=cache)
    layer, pages = cache.layers[0].paged, []
    for at in range(60):
        step(network, cache, torch.tensor([2 + at]), torch.tensor([70 + at]))
        pages.append(cache.page_bytes() // layer.growing_layout.page_bytes)
    assert pages[0] == pages[48] == 6 * 2  # 17 tokens a row
    assert pages[47] == 6 * 4  # 64
    assert cache.evicted() == [[2 * 48] * 2] * 3
    cache.pool.check_integrity()


def test_padded_sequences_evict_as_each_alone(network: Any) -> None:
    policy, inputs, lengths = uniform(H2O(), Budget(tokens=30)), ids(70, 41, 70), (70, 41, 70)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = load_cache(policy, network, evicts=True)
    network(**inputs, position_ids=places, past_key_values=together)
    assert [len(layer.evictors) for layer in together.layers] == [2, 2, 2]  # by prompt length
    alone = [load_cache(policy, network, evicts=True) for _ in lengths]
    for row, (cache, length) in enumerate(zip(alone, lengths, strict=True)):
        network(inputs["input_ids"][row : row + 1, 70 - length :], past_key_values=cache)
    for turn in range(6):
        tokens, at = torch.tensor([5, 9, 30]) + turn, torch.tensor(lengths) + turn
        logits = step(network, together, tokens, at)
        for row, cache in enumerate(alone):
            one = step(network, cache, tokens[row : row + 1], at[row : row + 1])
            torch.testing.assert_close(logits[row], one[0], atol=0.02, rtol=0.02)
    for number, layer in enumerate(together.layers):
        rows = {k: v for evictor in layer.evictors for k, v in evictor.kept().items()}
        for row, cache in enumerate(alone):
            theirs = cache.layers[number].evictors[0].kept()
            assert [rows[2 * row], rows[2 * row + 1]] == [theirs[0], theirs[1]]


def test_heads_that_do_not_evict_grow_beside_those_that_do(network: Any) -> None:
    heads = (
        (Option(H2O(), Budget(tokens=5)), Option(SnapKV(window=4), Budget(tokens=11), Int4())),
        (Option(Full(), ALL, Int8(), Int4()), Option(StreamingLLM(), Budget(tokens=7))),
        (Option(Tova(), Budget(tokens=6)), Option(Tova(), Budget(tokens=6))),
    )
    cache = load_cache(Policy("mixed", heads), network, evicts=True, new_tokens=8)
    network.generate(**ids(40), max_new_tokens=31, min_new_tokens=31, past_key_values=cache)
    assert cache.evicted() == [[30, 0], [0, 30], [30, 30]]
    lengths = [layer.paged.lengths.sum(0).tolist() for layer in cache.layers]
    assert lengths == [[5, 41], [70, 7], [6, 6]]
    cache.pool.check_integrity()


def test_an_allocator_moves_decode_budgets_too(network: Any) -> None:
    policy = Policy.uniform(Option(H2O(), Budget(tokens=20)), 3, 2, allocator=AdaKV())
    cache = load_cache(policy, network, evicts=True)
    network.generate(**ids(60), max_new_tokens=31, min_new_tokens=31, past_key_values=cache)
    for layer in cache.layers:
        assert layer.paged.lengths[1].sum() == 40
    assert any(layer.paged.lengths[1, 0] != 20 for layer in cache.layers)


def test_a_budget_beyond_the_prompt_is_filled_first(network: Any) -> None:
    cache = load_cache(uniform(H2O(), Budget(tokens=40)), network, evicts=True)
    network.generate(**ids(30), max_new_tokens=26, min_new_tokens=26, past_key_values=cache)
    assert cache.evicted() == [[15, 15]] * 3
    assert cache.layers[0].paged.lengths[1].tolist() == [40, 40]


def test_unless_asked_nothing_leaves(network: Any) -> None:
    cache = load_cache(uniform(H2O(), Budget(tokens=20)), network)
    network.generate(**ids(30), max_new_tokens=21, min_new_tokens=21, past_key_values=cache)
    assert cache.evicted() == [[0, 0]] * 3
    assert cache.layers[0].paged.lengths.sum(0).tolist() == [40, 40]


def test_the_decode_loop_evicts_as_transformers_own_does(network: Any) -> None:
    network.float()
    network.generation_config.eos_token_id = None
    inputs, policy = ids(60, 31), uniform(H2O(), Budget(tokens=25))
    cache = load_cache(policy, network, evicts=True)
    ours = generate(network, cache, inputs["input_ids"], inputs["attention_mask"], new_tokens=16)
    again = load_cache(policy, network, evicts=True)
    theirs = network.generate(**inputs, max_new_tokens=16, do_sample=False, past_key_values=again)
    assert torch.equal(ours, theirs[:, 60:])
    assert cache.evicted() == again.evicted() == [[15] * 4] * 3


def test_what_pages_cannot_evict_is_refused(network: Any) -> None:
    with pytest.raises(KvtuneError, match=f"h2o {BUDGET} int4/bf16' would evict"):
        load_cache(uniform(H2O(), keys=Int4()), network, evicts=True)
    turning = uniform(StreamingLLM(positions="reindexed"))
    with pytest.raises(KvtuneError, match="turns keys"):
        network(**ids(50), past_key_values=load_cache(turning, network, evicts=True))
    uneven = Policy("uneven", ((Option(Tova(), Budget(5)), Option(Tova(), Budget(6))),) * 3)
    with pytest.raises(KvtuneError, match="budgets differ"):
        network(**ids(50), past_key_values=load_cache(uneven, network, evicts=True))
