"""Readers against straight-line float64 versions of their rules, step by step; and identities."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.actqkv_layers import ActQKVLayers, entropy
from kvtune.policies.apply import apply
from kvtune.policies.attention import attend
from kvtune.policies.key_graph import NONE, KeyGraph
from kvtune.policies.method import Method
from kvtune.policies.methods.actqkv import ActQKV
from kvtune.policies.methods.cca import CCA
from kvtune.policies.methods.infllm import InfLLM
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import BlockBounds, Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.recycled import Recycled
from kvtune.policies.methods.retrieval_attention import RetrievalAttention, _queries_of
from kvtune.policies.methods.sentencekv import SentenceKV
from kvtune.policies.methods.shadowkv import ShadowKV
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.methods.triattention import TriAttention
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.query_index import QueryIndex
from kvtune.policies.reader import Held, Reader
from kvtune.policies.signals import Signals
from kvtune.policies.testing import Case, make_signals, uniform

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, GROUP, TOKENS, SIZE, STEPS = 2, 3, 75, 16, 6
Read = Callable[[int, int], list[int]]  # head, step -> tokens


@pytest.fixture
def signals() -> Signals:
    return make_signals(Case(TOKENS, 0, kv_heads=HEADS, group=GROUP, seed=4))


@pytest.fixture
def queries() -> Tensor:
    return uniform(53, HEADS, GROUP, STEPS, SIZE)


def doubles(tensor: Tensor) -> Any:
    return tensor.double().numpy()


def slow_attention(query: Any, keys: Any, values: Any, scale: float) -> Any:
    logits = scale * (keys @ query)
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()) @ values


def answered(option: Option, signals: Signals, queries: Tensor) -> Tensor:
    policy = Policy.uniform(option, 6, HEADS)
    budgets = policy.budgets(signals.prompt_tokens)[signals.layer].tolist()
    part = apply(policy, signals.layer, budgets, signals)
    keys, values = part.keys[:, None], part.values[:, None]
    return attend(queries, keys, values, part.visible(queries), signals.scale, part.weights)[0]


def check(option: Option, signals: Signals, queries: Tensor, read: Read, keys: Any = None) -> None:
    """The answers of every query head at every step are those over the oracle's tokens."""
    ours = doubles(answered(option, signals, queries))
    keys = doubles(signals.keys) if keys is None else keys
    values = doubles(signals.values)
    for head in range(HEADS):
        for step in range(queries.shape[2]):
            tokens = sorted(set(read(head, step)))
            assert 0 < len(tokens) < TOKENS
            for member in range(GROUP):
                query = doubles(queries[head, member, step])
                theirs = slow_attention(
                    query, keys[head, tokens], values[head, tokens], signals.scale
                )
                assert np.abs(ours[head, member, step] - theirs).max() < 1e-4


def turned(vector: Any, steps: float, signals: Signals) -> Any:
    """Rotated by so many positions, pair by pair."""
    assert signals.rope is not None
    out = np.array(vector)
    half = len(signals.rope.inverse_frequencies)
    for pair, frequency in enumerate(signals.rope.inverse_frequencies):
        number = complex(vector[pair], vector[pair + half]) * np.exp(1j * frequency * steps)
        out[pair], out[pair + half] = number.real, number.imag
    return out


def highest(worth: Any, number: int) -> list[int]:
    return sorted(range(len(worth)), key=lambda at: -worth[at])[:number]


def softmax(logits: Any) -> Any:
    raised = np.exp(logits - np.max(logits))
    return raised / raised.sum()


# TokenSelect


