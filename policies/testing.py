"""What every method, format and allocator must hold to: a suite that new ones get for free.

Each check is a function of one thing and one case; it raises AssertionError with the reason. With
pytest, for a class of your own::

    @pytest.mark.parametrize("case", METHOD_CASES, ids=str)
    @pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
    def test_mine(check, case):
        check(Mine(), case)

``python -m kvtune.policies.testing`` prints the golden choices as JSON.
"""

# ruff: noqa: S101
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocator import Allocator
from kvtune.policies.format import Format, Role, formats
from kvtune.policies.method import Method, ScoredMethod, methods
from kvtune.policies.signals import Future, Signals
from kvtune.policies.work import LayerShape

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """A prompt of one layer and a budget.

    Args:
        prompt_tokens: P.
        budget: tokens a head.
        kv_heads: H.
        group: query heads that share a KV head.
        seed: of the tensors.
        head_dim: D.
    """

    prompt_tokens: int
    budget: int
    kv_heads: int = 2
    group: int = 1
    seed: int = 0
    head_dim: int = 16

    def __str__(self) -> str:
        """Short, for test ids."""
        return f"p{self.prompt_tokens}-b{self.budget}-h{self.kv_heads}x{self.group}"


METHOD_CASES = (
    Case(1, 0), Case(1, 1, group=3), Case(1, 9), Case(2, 1), Case(5, 3, group=4), Case(5, 5),
    Case(33, 0), Case(33, 1, kv_heads=3), Case(33, 6), Case(47, 34, group=3), Case(47, 40),
    Case(101, 100, group=4), Case(101, 101), Case(101, 500), Case(301, 64, kv_heads=3, group=3),
)  # fmt: skip


@dataclass(frozen=True)
class PlainRope:
    """A rotary embedding as signals carry it."""

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0


TOKENS = (0, 1, 2, 7, 31, 64, 65, 130)


def uniform(seed: int, *shape: int) -> Tensor:
    """Numbers in [-2, 2), float32; the same on every machine."""
    drawn = np.random.default_rng(seed).random(shape)
    return torch.from_numpy(drawn * 4 - 2).float()


