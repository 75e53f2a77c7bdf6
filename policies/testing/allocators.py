"""What every allocator must hold to: it moves tokens and makes none."""

# ruff: noqa: S101
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from kvtune.policies.allocator import Allocator
from kvtune.policies.method import ScoredMethod, methods
from kvtune.policies.signals import Signals
from kvtune.policies.testing.cases import Case, shared_signals


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
    method = next(_scoring())
    rows = [[method] * case.kv_heads] * 3

    def prompt(layer: int) -> Signals:
        return shared_signals(replace(case, seed=case.seed + layer))

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
    signals = shared_signals(case)
    for method in _scoring():
        shared = [method] * case.kv_heads
        split = allocator.split(given, shared, signals)
        assert sum(split) == sum(given)
        assert min(split) >= 0
        assert max(split) <= case.prompt_tokens
        assert split == allocator.split(given, shared, signals)


def _scoring() -> Iterator[ScoredMethod]:
    """Every method whose scores say something of the tokens, as published."""
    for kind in methods().values():
        if issubclass(kind, ScoredMethod) and kind.shape == "scored":
            yield kind()


AllocatorCheck = Callable[[Allocator, Case], None]
ALLOCATOR_CHECKS: tuple[AllocatorCheck, ...] = (
    planning_moves_but_never_makes_tokens,
    settling_moves_but_never_makes_tokens,
    splitting_moves_but_never_makes_tokens,
)
