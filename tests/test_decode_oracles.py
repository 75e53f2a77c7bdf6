"""Methods that evict while decoding against slow, obvious versions of themselves in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.rotary import turn
from kvtune.policies.decode import FREE, DecodeMethod, DecodeState
from kvtune.policies.methods.a2sf import A2SF, DECODE, PREFILL
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.keyformer import Keyformer
from kvtune.policies.methods.lazy_eviction import LazyEviction
from kvtune.policies.methods.scissorhands import Scissorhands
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.tova import Tova
from kvtune.policies.noise import gumbel
from kvtune.policies.signals import Signals
from kvtune.policies.slot_prompt import prompt_of
from kvtune.policies.slots import SlotCache
from kvtune.policies.testing import Case, make_signals
from kvtune.policies.testing import decode as suite

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = Case(29, 12, kv_heads=2, group=3, seed=5)
Attended = dict[int, list[float]]  # by visible key: the weight of each query head of a group
Row = tuple[int, Attended]  # query position, and what it attended to
History = list[list[Row]]  # by head


def attention_row(query: Tensor, keys: dict[int, Tensor], scale: float) -> Attended:
    """Attention of one head's queries ``[G, D]`` over the given keys, in float64."""
    logits = torch.stack(list(keys.values())).double() @ query.double().T * scale
    return dict(zip(keys, logits.softmax(0).tolist(), strict=True))


def mean(weights: list[float]) -> float:
    return sum(weights) / len(weights)


class Oracle:
    """Keeps every row it ever saw and scores from its method's definition, token by token."""

    def __init__(self, worth: Callable[[History, int, int, int], float], method: DecodeMethod):
        self.worth, self.method = worth, method

    def run(
        self, signals: Signals, tokens: tuple[Tensor, ...], budget: int
    ) -> list[list[set[int]]]:
        """Kept positions of each head at the prompt's end and after every token."""
        heads, prompt = signals.keys.shape[0], signals.prompt_tokens
        queries = signals.queries.unflatten(0, (heads, -1))
        self.history: History = [[] for _ in range(heads)]
        keys = [dict(enumerate(signals.keys[head])) for head in range(heads)]
        for head in range(heads):
            for q in range(prompt):
                seen = {j: keys[head][j] for j in range(q + 1)}
                row = attention_row(queries[head, :, q], seen, signals.scale)
                self.history[head].append((q, row))
        self.trim(keys, prompt - 1, 0, [max(0, prompt - budget)] * heads, budget)
        found = [[set(held) for held in keys]]
        for step, (query, key, _) in enumerate(zip(*tokens, strict=True), start=1):
            now = prompt + step - 1
            for head in range(heads):
                keys[head][now] = key[head]
                row = attention_row(query[head], keys[head], signals.scale)
                self.history[head].append((now, row))
            sizes = np.array([[len(held) for held in keys]])
            drops = self.method.drops(sizes, np.full_like(sizes, budget), step)[0].tolist()
            self.trim(keys, now, step, drops, budget)
            found.append([set(held) for held in keys])
        return found

    def trim(
        self, keys: list[dict[int, Tensor]], now: int, step: int, drops: list[int], budget: int
    ) -> None:
        first, last = self.method.protected(budget)
        first = min(first, budget)
        last = min(last, budget - first)
        for head, held in enumerate(keys):
            free = [j for j in held if first <= j <= now - last]
            ranked = sorted((self.worth(self.history, head, j, step), j) for j in free)
            for _, j in ranked[: drops[head]]:
                del held[j]


def drawn(history: History, head: int, j: int, factor: float = 1.0) -> float:
    now = history[head][-1][0]
    return sum(mean(row[j]) * factor ** (now - q) for q, row in history[head] if j in row)


def of_h2o(history: History, head: int, j: int, step: int) -> float:
    return drawn(history, head, j)