@pytest.mark.parametrize("similarity", [0.9, 0.05])
def test_token_select_reads_what_the_layer_votes_for(
    signals: Signals, queries: Tensor, similarity: float
) -> None:
    queries[:, :, 3] = queries[:, :, 2] + 0.01  # similar enough to reuse
    sinks, recent, budget = 3, 5, 24
    keys, q = doubles(signals.keys), doubles(queries)
    wide = q.transpose(2, 0, 1, 3).reshape(STEPS, -1)
    sets: list[list[int]] = []
    chose = 0
    for step in range(STEPS):
        cosine = wide[step] @ wide[chose] / np.linalg.norm(wide[step]) / np.linalg.norm(wide[chose])
        if step and cosine >= similarity:
            sets.append(sets[-1])
            continue
        chose = step
        vote = np.zeros(TOKENS)
        middle = range(sinks, TOKENS - recent)
        for head in range(HEADS):
            plain = [turned(keys[head, j], -j, signals) for j in middle]
            for member in range(GROUP):
                near = turned(q[head, member, step], recent - (TOKENS + step), signals)
                vote[middle.start : middle.stop] += softmax([near @ k for k in plain])
        chosen = [j for j in highest(vote, TOKENS) if j in middle][: budget - sinks - recent]
        sets.append([*range(sinks), *chosen, *range(TOKENS - recent, TOKENS)])
    assert sets[3] == sets[2]
    option = Option(TokenSelect(sinks, recent, similarity), Budget(tokens=budget))
    check(option, signals, queries, lambda _, step: sets[step])


# InfLLM and ActQKV


def representatives(
    signals: Signals, block: int, count: int, sinks: int, recent: int
) -> list[tuple[range, list[Any]]]:
    """Blocks of the middle, and what stands for each in every KV head."""
    keys = doubles(signals.keys)
    rows = doubles(signals.queries).reshape(HEADS, GROUP, TOKENS, SIZE)
    local = np.zeros((HEADS, TOKENS))
    for head in range(HEADS):
        for member in range(GROUP):
            for i in range(TOKENS):
                logits = signals.scale * (keys[head, : i + 1] @ rows[head, member, i])
                for j, share in enumerate(softmax(logits)):
                    local[head, j] += share * (i - j < recent)
    found = []
    for start in range(sinks, TOKENS - recent, block):
        members = range(start, min(start + block, TOKENS - recent))
        means = []
        for head in range(HEADS):
            order = highest(local[head, list(members)], count)
            best = [members[at] for at in order]
            means.append(np.mean([turned(keys[head, j], -j, signals) for j in best], 0))
        found.append((members, means))
    return found


