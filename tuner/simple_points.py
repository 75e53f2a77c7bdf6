"""Plans that need no search: every head alike, the uncompressed cache among them.

They stand beside the trials, so that a search of few trials is never worse than what anybody would
try first. On a stand-in they are all there is: losses of single heads carry over to no other model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from kvtune.tuner.candidate import Candidate
from kvtune.tuner.limits import with_excess
from kvtune.tuner.question import Question
from kvtune.tuner.solver import Solver, by_each_format
from kvtune.tuner.within import expressible


def simple_points(solver: Solver, first: int) -> list[Candidate]:
    """Each option for all heads, with as many sequences as then fit; those that do fit.

    Args:
        solver: the question.
        first: number of the first of them; trials have the numbers before it.
    """
    found = by_each_format(solver, _points)
    return [replace(each, number=number) for number, each in enumerate(found, start=first)]


def _points(solver: Solver) -> Iterator[Candidate]:
    question = solver.question
    for context in question.contexts:
        for number, option in enumerate(question.tables.options):
            if expressible(option, question.limits):
                point = _point(solver, context, number)
                yield from () if point is None else (point,)


def _point(solver: Solver, context: int, option: int) -> Candidate | None:
    question = solver.question
    choice = np.full(question.tables.heads, option, np.int64)
    most = question.most_of(context, choice)
    sequences = question.sequences or most
    read = question.taken(context)[option]
    reads_too_much = question.read_budget is not None and (
        read * question.tables.heads > question.read_budget
    )
    if reads_too_much or not 1 <= sequences <= most:
        return None
    label = question.tables.options[option].label
    parameters = {"uniform": label, "context": context, "sequences": sequences}
    found = solver.candidate(choice, context, sequences, parameters)
    return as_many_as_time_allows(found, question)


def as_many_as_time_allows(found: Candidate, question: Question) -> Candidate:
    """The candidate with as many sequences as its limits on time allow, one where none do."""
    if question.sequences or not {"--tpot", "--ttft"} & set(found.misses):
        return found

    def at(count: int) -> Candidate:
        parameters = {**found.parameters, "sequences": count}
        fewer = replace(found, sequences=count, parameters=parameters)
        return with_excess(fewer, question.excess)

    counts = range(1, found.sequences)
    fitting = bisect_left(counts, True, key=lambda n: "--tpot" in at(n).misses)
    return at(max(fitting, 1))