def of_a2sf(factor: float) -> Callable[[History, int, int, int], float]:
    return lambda history, head, j, step: drawn(history, head, j, factor)


def of_tova(history: History, head: int, j: int, step: int) -> float:
    return mean([mean(rows[-1][1][j]) for rows in history])


def of_tova_alone(history: History, head: int, j: int, step: int) -> float:
    return mean(history[head][-1][1][j])


def of_scissorhands(window: int) -> Callable[[History, int, int, int], float]:
    def worth(history: History, head: int, j: int, step: int) -> float:
        rows = [row for q, row in history[head][-window:] if q >= j]
        return -sum(mean(row[j]) < 1 / len(row) for row in rows) / len(rows)

    return worth


def of_streaming(history: History, head: int, j: int, step: int) -> float:
    return j


def of_keyformer(method: Keyformer, prompt: int) -> Callable[[History, int, int, int], float]:
    def worth(history: History, head: int, j: int, step: int) -> float:
        return sum(once(row, head, q)[j] for q, row in history[head] if j in row)

    known: dict[tuple[int, int], tuple[Attended, dict[int, float]]] = {}

    def once(row: Attended, head: int, query: int) -> dict[int, float]:
        """A row is asked for again at every later token."""
        found = known.get((head, query))
        if found is None or found[0] is not row:
            found = known[head, query] = row, softened(row, head, query)
        return found[1]

    def softened(row: Attended, head: int, query: int) -> dict[int, float]:
        generated = max(0, query - prompt + 1)
        slope = (method.end - method.start) / method.horizon
        temperature = min(method.start + generated * slope, method.end)
        logits = torch.tensor(list(row.values()), dtype=torch.float64).T.log()  # [G, n]
        group = len(logits)
        number = torch.arange(head * group, (head + 1) * group)[:, None]
        noise = gumbel(method.seed, number, torch.tensor(query), torch.tensor(list(row)))
        f = ((logits + method.noise * noise) / temperature).softmax(-1).mean(0)
        return dict(zip(row, f.tolist(), strict=True))

    return worth


def of_lazy(method: LazyEviction, prompt: int) -> Callable[[History, int, int, int], float]:
    def worth(history: History, head: int, j: int, step: int) -> float:
        last = max(-method.window, j - prompt + 1 - method.count_own)
        gap = 0
        first = prompt if method.prompt == "kept" else prompt - method.window
        if method.prompt == "kept" and j < prompt:
            last = 0
        for q, row in history[head]:
            t = q - prompt + 1
            if q >= first and j in row and max(row[j]) >= method.threshold:
                gap, last = max(gap, t - last), t
        overdue = 2 / (1 + math.exp(min(700, method.h1_shift + (step - last) / (gap + 1e-5))))
        if method.h2 == "off" or gap == 0:
            return overdue
        returns = 1 - gap if method.h2 == "code" else -1 / gap
        return overdue + 2 / (1 + math.exp(-returns))

    return worth


KEYFORMER = Keyformer(horizon=10, seed=3)
LAZY = LazyEviction(window=5, threshold=0.06)
ORACLES: list[tuple[DecodeMethod, Any]] = [
    (H2O(), of_h2o),
    (H2O(recent_share=0.1), of_h2o),
    (DECODE, of_a2sf(0.2)),
    (A2SF(factor=0.9, sinks=2, recent=3), of_a2sf(0.9)),
    (Tova(), of_tova),
    (Tova(unit="kv_head"), of_tova_alone),
    (Scissorhands(history=8, recent=2), of_scissorhands(8)),
    (Scissorhands(recent=2, drop_share=0.25), of_scissorhands(400)),
    (StreamingLLM(), of_streaming),
    (KEYFORMER, of_keyformer(KEYFORMER, CASE.prompt_tokens)),
    (LAZY, of_lazy(LAZY, CASE.prompt_tokens)),
    *(
        (variant, of_lazy(variant, CASE.prompt_tokens))
        for variant in (
            replace(LAZY, h2="note", h1_shift=0.0),
            replace(LAZY, h2="off", count_own=False),
        )
    ),
]