def make_signals(case: Case) -> Signals:
    """A layer's prompt with attention that differs between heads and tokens."""
    shape = (case.prompt_tokens, case.head_dim)
    queries = uniform(case.seed, case.kv_heads * case.group, *shape)
    keys, values = uniform(case.seed + 1, 2, case.kv_heads, *shape)
    return Signals(
        queries,
        keys,
        values,
        case.head_dim**-0.5,
        layer=case.seed % 5,
        rope=PlainRope(tuple(100.0 ** (-pair / 4) for pair in range(case.head_dim // 2))),
        reconstruction=uniform(case.seed + 2, case.kv_heads, case.prompt_tokens).square(),
        head_scores=uniform(case.seed + 3, case.kv_heads * case.group).square(),
        layer_error=0.1 + case.seed % 7 / 10,
        future=make_future(case),
    )


def make_future(case: Case, observed: int = 7, probes: int = 3) -> Future:
    """Observed tokens after the prompt, and probes at them."""
    shape = (observed, case.head_dim)
    keys, values = uniform(case.seed + 5, 2, case.kv_heads, *shape)
    gradients = uniform(case.seed + 6, probes, observed, case.kv_heads * case.group, case.head_dim)
    queries = uniform(case.seed + 4, case.kv_heads * case.group, *shape)
    return Future(queries, keys, values, gradients)


def lean_signals(method: Method, full: Signals) -> Signals:
    """Only what the method says that it needs: a shorter tail of queries, recorded sums."""
    needs = method.needs
    window = min(needs.window, full.prompt_tokens)
    tail = full.queries[:, full.prompt_tokens - window :]
    moments = tuple(part.flatten(0, 1) for part in full.query_moments())
    future = full.future
    if future is not None and not needs.probes:
        future = replace(future, probes=None)
    return Signals(
        tail,
        full.keys,
        full.values,
        full.scale,
        full.column_sums().flatten(0, 1) if needs.column_sums else None,
        layer=full.layer,
        rope=full.rope,
        recorded_query_moments=(moments[0], moments[1]) if needs.query_moments else None,
        reconstruction=full.reconstruction if needs.reconstruction else None,
        head_scores=full.head_scores if needs.calibration else None,
        layer_error=full.layer_error if needs.calibration else None,
        future=future if needs.future else None,
    )


def permuted_signals(full: Signals, order: Tensor) -> Signals:
    """The same layer with its KV heads, and their groups of query heads, in another order."""
    group = full.queries.shape[0] // len(order)
    queries = (order[:, None] * group + torch.arange(group)).flatten()
    future = full.given("future")
    return replace(
        full,
        queries=full.queries[queries],
        keys=full.keys[order],
        values=full.values[order],
        reconstruction=full.given("reconstruction")[order],
        head_scores=full.given("head_scores")[queries],
        future=Future(
            future.queries[queries],
            future.keys[order],
            future.values[order],
            full.probes()[:, :, queries],
        ),
        _memo={},
    )


def variants(kind: type[T]) -> Iterator[T]:
    """The default, then one parameter at a time at its bounds, beyond its default, or in words."""
    yield kind()
    hints = get_type_hints(kind)
    for each in fields(kind):  # type: ignore[arg-type]
        bounds = (each.metadata.get("low"), each.metadata.get("high"))
        values: list[Any] = [value for value in bounds if value is not None]
        if get_origin(hints[each.name]) is Literal:
            values += get_args(hints[each.name])
        if isinstance(each.default, int) and not isinstance(each.default, bool):
            values.append(2 * each.default + 1)
        for value in values:
            try:
                yield kind(**{each.name: value})
            except KvtuneError:
                continue  # a rule between values forbids it


# Methods


def keeps_ascending_indices_within_the_budget(method: Method, case: Case) -> None:
    """Exactly ``min(budget, P)`` different tokens a head, in order, all of the prompt."""
    kept = method.keep(make_signals(case), case.budget)
    count = min(case.budget, case.prompt_tokens)
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
    kept = method.keep(make_signals(case), case.budget)
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
    signals = make_signals(case)
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
    signals = make_signals(case)
    first, second = (method.keep(signals, case.budget) for _ in range(2))
    fresh = make_signals(case)
    assert torch.equal(first, second)
    assert torch.equal(first, method.keep(fresh, case.budget))
    for name in ("queries", "keys", "values"):
        assert torch.equal(getattr(signals, name), getattr(fresh, name)), f"{name} were changed"


def heads_choose_alone(method: Method, case: Case) -> None:
    """Permuting the heads permutes the choice."""
    if not method.heads_are_alike:
        return
    signals = make_signals(case)
    order = torch.arange(case.kv_heads - 1, -1, -1)
    kept = method.keep(signals, case.budget)
    assert torch.equal(method.keep(permuted_signals(signals, order), case.budget), kept[order])


def needs_are_honest(method: Method, case: Case) -> None:
    """Given only what ``needs`` names, the choice is that of the full signals."""
    full = make_signals(case)
    lean = lean_signals(method, full)
    assert torch.equal(method.keep(lean, case.budget), method.keep(full, case.budget))


def merging_changes_only_what_is_kept(method: Method, case: Case) -> None:
    """One finite key and value for every kept token; nothing in the signals changes."""
    signals, fresh = make_signals(case), make_signals(case)
    kept = method.keep(signals, case.budget)
    merged = method.merge(signals, kept)
    if merged is None:
        return
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


MethodCheck = Callable[[Method, Case], None]
METHOD_CHECKS: tuple[MethodCheck, ...] = (
    keeps_ascending_indices_within_the_budget,
    keeps_protected_tokens,
    keeps_the_highest_scores,
    choice_is_the_same_again,
    heads_choose_alone,
    needs_are_honest,
    merging_changes_only_what_is_kept,
    work_is_declared,
)

# Formats


def footprint_grows_with_tokens(form: Format, role: Role) -> None:
    """Nothing for nothing, never less for more."""
    sizes = [form.footprint(tokens, 64, role) for tokens in range(140)]
    assert sizes[0] == 0
    assert all(isinstance(size, int) for size in sizes)
    assert sizes == sorted(sizes)


def roundtrip_keeps_shape_and_stays_close(form: Format, role: Role) -> None:
    """Same shape and dtype, finite, and every error below half of the head's range."""
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            tensor = uniform(tokens, 3, tokens, 64).to(dtype)
            stored = form.roundtrip(tensor, torch.full((3,), tokens), role)
            assert stored.shape == tensor.shape
            assert stored.dtype == dtype
            assert stored.isfinite().all()
            assert ((stored - tensor).abs() <= 2.0).all()


def padding_never_matters(form: Format, role: Role) -> None:
    """What lies beyond the counts changes nothing, whatever it holds."""
    counts = torch.tensor([0, 1, 33, 70])
    tensor = uniform(5, 4, 70, 32)
    real = torch.arange(70) < counts[:, None]
    clean = form.roundtrip(tensor, counts, role)[real]
    for junk in (float("nan"), float("inf"), 1e30):
        spoilt = tensor.masked_fill(~real[..., None], junk)
        assert torch.equal(form.roundtrip(spoilt, counts, role)[real], clean)
    for row, count in enumerate(counts.tolist()):
        alone = form.roundtrip(tensor[row : row + 1, :count], counts[row : row + 1], role)
        assert torch.equal(alone, form.roundtrip(tensor, counts, role)[row : row + 1, :count])


def constant_tensors_come_back(form: Format, role: Role) -> None:
    """A group without spread needs no codes; zeros stay zeros."""
    for value in (0.0, 1.5, -(2.0**-20)):
        tensor = torch.full((2, 37, 48), value)
        stored = form.roundtrip(tensor, torch.tensor([37, 20]), role)[1, :20]
        torch.testing.assert_close(stored, tensor[1, :20], rtol=2**-4, atol=1e-7)
    assert (form.roundtrip(torch.zeros(1, 8, 32), torch.tensor([8]), role) == 0).all()


def storing_twice_changes_little(form: Format, role: Role) -> None:
    """Storing what was read back adds only rounding of scales."""
    tensor, counts = uniform(3, 2, 50, 32), torch.tensor([50, 41])
    once = form.roundtrip(tensor, counts, role)
    twice = form.roundtrip(once, counts, role)
    real = torch.arange(50) < counts[:, None]
    torch.testing.assert_close(twice[real], once[real], rtol=2**-6, atol=2**-6)


FormatCheck = Callable[[Format, Role], None]
FORMAT_CHECKS: tuple[FormatCheck, ...] = (
    footprint_grows_with_tokens,
    roundtrip_keeps_shape_and_stays_close,
    padding_never_matters,
    constant_tensors_come_back,
    storing_twice_changes_little,
)

# Allocators


def planning_moves_but_never_makes_tokens(allocator: Allocator, case: Case) -> None:
    """Same sum, nobody below zero or beyond the prompt, same answer again."""
    rng = np.random.default_rng(case.seed)
    given = rng.integers(0, min(case.budget, case.prompt_tokens) + 1, (5, case.kv_heads))
    planned = allocator.plan(given.copy(), case.prompt_tokens)
    assert planned.shape == given.shape
    assert planned.dtype == np.int64
    assert planned.sum() == given.sum()
    assert planned.min() >= 0
    assert planned.max() <= case.prompt_tokens
    assert (planned == allocator.plan(given.copy(), case.prompt_tokens)).all()


def settling_moves_but_never_makes_tokens(allocator: Allocator, case: Case) -> None:
    """The same over all layers when the whole prompt has been seen."""
    ceiling = min(case.budget, case.prompt_tokens)
    given = np.random.default_rng(case.seed).integers(0, ceiling + 1, (3, case.kv_heads))
    method = next(kind() for kind in methods().values() if issubclass(kind, ScoredMethod))
    rows = [[method] * case.kv_heads] * 3

    def prompt(layer: int) -> Signals:
        return make_signals(replace(case, seed=case.seed + layer))

    settled = allocator.settle(given.copy(), rows, prompt)
    assert settled.shape == given.shape
    assert settled.dtype == np.int64
    assert settled.sum() == given.sum()
    assert settled.min() >= 0
    assert settled.max() <= case.prompt_tokens
    assert (settled == allocator.settle(given.copy(), rows, prompt)).all()


def splitting_moves_but_never_makes_tokens(allocator: Allocator, case: Case) -> None:
    """The same for one layer whose prompt has been seen, under every scoring method."""
    ceiling = min(case.budget, case.prompt_tokens)
    given = np.random.default_rng(case.seed).integers(0, ceiling + 1, case.kv_heads).tolist()
    for kind in methods().values():
        method = kind()
        if not isinstance(method, ScoredMethod):
            continue
        shared = [method] * case.kv_heads
        split = allocator.split(given, shared, make_signals(case))
        assert sum(split) == sum(given)
        assert min(split) >= 0
        assert max(split) <= case.prompt_tokens
        assert split == allocator.split(given, shared, make_signals(case))


AllocatorCheck = Callable[[Allocator, Case], None]
ALLOCATOR_CHECKS: tuple[AllocatorCheck, ...] = (
    planning_moves_but_never_makes_tokens,
    settling_moves_but_never_makes_tokens,
    splitting_moves_but_never_makes_tokens,
)

# Golden choices


def golden() -> dict[str, Any]:
    """Which tokens each method keeps of a fixed prompt, as hashes, and each format's bytes."""
    case = Case(prompt_tokens=211, budget=0, kv_heads=3, group=3, seed=20)
    budgets = (1, 16, 33, 64, 200)
    return {
        "remake": "python -m kvtune.policies.testing > tests/golden/policies.json",
        "kept": {
            name: {
                str(budget): _digest(kind().keep(make_signals(case), budget)) for budget in budgets
            }
            for name, kind in sorted(methods().items())
        },
        "bytes_of_100_tokens_of_64": {
            name: [kind().footprint(100, 64, "keys"), kind().footprint(100, 64, "values")]
            for name, kind in sorted(formats().items())
        },
    }


def _digest(indices: Tensor) -> str:
    return hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps(golden(), indent=2))
