"""What every method that evicts while decoding must hold to, beside what all methods must.

Used as ``kvtune.policies.testing`` is::

    @pytest.mark.parametrize("case", DECODE_CASES, ids=str)
    @pytest.mark.parametrize("check", DECODE_CHECKS, ids=lambda check: check.__name__)
    def test_mine(check, case):
        check(Mine(), case)
"""

# ruff: noqa: S101
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.attention import attend
from kvtune.policies.decode import FREE, DecodeMethod
from kvtune.policies.method import methods
from kvtune.policies.signals import Signals
from kvtune.policies.slot_prompt import prompt_of
from kvtune.policies.slots import SlotCache
from kvtune.policies.testing.cases import Case, shared_signals, uniform

STEPS = 15
DECODE_CASES = (
    Case(1, 0), Case(1, 1, group=3), Case(2, 1), Case(5, 3, group=4), Case(5, 5), Case(7, 12),
    Case(33, 0), Case(33, 1, kv_heads=3), Case(33, 6, kv_heads=3, group=3), Case(47, 40, group=3),
    Case(61, 64), Case(61, 500),
)  # fmt: skip


def decode_methods() -> dict[str, type[DecodeMethod]]:
    """Every method that evicts while decoding, by name."""
    return {name: kind for name, kind in methods().items() if issubclass(kind, DecodeMethod)}


