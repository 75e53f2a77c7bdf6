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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocator import Allocator
from kvtune.policies.format import Format, Role, formats
from kvtune.policies.method import Method, ScoredMethod, methods
from kvtune.policies.signals import Signals

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
    return Signals(queries, keys, values, case.head_dim**-0.5)


def lean_signals(method: Method, full: Signals) -> Signals:
    """Only what the method says that it needs: a shorter tail of queries, recorded sums."""
    window = min(method.needs.window, full.prompt_tokens)
    tail = full.queries[:, full.prompt_tokens - window :]
    sums = full.column_sums().flatten(0, 1) if method.needs.column_sums else None
    return Signals(tail, full.keys, full.values, full.scale, sums)


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
    signals = make_signals(case)
    order = torch.arange(case.kv_heads - 1, -1, -1)
    grouped = signals.queries.reshape(case.kv_heads, case.group, *signals.queries.shape[1:])
    queries = grouped[order].flatten(0, 1)
    permuted = Signals(queries, signals.keys[order], signals.values[order], signals.scale)
    kept = method.keep(signals, case.budget)
    assert torch.equal(method.keep(permuted, case.budget), kept[order])


def needs_are_honest(method: Method, case: Case) -> None:
    """Given only what ``needs`` names, the choice is that of the full signals."""
    full = make_signals(case)
    lean = lean_signals(method, full)
    assert torch.equal(method.keep(lean, case.budget), method.keep(full, case.budget))


MethodCheck = Callable[[Method, Case], None]
METHOD_CHECKS: tuple[MethodCheck, ...] = (
    keeps_ascending_indices_within_the_budget,
    keeps_protected_tokens,
    keeps_the_highest_scores,
    choice_is_the_same_again,
    heads_choose_alone,
    needs_are_honest,
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
