"""Plans for a long generation: solved on replayed tables, then chosen by a few live rounds.

The bound is on the bytes that all heads of a sequence hold at any moment, each at its most. It is
counted before anything runs, and the runtime refuses a plan that could exceed it and stops one that
does (``runtime.generate``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.exchange import Choice
from kvtune.tuner.long.menu import LongMenu, footprints, most_bytes
from kvtune.tuner.quality import mean_over_kinds
from kvtune.tuner.solver import policy_of

FINALISTS = 4


@dataclass(frozen=True)
class Generated:
    """A generation that is planned for.

    Args:
        prompt_tokens: P.
        tokens: that are generated after it.
        bound_bytes: that all heads of a sequence together may hold at any moment.
        menu: what heads may be given.
    """

    prompt_tokens: int
    tokens: int
    bound_bytes: int
    menu: LongMenu

    def shape(self, head_dim: int) -> tuple[int, int, int, int]:
        """What the bytes of a head follow from, beside its option."""
        return self.prompt_tokens, self.tokens, self.menu.residual, head_dim


@dataclass(frozen=True)
class LongPlan:
    """A plan within the bound.

    Args:
        name: of the options it was solved within.
        choice: option of each head, ``[I]``.
        policy: the same as a policy.
        most_bytes: that it ever holds.
        predicted: loss on the selection samples by replay, nats/token.
        is_uniform: whether all heads have the same option.
    """

    name: str
    choice: Choice
    policy: Policy
    most_bytes: int
    predicted: float
    is_uniform: bool = False


def candidates(tables: Tables, asked: Generated) -> list[LongPlan]:
    """Plans of every family of options, and the uniform ones that fit, by predicted loss.

    Fitted on the search samples, judged on the selection samples.

    Args:
        tables: of the menu's options on a sequence of any length.
        asked: the generation.

    Raises:
        KvtuneError: not even the smallest options stay within the bound.
    """
    tables = replace(tables, options=asked.menu.options(asked.prompt_tokens + asked.tokens))
    held = footprints(tables.options, *asked.shape(tables.head_dim))
    budget = asked.bound_bytes - footprint_of_lengths(tables.layers, tables.kv_heads)
    problem = Problem.of(tables.of_split("search"), held)
    choices: dict[bytes, tuple[str, Choice]] = {}
    for name, columns in asked.menu.families(tables.options):
        picked = np.array(columns)
        try:
            choice = picked[solve(problem.allowing(picked), budget)]
        except KvtuneError:
            continue
        choices.setdefault(choice.tobytes(), (name, choice))
    fitting = np.flatnonzero(held * tables.heads <= budget)
    if not choices and not fitting.size:
        raise KvtuneError(
            f"no plan holds {asked.bound_bytes} bytes or less at every moment; the smallest "
            f"options take {int(held.min()) * tables.heads}",
            hint="raise the bound, or generate fewer tokens.",
        )
    found = [_plan(tables, name, choice, held) for name, choice in choices.values()]
    found += [_uniform(tables, int(column), held, asked) for column in fitting]
    return sorted(found, key=lambda plan: plan.predicted)


def _uniform(tables: Tables, column: int, held: NDArray[np.int64], asked: Generated) -> LongPlan:
    """One option for all heads, with as many tokens more as the bound has room for.

    Its predicted loss is that of the menu's budget, which it exceeds by less than a step.
    """
    plan = _plan(tables, "", np.full(tables.heads, column), held)
    option = largest(tables.options[column], asked, tables.heads, tables.head_dim)
    lengths = footprint_of_lengths(tables.layers, tables.kv_heads)
    name = f"uniform {option.label}"
    return replace(
        plan,
        name=name,
        policy=Policy.uniform(option, tables.layers, tables.kv_heads, name=name),
        most_bytes=most_bytes(option, *asked.shape(tables.head_dim)) * tables.heads + lengths,
    )


def largest(option: Option, asked: Generated, heads: int, head_dim: int) -> Option:
    """The option with the most tokens that all heads may hold within the bound.

    Args:
        option: fits.
        asked: the generation.
        heads: of all layers.
        head_dim: D.
    """
    if option.budget.tokens is None:
        return option
    low, high = option.budget.tokens, asked.prompt_tokens + asked.tokens
    while low < high:
        middle = (low + high + 1) // 2
        tried = replace(option, budget=Budget(tokens=middle))
        most = most_bytes(tried, *asked.shape(head_dim)) + footprint_of_lengths(1, 1)
        low, high = (middle, high) if most * heads <= asked.bound_bytes else (low, middle - 1)
    return replace(option, budget=Budget(tokens=low))


def _plan(tables: Tables, name: str, choice: Choice, held: NDArray[np.int64]) -> LongPlan:
    check = tables.of_split("select")
    kinds = [sample.kind for sample in check.samples]
    lengths = footprint_of_lengths(tables.layers, tables.kv_heads)
    return LongPlan(
        name=name,
        choice=choice,
        policy=policy_of(tables, choice, name),
        most_bytes=int(held[choice].sum()) + lengths,
        predicted=mean_over_kinds(check.by_sample(choice), kinds),
        is_uniform=bool((choice == choice[0]).all()),
    )


RunPlans = Callable[[Sequence[LongPlan]], Sequence[float]]
"""Generates under plans on the selection prompts; for each its live loss, nats/token."""


def choose(found: Sequence[LongPlan], run: RunPlans) -> tuple[LongPlan, dict[str, float]]:
    """The plan that loses least live, of those that replay thinks best, with what each lost.

    Replay is open loop: its order among unlike methods is not to be trusted alone.
    """
    tried = finalists(found)
    losses = run(tried)
    best = int(np.argmin(losses))
    return tried[best], {p.name: float(x) for p, x in zip(tried, losses, strict=True)}


def finalists(found: Sequence[LongPlan]) -> list[LongPlan]:
    """The allocated plans that replay thinks best, and the best uniform one."""
    allocated = [plan for plan in found if not plan.is_uniform][:FINALISTS]
    return allocated + [plan for plan in found if plan.is_uniform][:1]
