"""Plans that follow head scores, as RazorAttention, DuoAttention and HeadKV allocate; candidates.

Tables predict what every option costs every head, and may be wrong where few samples ask for what a
head retrieves. Head scores say it in another way. Plans made of them are run live beside what the
tables prefer, so that a search never prefers a plan to an allocation that it could have had and
that does better on the selection samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.head_scores import Floats
from kvtune.policies.option import Option
from kvtune.tuner.allocate import Problem
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.exchange import Choice
from kvtune.tuner.solver import Solver, evicts

BY_HEADS = "heads"
"""The parameter that says by which rule of head scores a candidate was made."""

_POOL = 1 / 1.2  # of the bytes that HeadKV shares out by score; its beta


def head_points(solver: Solver, scores: Floats, beside: Candidate, first: int) -> list[Candidate]:
    """Two plans with as many sequences of the same length as another candidate.

    full   heads of highest score keep every token, all others one and the same cheaper option
    pool   every head the best option within a sixth of its share of the bytes, and the rest of all
           bytes shared out by score

    What is then left goes to the heads in the order of their scores. Bytes are not traded between
    heads, as the tables would have it: that ends at the plan which the study finds anyway.

    Args:
        solver: the question.
        scores: of KV heads, ``[L, H]``.
        beside: says context and sequences.
        first: number of the first of them.
    """
    solver = solver.under(beside.weights)
    own = np.flatnonzero(~solver.linked)  # heads choose one by one, which links do not allow
    problem = solver.problems[beside.context].allowing(own)
    options = [solver.question.tables.options[o] for o in own]
    budget = solver.question.prompt_budget(beside.context, beside.sequences)
    rank = np.argsort(-scores, axis=None, kind="stable")
    made = {
        "full": min(_in_full(options, problem, rank, budget), key=problem.value, default=None),
        "pool": _pooled(problem, scores, budget),
    }
    named = {"weights": beside.weights} if "weights" in beside.parameters else {}
    found: list[Candidate] = []
    for rule, start in made.items():
        if start is None or problem.spent(start) > budget:
            continue
        choice = own[_filled(problem, start, rank, budget)]
        at = beside.context, beside.sequences
        asked = {BY_HEADS: rule, "context": beside.context, "sequences": beside.sequences, **named}
        found.append(solver.candidate(choice, *at, asked, number=first + len(found)))
    return found


def _filled(problem: Problem, start: Choice, rank: NDArray[np.int64], budget: int) -> Choice:
    """What is left of the bytes, head by head in the order of rank, each its best option."""
    choice, left = start.copy(), budget - problem.spent(start)
    for head in rank:
        room = left + int(problem.footprint[choice[head]])
        best = int(np.where(problem.footprint <= room, problem.loss[head], np.inf).argmin())
        if problem.loss[head, best] < problem.loss[head, choice[head]]:
            left = room - int(problem.footprint[best])
            choice[head] = best
    return choice


def _in_full(
    options: Sequence[Option], problem: Problem, rank: NDArray[np.int64], budget: int
) -> Iterator[Choice]:
    """For every option that evicts, as many first heads with a wide one as fit beside it."""
    whole = [o for o, option in enumerate(options) if not evicts(option)]
    for narrow in (o for o, option in enumerate(options) if evicts(option)):
        for wide in whole:
            more = int(problem.footprint[wide] - problem.footprint[narrow])
            left = budget - int(problem.footprint[narrow]) * len(rank)
            count = min(left // more, len(rank)) if more > 0 else 0
            if count > 0:
                choice = np.full(len(rank), narrow, np.int64)
                choice[rank[:count]] = wide
                yield choice


def _pooled(problem: Problem, scores: Floats, budget: int) -> Choice | None:
    """Each head's best option within what its score allows it."""
    clipped = np.clip(scores.astype(np.float64).ravel(), 0, None)
    importance = clipped / clipped.sum() if clipped.sum() > 0 else np.full(len(clipped), 1.0)
    importance = importance / importance.sum()
    allowed = budget * (_POOL * importance + (1 - _POOL) / len(importance))
    fits = problem.footprint[None] <= allowed[:, None]
    if not fits.any(1).all():
        smallest = problem.footprint.argmin()
        fits[:, smallest] = True
    best: Choice = np.where(fits, problem.loss, np.inf).argmin(1)
    return best
