"""What every method must hold to: budgets, protected tokens, honest needs, declared work."""

# ruff: noqa: S101
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.policies import ragged
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import Method, ScoredMethod
from kvtune.policies.option import Option
from kvtune.policies.paging import Growth, head_bytes
from kvtune.policies.parts import VIRTUAL, entries_of
from kvtune.policies.reader import Held
from kvtune.policies.testing.cases import (
    Case,
    lean_signals,
    make_signals,
    permuted_signals,
    shared_signals,
    side_by_side,
)
from kvtune.policies.work import LayerShape

METHOD_CASES = (
    Case(1, 0), Case(1, 1, group=3), Case(1, 9), Case(2, 1), Case(5, 3, group=4), Case(5, 5),
    Case(33, 0), Case(33, 1, kv_heads=3), Case(33, 6), Case(47, 34, group=3), Case(47, 40),
    Case(61, 60, group=4), Case(61, 61), Case(61, 500), Case(101, 64, kv_heads=3, group=3),
)  # fmt: skip
LONG = Case(301, 64, group=3)
"""Longer than a tile of attention; for the published settings alone, since it takes longest."""


def keeps_ascending_indices_within_the_budget(method: Method, case: Case) -> None:
    """As many different tokens a head as planned, in order, all of the prompt."""
    kept = method.keep(shared_signals(case), case.budget)
    count = min(case.budget, case.prompt_tokens)
    if type(method).parts is Method.parts or method.reader(case.budget) is not None:
        count = entries_of(method.plan(case.budget, case.prompt_tokens))
    assert kept.dtype == torch.int64
    assert kept.shape == (case.kv_heads, count), (
        "the budget is to be used to the full, never beyond"
    )
    assert (kept.diff(dim=-1) > 0).all(), "indices ascend and are unique"
    assert count == 0 or (kept.min() >= 0 and kept.max() < case.prompt_tokens)


def keeps_protected_tokens(method: Method, case: Case) -> None:
    """Sinks first, then the recent window, as far as the budget reaches."""
    if not isinstance(method, ScoredMethod):
        return
    kept = method.keep(shared_signals(case), case.budget)
    budget = min(case.budget, case.prompt_tokens)
    first, last = method.protected(budget)
    first = min(first, budget)
    last = min(last, budget - first)
    pinned = {*range(first), *range(case.prompt_tokens - last, case.prompt_tokens)}
    for row in kept.tolist():
        assert pinned <= set(row), f"{sorted(pinned - set(row))} were dropped"


def keeps_the_highest_scores(method: Method, case: Case) -> None:
    """No token that was dropped scores higher than one that was kept for its score."""
    if not isinstance(method, ScoredMethod):
        return
    signals = shared_signals(case)
    scores = method.scores(signals)
    assert scores.shape == (case.kv_heads, case.prompt_tokens)
    assert scores.isfinite().all()
    ranked = method.ranked(signals, min(case.budget, case.prompt_tokens))
    for row, chosen in zip(ranked, method.keep(signals, case.budget), strict=True):
        dropped = torch.ones_like(row, dtype=torch.bool)
        dropped[chosen] = False
        if dropped.any() and len(chosen):
            assert row[chosen].min() >= row[dropped].max()


def choice_is_the_same_again(method: Method, case: Case) -> None:
    """Nothing is drawn at random, remembered, or changed in the signals."""
    signals, untouched = shared_signals(case), make_signals(case)
    first, second = (method.keep(signals, case.budget) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, method.keep(make_signals(case), case.budget))
    for name in ("queries", "keys", "values"):
        assert torch.equal(getattr(signals, name), getattr(untouched, name)), f"{name} were changed"


def heads_choose_alone(method: Method, case: Case) -> None:
    """Permuting the heads permutes the choice."""
    if not method.heads_are_alike:
        return
    signals = shared_signals(case)
    order = torch.arange(case.kv_heads - 1, -1, -1)
    kept = method.keep(signals, case.budget)
    assert torch.equal(method.keep(permuted_signals(signals, order), case.budget), kept[order])


