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
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.exchange import Choice
from kvtune.tuner.long.menu import LongMenu, footprints
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
    held = footprints(
        tables.options, asked.prompt_tokens, asked.tokens, asked.menu.residual, tables.head_dim
    )
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
    for column in np.flatnonzero(held * tables.heads <= budget):
        choice = np.full(tables.heads, column)
        choices.setdefault(choice.tobytes(), (f"uniform {tables.options[column].label}", choice))
    if not choices:
        raise KvtuneError(
            f"no plan holds {asked.bound_bytes} bytes or less at every moment; the smallest "
            f"options take {int(held.min()) * tables.heads}",
            hint="raise the bound, or generate fewer tokens.",
        )
    found = [_plan(tables, name, choice, held) for name, choice in choices.values()]
    return sorted(found, key=lambda plan: plan.predicted)


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
    allocated = [plan for plan in found if not plan.is_uniform][:FINALISTS]
    finalists = allocated or list(found[:FINALISTS])
    losses = run(finalists)
    best = int(np.argmin(losses))
    return finalists[best], {p.name: float(x) for p, x in zip(finalists, losses, strict=True)}