def generated(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[T, H, G, D]``, keys and values ``[T, H, D]`` of the tokens after the prompt."""
    shape = (STEPS, case.kv_heads)
    queries = uniform(case.seed + 2, *shape, case.group, case.head_dim)
    keys, values = uniform(case.seed + 3, 2, *shape, case.head_dim)
    return queries, keys, values


def opened(
    method: DecodeMethod, case: Case, *budgets: int, signals: Signals | None = None
) -> SlotCache:
    """A cache that holds the case's prompt, a row for each budget (the case's unless given)."""
    signals = shared_signals(case) if signals is None else signals
    each = np.array([[budget] * case.kv_heads for budget in budgets or (case.budget,)])
    return SlotCache(method, prompt_of(method, signals, each), signals, each, STEPS)


def steps(cache: SlotCache, tokens: tuple[Tensor, Tensor, Tensor]) -> Iterator[Tensor]:
    """Step a cache through tokens; all its rows read the same."""
    rows = len(cache.sizes)
    for query, key, value in zip(*tokens, strict=True):
        yield cache.step(*(x.expand(rows, *x.shape) for x in (query, key, value)))


def stays_within_the_budget(method: DecodeMethod, case: Case) -> None:
    """After an eviction no head holds more than its budget; before one, no more than declared."""
    cache = opened(method, case)
    most = method.most(int(cache.sizes[0, 0]), case.budget)
    evicted = cache.evicted.copy()
    for _ in steps(cache, generated(case)):
        assert (cache.peak <= most).all()
        assert (cache.sizes[cache.evicted > evicted] <= case.budget).all()
        evicted = cache.evicted.copy()


def counts_are_conserved(method: DecodeMethod, case: Case) -> None:
    """What was kept and what entered is what is live and what left, and each is there once."""
    cache = opened(method, case)
    held = cache.sizes.copy()
    for entered, _ in enumerate(steps(cache, generated(case)), start=1):
        cache.check_integrity()
        assert (held + entered == cache.sizes + cache.evicted).all()


def protected_tokens_stay(method: DecodeMethod, case: Case) -> None:
    """The first and the last tokens that the method protects are live after every step."""
    cache = opened(method, case)
    first, last = (int(each[0, 0, 0]) for each in method.pin(cache.budgets, "cpu"))
    assert first + last <= case.budget
    for _ in steps(cache, generated(case)):
        now = cache.state.now
        pinned = {*range(min(first, now + 1)), *range(max(0, now + 1 - last), now + 1)}
        for held in cache.kept()[0]:
            assert pinned <= set(held), f"{sorted(pinned - set(held))} left"


def both_halves_choose_alike(method: DecodeMethod, case: Case) -> None:
    """What leaves a whole prompt is what ``keep`` does not name."""
    signals = shared_signals(case)
    state = method.open(signals)
    budget = min(case.budget, case.prompt_tokens)
    budgets = np.full((1, case.kv_heads), budget)
    state = replace(state, pinned=method.pin(budgets, "cpu"))
    drops = torch.full((1, case.kv_heads), case.prompt_tokens - budget)
    leaving = method.leaving(state, drops)[0]
    kept = torch.zeros_like(leaving).scatter(1, method.keep(signals, budget), value=True)
    assert torch.equal(leaving, ~kept)


def decoding_is_the_same_again(method: DecodeMethod, case: Case) -> None:
    """Nothing is remembered between runs, and other budgets in the batch change nothing."""
    alone = opened(method, case)
    together = opened(method, case, case.budget + 3, case.budget)
    for one, two in zip(
        steps(alone, generated(case)), steps(together, generated(case)), strict=True
    ):
        torch.testing.assert_close(one[0], two[1], rtol=1e-4, atol=1e-5)
    assert alone.kept()[0] == together.kept()[1]


def heads_decode_alone(method: DecodeMethod, case: Case) -> None:
    """Permuting the heads permutes what they keep."""
    if not method.heads_are_alike:
        return
    order = torch.arange(case.kv_heads - 1, -1, -1)
    signals, tokens = shared_signals(case), generated(case)
    by_head = signals.queries.unflatten(0, (case.kv_heads, -1))
    turned = replace(
        signals,
        queries=by_head[order].flatten(0, 1),
        keys=signals.keys[order],
        values=signals.values[order],
        _memo={},
    )
    straight, permuted = opened(method, case), opened(method, case, signals=turned)
    list(steps(straight, tokens))
    list(steps(permuted, (tokens[0][:, order], tokens[1][:, order], tokens[2][:, order])))
    assert permuted.kept()[0] == straight.kept()[0][::-1]


def room_for_all_changes_nothing(method: DecodeMethod, case: Case) -> None:
    """With a budget for prompt and generated tokens, the output is that of the full cache."""
    signals, (queries, keys, values) = shared_signals(case), generated(case)
    cache = opened(method, case, case.prompt_tokens + STEPS)
    for step, output in enumerate(steps(cache, (queries, keys, values)), start=1):
        all_keys = torch.cat((signals.keys, keys[:step].transpose(0, 1)), 1)[:, None]
        all_values = torch.cat((signals.values, values[:step].transpose(0, 1)), 1)[:, None]
        full, _ = attend(queries[step - 1][:, :, None], all_keys, all_values, None, signals.scale)
        torch.testing.assert_close(output[0], full[:, :, 0], rtol=1e-4, atol=1e-5)
    assert not cache.evicted.any()


def observing_changes_statistics_only(method: DecodeMethod, case: Case) -> None:
    """Neither the attention nor the positions; and the worth of what is live is finite."""
    cache = opened(method, case)
    list(steps(cache, generated(case)))
    state = cache.state
    positions = state.positions.clone()
    attention = state.live[:, :, None].float().expand(-1, -1, case.group, -1)
    attention = attention / attention.sum(-1, keepdim=True).clamp_min(1)
    given = attention.clone()
    method.observe(state, attention)
    assert torch.equal(attention, given)
    assert torch.equal(state.positions, positions)
    assert method.worth(state)[positions != FREE].isfinite().all()


def statistics_of_the_new_token_are_its_own(method: DecodeMethod, case: Case) -> None:
    """What is known of a token from its key alone is known of a generated token as well.

    Such a statistic changes with the token's own key and with no other's. Of a token that enters,
    it must be what it would have been of the same token in the prompt.
    """
    if case.prompt_tokens < 3:
        return
    signals = shared_signals(case)
    other_key = signals.keys.clone()
    other_key[:, 0] = 2 * other_key[:, 0] + 1
    changed = replace(signals, keys=other_key, _memo={})
    asked = replace(signals, queries=signals.queries.flip(-1) + 1, _memo={})
    held, otherwise, asked_otherwise = map(method.statistics, (signals, changed, asked))
    alone = [
        name
        for name, each in held.items()
        if torch.equal(each, asked_otherwise[name])
        and not torch.equal(each[:, 0], otherwise[name][:, 0])
        and torch.equal(each[:, 1:], otherwise[name][:, 1:])
    ]
    _, keys, values = generated(case)
    longer = replace(
        signals,
        queries=torch.cat([signals.queries, signals.queries[:, -1:]], 1),
        keys=torch.cat([signals.keys, keys[0][:, None]], 1),
        values=torch.cat([signals.values, values[0][:, None]], 1),
        reconstruction=None,
        linked=None,
        future=None,
        _memo={},
    )
    expected = method.statistics(longer)
    cache = opened(method, case, case.prompt_tokens)
    slot = cache.state.positions.argmin(-1, keepdim=True)
    cache.driver.prepare()
    cache.driver.enter(slot, keys[0][None], values[0][None])
    for name in alone:
        entered = cache.state.statistics[name]
        at = slot.reshape(*slot.shape, *(1,) * (entered.dim() - 3))
        found = entered.gather(2, at.expand(*slot.shape, *entered.shape[3:]))[0, :, 0]
        torch.testing.assert_close(found, expected[name][:, -1])


DecodeCheck = Callable[[DecodeMethod, Case], None]
DECODE_CHECKS: tuple[DecodeCheck, ...] = (
    stays_within_the_budget,
    counts_are_conserved,
    protected_tokens_stay,
    both_halves_choose_alike,
    decoding_is_the_same_again,
    heads_decode_alone,
    room_for_all_changes_nothing,
    observing_changes_statistics_only,
    statistics_of_the_new_token_are_its_own,
)