def test_infllm_reads_the_blocks_whose_representatives_score(
    signals: Signals, queries: Tensor
) -> None:
    sinks, recent, block, budget = 2, 9, 7, 30
    blocks = representatives(signals, block, 3, sinks, recent)
    q = doubles(queries)

    def read(_: int, step: int) -> list[int]:
        worth = [
            sum(
                turned(q[head, member, step], recent - (TOKENS + step), signals) @ means[head]
                for head in range(HEADS)
                for member in range(GROUP)
            )
            for _, means in blocks
        ]
        best = highest(worth, (budget - sinks - recent) // block)
        middle = [j for number in best for j in blocks[number][0]]
        return [*range(sinks), *middle, *range(TOKENS - recent, TOKENS)]

    option = Option(InfLLM(block, 3, sinks, recent), Budget(tokens=budget))
    check(option, signals, queries, read)


@pytest.mark.parametrize("window", [1, 4])
def test_actqkv_reads_by_the_cosine_with_its_probe(
    signals: Signals, queries: Tensor, window: int
) -> None:
    sinks, recent, block, budget = 2, 9, 7, 30
    blocks = representatives(signals, block, 3, sinks, recent)
    q, rows = doubles(queries), doubles(signals.queries)
    places = range(4, TOKENS)  # the first queries are outliers and left out
    plain = np.array([[turned(row[i], -i, signals) for i in places] for row in rows])
    mean, variance = plain.mean(1).ravel(), plain.var(1).ravel()

    def vector(step: int, position: float) -> Any:
        return np.concatenate(
            [turned(q[h, g, step], position, signals) for h in range(HEADS) for g in range(GROUP)]
        )

    def bias(step: int) -> float:
        away = (vector(step, -(TOKENS + step)) - mean) ** 2
        return float(np.mean(away / (variance + variance.mean() / 100)))

    def read(_: int, step: int) -> list[int]:
        first = step - step % window
        some = range(first, min(first + window, STEPS))
        total = sum(bias(j) for j in some)
        probe = sum(bias(j) / total * vector(j, recent - (TOKENS + j)) for j in some)
        worth = []
        for means in (each for _, each in blocks):
            wide = np.concatenate([means[h] for h in range(HEADS) for _ in range(GROUP)])
            worth.append(probe @ wide / np.linalg.norm(probe) / np.linalg.norm(wide))
        best = highest(worth, (budget - sinks - recent) // block)
        middle = [j for number in best for j in blocks[number][0]]
        return [*range(sinks), *middle, *range(TOKENS - recent, TOKENS)]

    option = Option(ActQKV(block, 3, sinks, recent, window), Budget(tokens=budget))
    check(option, signals, queries, read)


def test_layers_whose_blocks_score_alike_are_given_more() -> None:
    """Equal keys score alike: the largest entropy there is, and so the largest budget."""
    spread = make_signals(Case(TOKENS, 0, kv_heads=HEADS, group=GROUP, seed=4))
    alike = make_signals(Case(TOKENS, 0, kv_heads=HEADS, group=GROUP, seed=4))
    alike.keys[:] = 0
    method = ActQKV(block=4, sinks=2, recent=8)
    reader = method.reader(24)
    found = [entropy(reader, layer, 100) for layer in (spread, alike)]
    assert found[0] < 0.999
    assert found[1] == pytest.approx(1)
    given = np.full((2, HEADS), 24)
    settled = ActQKVLayers(least=0, most=4096).settle(
        given, [[method] * HEADS] * 2, [spread, alike].__getitem__
    )
    wanted = 24 * 2 * np.array(found) / sum(found)
    assert settled.sum() == given.sum()
    assert np.abs(settled - wanted[:, None]).max() < 1


# Recycled Attention


@pytest.mark.parametrize(("stride", "similarity"), [(3, 1.0), (2, 0.2)])
def test_recycled_reads_what_its_last_full_step_saw(
    signals: Signals, queries: Tensor, stride: int, similarity: float
) -> None:
    budget = 12
    queries[:, :, 3] = queries[:, :, 1]  # a full step that may be passed over
    keys, q = doubles(signals.keys), doubles(queries)
    last = doubles(signals.queries).reshape(HEADS, GROUP, TOKENS, SIZE)[:, :, -1]

    def picked(rows: Any) -> list[list[int]]:
        sets = []
        for head in range(HEADS):
            worth = np.max([softmax(signals.scale * (keys[head] @ row)) for row in rows[head]], 0)
            worth[-1] = np.inf
            sets.append(highest(worth, budget))
        return sets

    current, reference, plan = picked(last), last, []
    for step in range(STEPS):
        due = (step + 1) % stride == 0
        one, two = q[:, :, step].mean((0, 1)), reference.mean((0, 1))
        cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        full = due and (cosine <= similarity)
        plan.append((full, current))
        if full:
            current, reference = picked(q[:, :, step]), q[:, :, step]
    assert any(full for full, _ in plan)
    option = Option(Recycled(stride, similarity), Budget(tokens=budget))
    ours = doubles(answered(option, signals, queries))
    values = doubles(signals.values)
    for step, (full, sets) in enumerate(plan):
        for head in range(HEADS):
            tokens = range(TOKENS) if full else sorted(sets[head])
            for member in range(GROUP):
                theirs = slow_attention(
                    q[head, member, step],
                    keys[head, tokens],
                    values[head, tokens],
                    signals.scale,
                )
                assert np.abs(ours[head, member, step] - theirs).max() < 1e-4


@pytest.mark.parametrize(
    "method",
    [
        TokenSelect(4, 8, 0.9), TokenSelect(4, 8, 0.05), TokenSelect(4, 8, 2),
        Recycled(stride=2), Recycled(stride=3, similarity=0.2), Recycled(stride=1),
        ActQKV(block=8, sinks=4, recent=8), ActQKV(block=8, sinks=4, recent=8, window=4),
        InfLLM(block=8, sinks=4, recent=8), ShadowKV(rank=8, chunk=4, recent=2),
        Landmark(block=8), Quest(block=16), SentenceKV(window=8),
        RetrievalAttention(sinks=4, recent=8, degree=4, near=8, beam=12),
    ],
    ids=lambda method: method.label,
)  # fmt: skip
def test_steps_one_after_another_read_what_the_last_of_all_of_them_reads(
    signals: Signals, queries: Tensor, method: Method
) -> None:
    ends = torch.zeros(TOKENS + STEPS, dtype=torch.bool)
    ends[[9, 30, 44, TOKENS + 1, TOKENS + 3]] = True
    signals.sentence_ends = ends
    reader = method.reader(30)
    assert reader is not None
    kept = method.keep(signals, 30)
    keys = signals.keys.gather(1, kept[..., None].expand(-1, -1, SIZE))
    asked = torch.cat([queries, uniform(54, HEADS, GROUP, STEPS, SIZE)])
    held = Held(
        keys.repeat(2, 1, 1), torch.full((2 * HEADS,), kept.shape[1]), kept.repeat(2, 1),
        torch.arange(HEADS).repeat(2), torch.tensor([3, 0]).repeat_interleave(HEADS), signals,
        TOKENS,
    )  # fmt: skip
    steps = followed(reader, held, asked)
    for step, found in enumerate(steps):
        assert torch.equal(found, reader.reads(held, asked[:, :, : step + 1])[:, -1])
    for rows in (slice(HEADS), slice(HEADS, None)):
        by_itself = followed(reader, alone(held, rows), asked[rows])
        assert torch.equal(steps[:, rows], by_itself), "as beside no other policy"


def followed(reader: Reader, held: Held, queries: Tensor) -> Tensor:
    """What each step reads behind those before it, ``[C, R, n]`` bool."""
    memory: dict[str, Any] = {}
    steps = [
        reader.follow(replace(held, start=TOKENS + step), query, memory)
        for step, query in enumerate(queries.split(1, 2))
    ]
    return torch.stack(steps)


def alone(held: Held, rows: slice) -> Held:
    """Some rows of what is held, as one policy."""
    keys, counts, tokens, heads = (
        each[rows] for each in (held.keys, held.counts, held.tokens, held.heads)
    )
    signals = replace(held.signals, _memo={})
    return Held(keys, counts, tokens, heads, torch.zeros_like(heads), signals, held.start)


def test_recycled_counts_its_full_steps() -> None:
    option = Option(Recycled(stride=10), Budget(tokens=100))
    ledger = option.ledger(100, 1000, 64)
    token = 2 * 2 * 64
    assert ledger.resident_bytes == 1000 * token + 4 * 100
    mean = (9 * 100 + 1000) // 10
    assert ledger.read_bytes == mean * token + 1000 * 128 // 10 + 4 * 100


# Landmark, ShadowKV


def test_landmark_reads_blocks_by_their_mean_key(signals: Signals, queries: Tensor) -> None:
    block = 8
    keys, q = doubles(signals.keys), doubles(queries)
    blocks = [range(start, min(start + block, TOKENS)) for start in range(0, TOKENS, block)]

    def read(head: int, step: int) -> list[int]:
        worth = [
            max(q[head, g, step] @ keys[head, list(b)].mean(0) for g in range(GROUP))
            for b in blocks[:-1]
        ]
        return [j for n in [*highest(worth, 2), len(blocks) - 1] for j in blocks[n]]

    check(Option(Landmark(block), Budget(tokens=3 * block)), signals, queries, read)


def test_shadowkv_reads_outliers_and_chunks_by_landmark_with_rebuilt_keys(
    signals: Signals, queries: Tensor
) -> None:
    chunk, budget, rank = 4, 44, 5
    recent, outliers = 8, 2  # 3/16 of 44 tokens are 8
    keys, q = doubles(signals.keys), doubles(queries)
    middle = TOKENS - recent
    chunks = [range(start, min(start + chunk, middle)) for start in range(0, middle, chunk)]
    marks = np.array([[keys[h, list(c)].mean(0) for c in chunks] for h in range(HEADS)])
    wide = np.array(
        [
            np.concatenate([turned(keys[h, j], -j, signals) for h in range(HEADS)])
            for j in range(TOKENS)
        ]
    )
    u, s, vt = np.linalg.svd(wide, full_matrices=False)
    low = ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(TOKENS, HEADS, SIZE)
    used = np.array([[turned(low[j, h], j, signals) for j in range(TOKENS)] for h in range(HEADS)])
    odd = []
    for h in range(HEADS):
        least = [
            min(
                keys[h, j] @ marks[h, n] / np.linalg.norm(keys[h, j]) / np.linalg.norm(marks[h, n])
                for j in c
            )
            for n, c in enumerate(chunks)
        ]
        odd.append(highest([-x for x in least], outliers))
        exact = [j for n in odd[h] for j in chunks[n]] + [*range(middle, TOKENS)]
        used[h, exact] = keys[h, exact]

    def read(head: int, step: int) -> list[int]:
        soft = np.max(
            [softmax(signals.scale * (marks[head] @ q[head, g, step])) for g in range(GROUP)], 0
        )
        rest = [n for n in highest(soft, len(chunks)) if n not in odd[head]]
        chosen = odd[head] + rest[: (budget - recent) // chunk - outliers]
        return [j for n in chosen for j in chunks[n]] + [*range(middle, TOKENS)]

    option = Option(ShadowKV(rank, chunk, recent=2), Budget(tokens=budget))
    check(option, signals, queries, read, used)


# SentenceKV


def test_sentencekv_reads_sentences_by_the_mean_of_its_sentences_queries(
    signals: Signals, queries: Tensor
) -> None:
    ends = torch.zeros(TOKENS + STEPS, dtype=torch.bool)
    ends[[6, 13, 14, 31, 44, 58, TOKENS + 2]] = True
    signals.sentence_ends = ends
    budget, window, kernel = 20, 4, 3
    first, last = 5, 5  # 32 and 32 are cut to half of the budget
    keys, q = doubles(signals.keys), doubles(queries)
    rows = doubles(signals.queries).reshape(HEADS, GROUP, TOKENS, SIZE)
    sentence = np.concatenate([[0], np.cumsum(ends[: TOKENS - 1].numpy())])

    def held(head: int) -> list[int]:
        drawn = np.zeros(TOKENS)
        for member in range(GROUP):
            for i in range(TOKENS - window, TOKENS):
                drawn[: i + 1] += softmax(
                    signals.scale * (keys[head, : i + 1] @ rows[head, member, i])
                )
        before = TOKENS - window
        smooth = [drawn[max(j - 1, 0) : min(j + 2, before)].max() for j in range(before)]
        return sorted([*highest(smooth, 3 * budget - window), *range(before, TOKENS)])

    def read(head: int, step: int) -> list[int]:
        kept = held(head)
        middle = kept[first : len(kept) - last]
        begun = 3 if step >= 3 else 0  # the token before step 3 ended a sentence
        running = q[head, :, begun : step + 1].mean(1)
        groups = {n: [j for j in middle if sentence[j] == n] for n in {sentence[j] for j in middle}}
        worth = {n: (running @ keys[head, js].mean(0)).max() for n, js in groups.items()}
        order = [j for n in sorted(worth, key=lambda n: -worth[n]) for j in groups[n]]
        return [*kept[:first], *order[: budget - first - last], *kept[len(kept) - last :]]

    method = SentenceKV(held=3, window=window, kernel=kernel)
    check(Option(method, Budget(tokens=budget)), signals, queries, read)


# Quest


def test_no_keys_logit_exceeds_its_blocks_bound_and_some_key_may_reach_it() -> None:
    keys, queries = uniform(64, 2, 50, 8) - 0.3, uniform(65, 2, 3, 4, 8)
    counts = torch.tensor([50, 41])
    reader = BlockBounds(16, 2)
    bounds = reader.score(reader.index(keys, counts), queries)
    for row, count in enumerate(counts.tolist()):
        logits = torch.einsum("gcd,nd->gcn", queries[row], keys[row, :count]).amax(0)
        for block, part in enumerate(logits.split(16, -1)):
            assert (part.amax(-1) <= bounds[row, :, block] + 1e-5).all()
    alone = reader.index(keys[:, :1], torch.tensor([1, 1]))
    exact = torch.einsum("rgcd,rd->rgc", queries, keys[:, 0]).amax(1)
    assert torch.allclose(reader.score(alone, queries)[..., 0], exact, atol=1e-5)


# RetrievalAttention


def test_a_search_that_expands_everything_finds_the_largest_products() -> None:
    """On a graph that joins every key, a beam as long as the list is the exact answer."""
    keys, queries, asked = uniform(60, 40, 8), uniform(61, 90, 8), uniform(62, 5, 8)
    graph = KeyGraph.build(keys, queries, 12, 10, 40, "queries")
    ids, visited = graph.search(asked, 40)
    assert visited.all(), "every key can be reached"
    exact = (asked @ keys.T).argsort(-1, descending=True)
    assert torch.equal(ids, exact)


def test_a_graph_holds_no_key_twice_and_none_as_its_own_neighbour() -> None:
    graph = KeyGraph.build(uniform(60, 40, 8), uniform(61, 90, 8), 6, 10, 12, "queries")
    for key, row in enumerate(graph.neighbours.tolist()):
        real = [other for other in row if other != NONE]
        assert len(set(real)) == len(real) <= 12
        assert key not in real


def test_a_graph_made_for_queries_scans_less_than_one_of_keys_for_the_same_recall() -> None:
    """Queries far from where keys lie, as attention's are."""
    torch.manual_seed(0)
    keys, mixing = uniform(70, 500, 16) + 0.5, uniform(71, 16, 16) / 4
    queries, asked = (uniform(seed, n, 16) @ mixing - 1 for seed, n in ((72, 700), (73, 40)))
    exact = (asked @ keys.T).topk(10).indices

    def recall_and_scan(joins: Any) -> tuple[float, float]:
        graph = KeyGraph.build(keys, queries, 8, 20, 24, joins)
        ids, visited = graph.search(asked, 24)
        found = (ids[:, :, None] == exact[:, None]).any(1)
        return float(found.float().mean()), float(visited.float().mean())

    ours, plain = recall_and_scan("queries"), recall_and_scan("keys")
    assert ours[0] > 0.8
    assert ours[1] < plain[1]


def test_a_search_of_lists_that_may_compare_every_key_finds_the_largest_products() -> None:
    keys, queries, asked = uniform(60, 40, 8), uniform(61, 90, 8), uniform(62, 5, 8)
    index = QueryIndex.build(keys, queries, 4, 10, 20, 39)
    ids, visited = index.search(asked, 40, 40)
    assert visited.all(), "every key is a neighbour of any other"
    assert torch.equal(ids, (asked @ keys.T).argsort(-1, descending=True))


@pytest.mark.parametrize("compared", [24, 50, 80])
def test_a_search_of_lists_compares_no_more_than_it_may_and_names_only_those(compared: int) -> None:
    keys, queries, asked = uniform(60, 200, 8), uniform(61, 90, 8), uniform(62, 5, 8)
    index = QueryIndex.build(keys, queries, 4, 10, 60, 8)
    ids, visited = index.search(asked, 15, compared)
    assert (visited.sum(-1) <= compared).all()
    products = (asked @ keys.T).masked_fill(~visited, -torch.inf)
    assert torch.equal(ids, products.topk(15).indices), "the best of what it compared"


def test_a_list_names_what_its_clusters_queries_look_at_most() -> None:
    """Two bundles of queries, each along a line that one group of keys lies on."""
    torch.manual_seed(0)
    keys = 0.1 * torch.randn(60, 8)
    keys[:20, 0] += 3
    keys[20:40, 1] += 3
    queries = 0.1 * torch.randn(80, 8)
    queries[:40, 0] += 1
    queries[40:, 1] += 1
    index = QueryIndex.build(keys, queries, 2, 20, 30, 4)
    found = {frozenset(row[:20]) for row in index.lists.tolist()}
    assert found == {frozenset(range(20)), frozenset(range(20, 40))}


def test_queries_are_turned_behind_the_prompt_before_they_make_an_index(signals: Signals) -> None:
    asked = doubles(_queries_of(signals, 1, turned=True)).reshape(GROUP, TOKENS, SIZE)
    rows = doubles(signals.queries).reshape(HEADS, GROUP, TOKENS, SIZE)[1]
    for member, at in ((0, 0), (1, 7), (0, TOKENS - 1)):
        wanted = turned(rows[member, at], TOKENS - at, signals)
        assert np.allclose(asked[member, at], wanted, atol=1e-5)


def test_retrieval_attention_reads_the_largest_logits_where_its_search_is_exhaustive(
    signals: Signals, queries: Tensor
) -> None:
    sinks, recent, budget = 3, 5, 20
    keys, q = doubles(signals.keys), doubles(queries)

    def read(head: int, step: int) -> list[int]:
        worth = np.max([keys[head] @ q[head, g, step] for g in range(GROUP)], 0)
        middle = [j for j in highest(worth, TOKENS) if sinks <= j < TOKENS - recent]
        ends = [*range(sinks), *range(TOKENS - recent, TOKENS)]
        return ends + middle[: budget - sinks - recent]

    for method in (
        RetrievalAttention(sinks, recent, degree=20, near=20, beam=TOKENS),
        RetrievalAttention(sinks, recent, TOKENS, 20, TOKENS, joins="lists", scanned=1.0),
    ):
        check(Option(method, Budget(tokens=budget)), signals, queries, read)
    if importlib.util.find_spec("faiss"):
        method = RetrievalAttention(sinks, recent, 16, TOKENS, TOKENS, joins="hnsw")
        check(Option(method, Budget(tokens=budget)), signals, queries, read)


def test_an_index_of_faiss_without_faiss_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(KvtuneError, match="FAISS") as raised:
        RetrievalAttention(joins="hnsw")
    assert "kvtune[index]" in str(raised.value.hint)


# TriAttention and CCA: no readers, but of this family


def test_triattention_scores_by_distance_and_length(signals: Signals) -> None:
    keys = doubles(signals.keys)
    rows = doubles(signals.queries).reshape(HEADS, GROUP, TOKENS, SIZE)
    assert signals.rope is not None
    frequencies, half = signals.rope.inverse_frequencies, SIZE // 2
    ours = doubles(TriAttention(farthest=8).scores(signals))
    for head in range(HEADS):
        each = []
        for member in range(GROUP):
            plain = np.array([turned(rows[head, member, i], -i, signals) for i in range(TOKENS)])
            scores = []
            for j in range(TOKENS):
                k = turned(keys[head, j], -j, signals)
                total = 0.0
                for f, w in enumerate(frequencies):
                    q = plain[:, f] + 1j * plain[:, f + half]
                    centre, key = q.mean(), complex(k[f], k[f + half])
                    angles = [
                        w * (TOKENS - 1 - j + o) + np.angle(centre) - np.angle(key)
                        for o in (1, 2, 4, 8)
                    ]
                    total += abs(centre) * abs(key) * np.mean(np.cos(angles))
                    length = np.abs(q).mean()
                    total += (1 - abs(centre) / length) * length * abs(key)
                scores.append(total)
            each.append((np.array(scores) - np.mean(scores)) / np.std(scores))
        assert np.abs(ours[head] - np.max(each, 0)).max() < 1e-3


def test_cca_answers_over_its_window_and_core_tokens(signals: Signals, queries: Tensor) -> None:
    budget, local = 20, 8
    cores, far = budget - local, TOKENS - local
    keys, values = doubles(signals.keys), doubles(signals.values)
    rows = doubles(signals.queries).reshape(HEADS, GROUP, TOKENS, SIZE)
    option = Option(CCA(recent_share=0.4), Budget(tokens=budget))
    ours = doubles(answered(option, signals, queries))
    for head in range(HEADS):
        core_keys, core_values = [], []
        for core in range(cores):
            members = range(core * far // cores, (core + 1) * far // cores)
            end = members[-1]
            shares = [
                softmax([signals.scale * (rows[head, g, end] @ keys[head, j]) for j in members])
                for g in range(GROUP)
            ]
            weight = np.mean(shares, 0)
            pooled = sum(
                w * turned(keys[head, j], -j, signals) for w, j in zip(weight, members, strict=True)
            )
            core_keys.append(turned(pooled, end, signals))
            core_values.append(weight @ values[head, list(members)])
        all_keys = np.vstack([keys[head, far:], core_keys])
        all_values = np.vstack([values[head, far:], core_values])
        for member in range(GROUP):
            for step in range(STEPS):
                query = doubles(queries[head, member, step])
                theirs = slow_attention(query, all_keys, all_values, signals.scale)
                # core tokens are stored in 16 bits
                assert np.abs(ours[head, member, step] - theirs).max() < 2e-2


# Identities


def test_softmax_in_two_levels_with_exact_block_weights_is_full_attention() -> None:
    rng = np.random.default_rng(5)
    keys, values, query = rng.normal(size=(40, 8)), rng.normal(size=(40, 8)), rng.normal(size=8)
    parts = [
        attend(
            torch.tensor(query)[None], torch.tensor(keys[at]), torch.tensor(values[at]), None, 0.3
        )
        for at in np.array_split(np.arange(40), 6)
    ]
    gates = torch.stack([lse for _, lse in parts]).softmax(0)
    both = sum(gate * output[0] for gate, (output, _) in zip(gates, parts, strict=True))
    assert np.abs(doubles(both) - slow_attention(query, keys, values, 0.3)).max() < 1e-12


def test_the_compensation_token_is_the_running_mean_of_what_left() -> None:
    """RazorAttention's decode rule, token by token in float64, against the entry that is stored."""
    signals = make_signals(Case(60, 0, kv_heads=2, group=3, seed=6))
    kept, stands_for_all = Razor(sinks=4).parts(signals, 20)
    assert stands_for_all.keys is not None
    assert stands_for_all.log_weight is not None
    for head in range(2):
        mean, count = np.zeros(16), 0
        for token in sorted({*range(60)} - {*kept.tokens[head].tolist()}):
            key = doubles(signals.keys[head, token])
            mean, count = mean + (key - mean) / (count + 1), count + 1
        assert np.abs(doubles(stands_for_all.keys[head, 0]) - mean).max() < 1e-6
        assert float(stands_for_all.log_weight[head, 0]) == pytest.approx(math.log(count))


def test_razors_published_sizes_are_a_compression_of_3_125() -> None:
    """15 % of heads in full, the others a fifth of the tokens (section 5 of the paper)."""
    heads = (Option(),) * 3 + (Option(Razor(), Budget(share=0.2)),) * 17
    held = Policy("razor", (heads,)).footprint(4000, 128)
    assert Policy("full", ((Option(),) * 20,)).footprint(4000, 128) / held == pytest.approx(
        3.125, rel=1e-3
    )