def prompts_choose_alone(method: Method, case: Case) -> None:
    """Asked of two prompts side by side, as if they were heads of one, each keeps what it would."""
    if method.looks_across_heads or method.looks_ahead or not method.heads_are_alike:
        return
    each = shared_signals(case), make_signals(replace(case, seed=case.seed + 10))
    together = side_by_side(*each)
    kept = method.keep(together, case.budget)
    alone = [method.keep(signals, case.budget) for signals in each]
    assert torch.equal(kept, torch.cat(alone))
    merged = method.merge(together, kept)
    for side, merged_alone in enumerate(map(method.merge, each, alone)):
        assert (merged is None) == (merged_alone is None)
        if merged is not None and merged_alone is not None:
            for ours, theirs in zip(merged, merged_alone, strict=True):
                assert torch.allclose(ours.chunk(2)[side], theirs, atol=1e-6)


def budgets_of_heads_are_kept_in_one_pass(method: Method, case: Case) -> None:
    """Heads of different budgets, and of a shorter prompt, each keep what they would alone."""
    if not (isinstance(method, ScoredMethod) and method.ranks_alone):
        return
    shorter = replace(case, prompt_tokens=max(1, case.prompt_tokens // 2))
    both = shared_signals(case), shared_signals(shorter)
    scores, limits, budgets = [], [], []
    for signals in both:
        most, tokens = min(case.budget, signals.prompt_tokens), signals.prompt_tokens
        theirs = [max(0, most - 2 * head) for head in range(case.kv_heads)]
        padding = (0, case.prompt_tokens - tokens)
        scores.append(F.pad(method.scores_once(signals), padding, value=-torch.inf))
        limits.append(torch.from_numpy(ragged.limits(method, theirs, tokens)))
        budgets += theirs
    found = ragged.keep_each(torch.cat(scores), torch.cat(limits), sum(budgets)).split(budgets)
    for number, (budget, kept) in enumerate(zip(budgets, found, strict=True)):
        prompt, head = divmod(number, case.kv_heads)
        assert torch.equal(kept, method.keep(both[prompt], budget)[head])


def parts_are_as_planned(method: Method, case: Case) -> None:
    """As many parts, of the sizes foretold; every token once at most, in order; finite entries."""
    signals = shared_signals(case)
    parts = method.parts(signals, case.budget)
    assert [part.plan for part in parts] == list(method.plan(case.budget, case.prompt_tokens))
    for part in parts:
        virtual = part.tokens == VIRTUAL
        ascending = part.tokens.diff(dim=-1) > 0
        assert (ascending | virtual[:, 1:]).all()
        for own, whole in ((part.keys, signals.keys), (part.values, signals.values)):
            assert own is not None or not virtual.any(), "a virtual entry has no token's own key"
            if own is not None:
                assert own.shape == (*part.tokens.shape, case.head_dim)
                assert own.dtype == whole.dtype
                assert own.isfinite().all()
        assert part.log_weight is None or part.log_weight.isfinite().all()
    held = torch.cat([part.tokens for part in parts], -1)
    for row in held.tolist():
        real = [token for token in row if token != VIRTUAL]
        assert len(set(real)) == len(real), "a token lies in two parts"
        assert all(0 <= token < case.prompt_tokens for token in real)


def parts_are_the_same_again(method: Method, case: Case) -> None:
    """Parts of the same prompt are the same, and making them changes no signal."""
    signals, untouched = shared_signals(case), make_signals(case)
    for first, second in zip(
        method.parts(signals, case.budget), method.parts(untouched, case.budget), strict=True
    ):
        for each in ("tokens", "keys", "values", "log_weight", "balance"):
            one, other = getattr(first, each), getattr(second, each)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    for name in ("queries", "keys", "values"):
        assert torch.equal(getattr(signals, name), getattr(make_signals(case), name))


def reader_selects_real_blocks(method: Method, case: Case) -> None:
    """A reader reads no more than it says, the last entry always, and nothing that is not there."""
    reader = method.reader(case.budget)
    if reader is None:
        return
    tokens = entries_of(method.plan(case.budget, case.prompt_tokens))
    for count in sorted({tokens, max(tokens - 1, 1), 1} if tokens else ()):
        held, queries = _held(method, case, tokens, count)
        reads = reader.reads(held, queries)
        real = reads[..., :count].sum(-1)
        assert reads.shape == (case.kv_heads, queries.shape[2], tokens)
        assert reader.is_scheduled or (real <= reader.entries_read(count)).all()
        assert reads[..., count - 1].all()
        assert torch.equal(reads, reader.reads(held, queries))
    assert reader.index_bytes(tokens, case.head_dim) >= 0
    assert reader.scanned_bytes(tokens, case.head_dim, 2 * tokens * case.head_dim) >= 0


def _held(method: Method, case: Case, entries: int, count: int) -> tuple[Held, Tensor]:
    """What a reader is shown of the case, of which only ``count`` entries are real; its queries."""
    signals = lean_signals(method, shared_signals(case))
    heads, numbers = case.kv_heads, torch.arange(case.kv_heads)
    tokens = torch.arange(entries).expand(heads, -1)
    junk = shared_signals(case).keys[:, :1].repeat(1, entries, 1)
    mine = min(entries, case.prompt_tokens)
    junk[:, :mine] = signals.keys[:, :mine]
    junk[:, count:] = 1e9
    counts, policies = torch.full((heads,), count), torch.zeros_like(numbers)
    held = Held(junk, counts, tokens, numbers, policies, signals, case.prompt_tokens)
    queries = shared_signals(case).queries[:, -5:].unflatten(0, (heads, -1))
    return held, queries


def needs_are_honest(method: Method, case: Case) -> None:
    """Given only what ``needs`` names, the choice is that of the full signals."""
    full = shared_signals(case)
    lean = lean_signals(method, full)
    assert torch.equal(method.keep(lean, case.budget), method.keep(full, case.budget))
    for ours, theirs in zip(
        method.parts(lean, case.budget), method.parts(full, case.budget), strict=True
    ):
        assert torch.equal(ours.tokens, theirs.tokens)
        for each in ("keys", "values", "log_weight", "balance"):
            one, other = getattr(ours, each), getattr(theirs, each)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def merging_changes_only_what_is_kept(method: Method, case: Case) -> None:
    """One finite key and value for every kept token; nothing in the signals changes."""
    signals = shared_signals(case)
    kept = method.keep(signals, case.budget)
    merged = method.merge(signals, kept)
    if merged is None:
        return
    fresh = make_signals(case)
    for stored, whole in zip(merged, (signals.keys, signals.values), strict=True):
        assert stored.shape == (*kept.shape, case.head_dim)
        assert stored.dtype == whole.dtype
        assert stored.isfinite().all()
    assert torch.equal(signals.keys, fresh.keys)
    assert torch.equal(signals.values, fresh.values)
    for first, again in zip(merged, method.merge(signals, kept) or (), strict=True):
        assert torch.equal(first, again)


def work_is_declared(method: Method, case: Case) -> None:
    """Costs are finite and never negative, and no prompt costs less for being longer."""
    shape = LayerShape(case.prompt_tokens, case.kv_heads * case.group, case.kv_heads, case.head_dim)
    ours = method.work(shape, case.budget)
    longer = method.work(replace(shape, prompt_tokens=2 * case.prompt_tokens), case.budget)
    for each in fields(ours):
        value = getattr(ours, each.name)
        assert math.isfinite(value)
        assert 0 <= value <= getattr(longer, each.name)


def shorter_prompts_take_no_more_bytes(method: Method, case: Case) -> None:
    """With as many tokens, or all of its own: budgets with a floor are reserved by this."""
    option, tokens = Option(method), range(1, case.prompt_tokens + 1)
    held = [option.footprint(min(case.budget, n), n, case.head_dim) for n in tokens]
    assert held == sorted(held), "a shorter prompt with the same budget takes more bytes"
    for form in (Bf16(), Int4(), Int4(exact_first=4)) if method.stores_whole_prompts_alike else ():
        option = Option(method, keys=form, values=form)
        paged = [head_bytes(option, min(case.budget, n), n, 64, Growth(1)) for n in tokens]
        assert max(paged, default=0) <= (paged[-1] if paged else 0), (
            f"a shorter prompt in {form.label} takes more bytes of pages: a method whose "
            "stores_whole_prompts_alike is False gets no floor"
        )


MethodCheck = Callable[[Method, Case], None]
METHOD_CHECKS: tuple[MethodCheck, ...] = (
    keeps_ascending_indices_within_the_budget,
    keeps_protected_tokens,
    keeps_the_highest_scores,
    choice_is_the_same_again,
    heads_choose_alone,
    prompts_choose_alone,
    budgets_of_heads_are_kept_in_one_pass,
    parts_are_as_planned,
    parts_are_the_same_again,
    reader_selects_real_blocks,
    needs_are_honest,
    merging_changes_only_what_is_kept,
    work_is_declared,
    shorter_prompts_take_no_more_bytes,
)