def histories(cache: SlotCache, tokens: tuple[Tensor, ...]) -> Iterator[list[set[int]]]:
    yield [set(held) for held in cache.kept()[0]]
    for _ in suite.steps(cache, tokens):  # type: ignore[arg-type]
        yield [set(held) for held in cache.kept()[0]]


FIRST = {type(method): method for method, _ in reversed(ORACLES)}.values()
"""One variant of each method; the others are tried in the full tier."""
EACH = [
    pytest.param(*one, id=str(one[0])[:60], marks=[] if one[0] in FIRST else [pytest.mark.full])
    for one in ORACLES
]


@pytest.mark.parametrize(("method", "worth"), EACH)
def test_every_step_keeps_what_the_definition_keeps(method: DecodeMethod, worth: Any) -> None:
    signals, tokens = make_signals(CASE), suite.generated(CASE)
    expected = Oracle(worth, method).run(signals, tokens, CASE.budget)
    assert list(histories(suite.opened(method, CASE), tokens)) == expected


def final(method: DecodeMethod, case: Case = CASE) -> list[list[int]]:
    cache = suite.opened(method, case)
    list(suite.steps(cache, suite.generated(case)))
    return cache.kept()[0]


@pytest.mark.parametrize("budget", [1, 7, 12])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda b: A2SF(factor=1.0, recent=b // 2), lambda b: H2O()),
        (lambda b: A2SF(factor=0.0), lambda b: Tova(unit="kv_head")),
        (
            lambda b: Keyformer(noise=0.0, end=1.0, recent_share=0.5),
            lambda b: H2O(),
        ),
        (lambda b: H2O(recent_share=1.0), lambda b: StreamingLLM(sinks=0)),
        (lambda b: A2SF(recent=b), lambda b: StreamingLLM(sinks=0)),
        (lambda b: LazyEviction(window=1, threshold=1.0), lambda b: StreamingLLM(sinks=0)),
    ],
    ids=["a2sf-h2o", "a2sf-tova", "keyformer-h2o", "h2o-window", "a2sf-window", "lazy-window"],
)
def test_degenerate_parameters_make_methods_equal(one: Any, other: Any, budget: int) -> None:
    case = replace(CASE, budget=budget)
    assert final(one(budget), case) == final(other(budget), case)


def test_one_head_makes_tova_the_same_for_layer_and_head() -> None:
    case = replace(CASE, kv_heads=1)
    assert final(Tova(), case) == final(Tova(unit="kv_head"), case)


def test_tova_keeps_the_same_tokens_in_all_heads_of_a_layer() -> None:
    first, second = final(Tova())
    assert first == second
    assert final(Tova(unit="kv_head"))[0] != final(Tova(unit="kv_head"))[1]


def test_tova_refuses_unequal_budgets_in_a_layer() -> None:
    signals, budgets = make_signals(CASE), np.array([[4, 5]])
    prompt = prompt_of(Tova(), signals, budgets)
    with pytest.raises(KvtuneError, match="whose budgets differ"):
        SlotCache(Tova(), prompt, signals, budgets, 3)
    SlotCache(Tova(unit="kv_head"), prompt, signals, budgets, 3).check_integrity()


def test_heads_may_have_budgets_of_their_own() -> None:
    signals, budgets = make_signals(CASE), np.array([[4, 9]])
    cache = SlotCache(H2O(), prompt_of(H2O(), signals, budgets), signals, budgets, suite.STEPS)
    list(suite.steps(cache, suite.generated(CASE)))
    assert cache.sizes.tolist() == [[4, 9]]
    assert cache.evicted.tolist() == [[suite.STEPS] * 2]
    assert cache.kept()[0][0] == final(H2O(), replace(CASE, budget=4))[0]


