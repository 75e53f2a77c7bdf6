"""Plans that a search begins with besides its own: published head patterns, former searches' plans.

Each stands beside the trials as it is, in the menu's nearest options, and improved by trading bytes
between its heads while that lowers the predicted loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import read_policy
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.exchange import Choice
from kvtune.tuner.linked import exchange_unlinked, holds_whole_prompt, is_linked
from kvtune.tuner.question import Question
from kvtune.tuner.solver import Solver, by_each_format, evicts
from kvtune.tuner.within import expressible

_EXCHANGES = 200


def start_points(solver: Solver, files: Sequence[Path], first: int) -> list[Candidate]:
    """Every file's plan as it is and improved, at every context where it fits.

    Args:
        solver: the question.
        files: policy files for the model's shape.
        first: number of the first of them.

    Raises:
        KvtuneError: a file is no policy, or one of another shape.
    """
    tables = solver.question.tables
    starts = {
        file.name: nearest_choice(
            read_policy(file).bind(tables.layers, tables.kv_heads), solver.question
        )
        for file in files
    }

    def points(solver: Solver) -> Iterator[Candidate]:
        for name, start in starts.items():
            for context in solver.question.contexts:
                yield from _points(solver, context, start, name)

    found = by_each_format(solver, points)
    return [replace(each, number=number) for number, each in enumerate(found, start=first)]


def nearest_choice(policy: Policy, question: Question) -> Choice:
    """Each head's option as the nearest that the menu has, ``[I]``.

    Of the same method where the menu has it, else of any; the nearest in bits, then in bytes.

    Raises:
        KvtuneError: the policy is for another shape.
    """
    tables = question.tables
    policy.check_fits(tables.layers, tables.kv_heads)
    allowed = [n for n, o in enumerate(tables.options) if expressible(o, question.limits)]
    if not allowed:
        raise KvtuneError("the menu has no option that the stack can express")
    known = {option: _nearest(option, tables, allowed) for option in set(policy.options())}
    return np.array([known[option] for option in policy.options()], np.int64)


def _nearest(option: Option, tables: Tables, allowed: Sequence[int]) -> int:
    prompt, head_dim = tables.prompt_tokens, tables.head_dim

    def size(each: Option) -> float:
        return math.log(each.footprint(each.budget.resolve(prompt), prompt, head_dim))

    def alike(each: Option) -> bool:
        if not evicts(option):
            return not evicts(each)
        return evicts(each) and each.method.name == option.method.name

    def distance(number: int) -> tuple[float, float]:
        each = tables.options[number]
        bits = abs(each.keys.bits - option.keys.bits) + abs(each.values.bits - option.values.bits)
        return bits, abs(size(each) - size(option))

    # A link that the policy lacks would be a head's alone.
    offered = [n for n in allowed if is_linked(option) or not is_linked(tables.options[n])]
    return min([n for n in offered if alike(tables.options[n])] or offered, key=distance)


def _points(solver: Solver, context: int, start: Choice, name: str) -> Iterator[Candidate]:
    question, problem = solver.question, solver.problems[context]
    waits = any(holds_whole_prompt(question.tables.options[o]) for o in set(start))
    most = question.most_of(context, start)
    sequences = question.sequences or most
    if not 1 <= sequences <= most or not _reads_little(solver, context, start):
        return
    budget = question.prompt_budget(context, sequences, waits)
    said = {"context": context, "sequences": sequences, "start": name}
    yield solver.candidate(start, context, sequences, said)
    if question.read_budget is None:
        better = exchange_unlinked(problem, solver.linked, budget, start, _EXCHANGES)
        yield solver.candidate(better, context, sequences, {**said, "improved": True})


def _reads_little(solver: Solver, context: int, choice: Choice) -> bool:
    """Whether a step reads, or brings over, no more of a prompt than it may."""
    question = solver.question
    taken = question.taken(context)[choice].sum()
    return question.read_budget is None or int(taken) <= question.read_budget
