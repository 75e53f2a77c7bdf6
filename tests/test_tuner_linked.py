"""Links in a search: both layers of a pair have one, or neither; all other heads are free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.minicache import MiniCache
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy_file.document import PolicyDocument, write_policy
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.exchange import Choice
from kvtune.tuner.head_points import head_points
from kvtune.tuner.linked import exchange_unlinked, is_linked, solve_pairs
from kvtune.tuner.question import Question
from kvtune.tuner.simple_points import simple_points
from kvtune.tuner.solver import Solver
from kvtune.tuner.starts import start_points
from kvtune.tuner.study import run_study

LAYERS, HEADS, D, P = 4, 2, 16, 256
LINKS = (
    Option(MiniCache(), Budget(share=1 / 16)),
    Option(MiniCache(), Budget(share=1 / 4), Int4(), Int4()),
)
FULL = 4 * P * D * LAYERS * HEADS
ROOM, AT_ONCE = 2 * FULL, 3  # linked layers wait for a prompt, most of it uncompressed


@pytest.fixture(scope="module")
def tables(make_tables: Callable[..., Tables]) -> Tables:
    """Two of the options are links, which lose little: without a rule they would be anywhere."""
    made = make_tables(layers=LAYERS, kv_heads=HEADS, seed=3)
    factor = made.factor.copy()
    factor[:, :, :2] = 0.05 * made.factor[:, :, 2:4]
    factor[:, : 2 * HEADS, :2] *= 30  # the first pair had better not be linked
    options = (*LINKS, *made.options[2:])
    return replace(made, options=options, factor=factor, loss=(factor**2).sum(-1))


@pytest.fixture(scope="module")
def solver(tables: Tables) -> Solver:
    held = {P: tables.footprints(P, D) + 4}
    return Solver.of(Question(tables, D, {P: ROOM}, held, 0, lambda *_: 0, AT_ONCE))


def test_links_come_in_whole_pairs_and_in_their_own_split_alone(solver: Solver) -> None:
    """A policy refuses a link that is not returned."""
    assert solver.question.splits == ("heads", "layers", "pairs")
    seen = {name: set[bool]() for name in solver.question.splits}
    mixed = False
    for each in run_study(solver, trials=60, seed=1):
        solver.policy(each).check_fits(LAYERS, HEADS)
        links = solver.linked[each.choice]
        seen[each.parameters["split"]].add(bool(links.any()))
        mixed |= bool(links.any() and not links.all())
        waiting = FULL * (LAYERS - 1) // LAYERS if links.any() else 0
        assert AT_ONCE * solver.problems[P].spent(each.choice) <= ROOM - waiting
    assert seen["heads"] == seen["layers"] == {False}
    assert True in seen["pairs"]
    assert mixed


def test_heads_beside_those_that_have_chosen_lose_what_the_whole_loses(tables: Tables) -> None:
    rng = np.random.default_rng(5)
    problem = Problem.of(tables, tables.footprints(P, D))
    heads, options = problem.loss.shape
    free = np.sort(rng.choice(heads, 3, replace=False))
    choice, other = rng.integers(0, options, (2, heads))
    moved = choice.copy()
    moved[free] = other[free]
    rest = problem.beside(choice, free)
    apart = rest.value(moved[free]) - rest.value(choice[free])
    assert apart == pytest.approx(problem.value(moved) - problem.value(choice), rel=1e-4)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_pairs_lose_no_more_than_the_best_of_all_that_choose_alike(
    tables: Tables, share: float
) -> None:
    few = tables.with_options([0, 1, 5, 12, 13])
    problem = Problem.of(few, few.footprints(P, D))
    linked, budget = np.array([is_linked(o) for o in few.options]), int(share * FULL)

    def best(asked: Problem, others: Choice) -> Choice:
        return solve(asked, budget - problem.spent(others))

    found = solve_pairs(problem, linked, 2 * HEADS, best)
    alike = [np.repeat(each, 2 * HEADS) for each in product(range(len(linked)), repeat=LAYERS // 2)]
    least = min(problem.value(c) for c in alike if problem.spent(c) <= budget)
    assert problem.spent(found) <= budget
    assert problem.value(found) <= least + 1e-6


def test_plans_that_are_improved_or_follow_scores_leave_no_half_of_a_link(
    solver: Solver, tmp_path: Path
) -> None:
    simple = simple_points(solver, first=0)
    linked = next(each for each in simple if solver.linked[each.choice].all())
    policy = solver.policy(linked)
    heads = (*policy.heads[:2], *[(Option(keys=Int4(), values=Int4()),) * HEADS] * 2)
    file = tmp_path / "start.yaml"
    file.write_text(write_policy(PolicyDocument(replace(policy, heads=heads))))
    starts = start_points(solver, [file], first=0)
    assert any(solver.linked[each.choice].any() for each in starts)
    scores = np.random.default_rng(0).random((LAYERS, HEADS), np.float32)
    scored = head_points(solver, scores, linked, first=0)
    for each in (*starts, *scored):
        solver.policy(each).check_fits(LAYERS, HEADS)


def test_trades_leave_links_and_the_others_bytes_alone(solver: Solver) -> None:
    problem, rng = solver.problems[P], np.random.default_rng(2)
    own = np.flatnonzero(~solver.linked)
    start = np.repeat([1, 0], 2 * HEADS)
    start[2 * HEADS :] = rng.choice(own, 2 * HEADS)
    budget = problem.spent(start) + 100
    found = exchange_unlinked(problem, solver.linked, budget, start, 50)
    assert (found[: 2 * HEADS] == 1).all()
    assert not solver.linked[found[2 * HEADS :]].any()
    assert problem.spent(found) <= budget
    assert problem.value(found) <= problem.value(start)