def test_scissorhands_drops_in_bulk_and_seldom() -> None:
    cache = suite.opened(Scissorhands(recent=2, drop_share=0.5), CASE)
    sizes = [int(cache.sizes[0, 0]) for _ in suite.steps(cache, suite.generated(CASE))]
    assert sizes == [7, 8, 9, 10, 11, 12, 7, 8, 9, 10, 11, 12, 7, 8, 9]


def test_lazy_eviction_waits_for_its_window() -> None:
    cache = suite.opened(LAZY, CASE)
    sizes = [int(cache.sizes[0, 0]) for _ in suite.steps(cache, suite.generated(CASE))]
    assert sizes == [13, 14, 15, 16, 12] * 3
    assert int(cache.peak[0, 0]) == 17 == LAZY.most(12, 12)


def test_the_authors_lazy_eviction_leaves_the_prompt_alone_at_first() -> None:
    method = LazyEviction(prompt="kept", window=5, threshold=0.06)
    cache = suite.opened(method, CASE)
    sizes = [int(cache.sizes[0, 0]) for _ in suite.steps(cache, suite.generated(CASE))]
    assert sizes[:6] == [30, 31, 32, 33, 12, 13]


@pytest.mark.parametrize("h2", ["code", "note"])
def test_the_two_forms_of_h2_order_gaps_oppositely(h2: Any) -> None:
    state = LAZY.open(make_signals(Case(2, 0, 1)))
    state.statistics = {"last": torch.tensor([[[0, 0]]]), "gap": torch.tensor([[[1, 50]]])}
    short, long = replace(LAZY, h2=h2).worth(state)[0, 0].tolist()
    assert (short > long) == (h2 == "code")


def test_counting_its_own_row_gives_every_new_token_a_gap_of_one() -> None:
    for count_own in (True, False):
        method = replace(LAZY, threshold=0.0, count_own=count_own)
        cache = suite.opened(method, CASE)
        next(suite.steps(cache, suite.generated(CASE)))
        newest = cache.state.positions == cache.state.now
        assert cache.state.statistics["gap"][newest].tolist() == [int(count_own)] * 2


def test_presets_of_a2sf_are_the_papers() -> None:
    assert (DECODE.factor, DECODE.recent, DECODE.sinks) == (0.2, 0, 0)
    assert (PREFILL.factor, PREFILL.recent) == (0.95, 16)
    assert DECODE.needs.window == 9
    assert PREFILL.needs.window == 270


def test_keyformer_draws_by_seed_and_layer_only() -> None:
    assert final(Keyformer(seed=1)) == final(Keyformer(seed=1))
    assert final(Keyformer(seed=1)) != final(Keyformer(seed=2))
    signals = make_signals(CASE)
    other = replace(signals, layer=1, _memo={})
    assert not torch.equal(Keyformer().scores(signals), Keyformer().scores(other))


def test_frozen_keys_hold_no_generated_token_outside_the_window() -> None:
    case = Case(12, 12, kv_heads=2, group=3, seed=5)
    newest = case.prompt_tokens + suite.STEPS
    window = set(range(newest - int(case.budget * Keyformer().recent_share), newest))
    for frozen in (True, False):
        held = {p for head in final(Keyformer(frozen_keys=frozen), case) for p in head}
        beyond = {p for p in held if p >= case.prompt_tokens} - window
        assert bool(beyond) != frozen


def test_gumbel_noise_is_gumbel_and_a_function_of_its_place() -> None:
    rows, columns = torch.arange(200)[:, None], torch.arange(500)
    noise = gumbel(7, rows, columns)
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    assert abs(float(torch.corrcoef(noise[:2])[0, 1])) < 0.15
    assert torch.equal(gumbel(7, rows[3:5], columns[9:]), noise[3:5, 9:])
    assert not torch.equal(gumbel(8, rows, columns), noise)


