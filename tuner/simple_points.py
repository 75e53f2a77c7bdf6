"""Plans that need no search: every head alike, the uncompressed cache among them.

They stand beside the trials, so that a search of few trials is never worse than what anybody would
try first. On a stand-in they are all there is: losses of single heads carry over to no other model.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import numpy as np

from kvtune.tuner.limits import with_excess
from kvtune.tuner.question import Candidate, Question, Solver, holds_whole_prompt
from kvtune.tuner.within import expressible


def simple_points(solver: Solver, first: int) -> list[Candidate]:
    """Each option for all heads, with as many sequences as then fit; those that do fit.

    Args:
        solver: the question.
        first: number of the first of them; trials have the numbers before it.
    """
    found = [
        candidate
        for context in solver.question.contexts
        for option in range(len(solver.question.tables.options))
        if expressible(solver.question.tables.options[option], solver.question.limits)
        and (candidate := _point(solver, context, option)) is not None
    ]
    return [replace(each, number=number) for number, each in enumerate(found, start=first)]


def _point(solver: Solver, context: int, option: int) -> Candidate | None:
    question, problem = solver.question, solver.problems[context]
    choice = np.full(question.tables.heads, option, np.int64)
    waits = holds_whole_prompt(question.tables.options[option])
    most = question.sequences_of(context, problem.spent(choice), waits)
    sequences = question.sequences or most
    read = question.taken(context)[option]
    reads_too_much = question.read_budget is not None and (
        read * question.tables.heads > question.read_budget
    )
    if reads_too_much or not 1 <= sequences <= most:
        return None
    found = Candidate(
        number=0,
        parameters={
            "uniform": question.tables.options[option].label,
            "context": context,
            "sequences": sequences,
        },
        choice=choice,
        kl=solver.loss(choice),
        context=context,
        sequences=sequences,
        prompt_bytes=solver.payload(choice, context),
    )
    return _as_many_as_time_allows(found, question)


def _as_many_as_time_allows(found: Candidate, question: Question) -> Candidate:
    """The candidate with as many sequences as its limits on time allow, one where none do."""
    found = with_excess(found, question.excess)
    if question.sequences or not {"--tpot", "--ttft"} & set(found.misses):
        return found

    def at(count: int) -> Candidate:
        parameters = {**found.parameters, "sequences": count}
        fewer = replace(found, sequences=count, parameters=parameters)
        return with_excess(fewer, question.excess)

    counts = range(1, found.sequences)
    fitting = bisect_left(counts, True, key=lambda n: "--tpot" in at(n).misses)
    return at(max(fitting, 1))