class PlainRope:
    inverse_frequencies = tuple(0.5**i for i in range(8))
    attention_factor = 1.0


def test_reindexed_keys_stand_where_the_cache_numbers_them() -> None:
    rope = PlainRope()
    plain, (queries, keys, values) = make_signals(CASE), suite.generated(CASE)
    turned = replace(
        plain,
        keys=turn(plain.keys, torch.arange(CASE.prompt_tokens), rope),
        rope=rope,
        _memo={},
    )
    method = StreamingLLM(sinks=3, positions="reindexed")
    cache = suite.opened(method, CASE, signals=turned)
    before_rope = dict(enumerate(plain.keys[0]))
    for t in range(suite.STEPS):
        at = torch.tensor(CASE.prompt_tokens + t)
        before_rope[int(at)] = keys[t, 0]
        live = [*cache.kept()[0][0], int(at)]
        query, key = (turn(x[t][..., None, :], at, rope)[..., 0, :] for x in (queries, keys))
        output = cache.step(query[None], key[None], values[t][None])[0, 0]
        place = torch.arange(len(live))
        inside = turn(torch.stack([before_rope[p] for p in live]), place, rope)
        asking = turn(queries[t, 0][:, None], place[-1:], rope)[:, 0]
        weights = (asking @ inside.T * plain.scale).softmax(-1)
        known = torch.cat((plain.values[0], values[: t + 1, 0]))
        torch.testing.assert_close(output, weights @ known[live], rtol=1e-3, atol=1e-4)


def test_reindexing_without_sinks_changes_nothing() -> None:
    kept, moved = (
        suite.opened(
            StreamingLLM(sinks=0, positions=positions),
            CASE,
            signals=replace(make_signals(CASE), rope=PlainRope()),
        )
        for positions in ("kept", "reindexed")
    )
    tokens = suite.generated(CASE)
    for one, other in zip(suite.steps(kept, tokens), suite.steps(moved, tokens), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_trimmed_prompt_is_reindexed_once() -> None:
    signals = replace(make_signals(CASE), rope=PlainRope())
    method = StreamingLLM(sinks=2, positions="reindexed")
    kept = method.keep(signals, CASE.budget)
    merged = method.merge(signals, kept)
    assert merged is not None
    gap = torch.tensor(CASE.prompt_tokens - CASE.budget)
    torch.testing.assert_close(merged[0][:, :2], turn(signals.keys[:, :2], gap, PlainRope()))
    assert torch.equal(merged[0][:, 2:], signals.keys[:, -CASE.budget + 2 :])
    assert StreamingLLM().merge(signals, kept) is None


@given(st.integers(0, 2**32 - 1))
def test_the_one_that_leaves_is_what_sorting_all_would_name(seed: int) -> None:
    """With equal worths, with empty slots, and where all that is live is protected."""
    rng = torch.Generator().manual_seed(seed)
    slots = 9
    positions = torch.stack([torch.randperm(40, generator=rng)[:slots] for _ in range(6)]).reshape(
        2, 3, slots
    )
    empty = torch.rand(positions.shape, generator=rng) < 0.3
    empty[..., 0] = False
    positions = positions.masked_fill(empty, FREE)
    drawn = torch.randint(-1, 2, positions.shape, generator=rng).float() * 0.0
    drawn += torch.randint(0, 3, positions.shape, generator=rng)
    state = DecodeState(positions, 38, {"drawn": drawn}, 0, torch.arange(3), generated=2)
    bounds = torch.randint(0, 20, (2, 2, 3, 1), generator=rng)
    state.pinned = (bounds[0], bounds[1]) if seed % 3 else None
    one = torch.ones(2, 3, dtype=torch.int64)
    for most in (None, 1):
        named = A2SF().leaving(state, one, most)
        assert (named.sum(-1) == 1).all()
        assert torch.equal(named.long().argmax(-1, keepdim=True), A2SF().leaving_one(state))
