"""How one trial answers a question: the Gram solver on reduced tables.

A trial is solved on the search samples and judged on the selection samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.allocate import Problem, solve, solve_both
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.exchange import Choice
from kvtune.tuner.limits import with_excess
from kvtune.tuner.linked import PAIRS, holds_whole_prompt, is_linked, solve_pairs
from kvtune.tuner.question import Question
from kvtune.tuner.within import expressible, format_label, is_narrow

_NO_MIX = 1e-3  # beyond its room by so little counts a trial that keeps each limit, but not both


@dataclass(frozen=True)
class Solver:
    """The question with its tables reduced once, ready for many trials."""

    question: Question
    problems: Mapping[int, Problem]
    check: Tables

    @staticmethod
    def of(question: Question, rank: int = 64) -> Solver:
        """Fit on the search samples, judge on the selection samples; on the others if none are."""
        tables = question.tables
        splits = {sample.split for sample in tables.samples}
        held = question.held
        fitted_on = tables.of_split("search" if "search" in splits else "select")
        fit = Problem.of(fitted_on, held[question.contexts[0]], rank=rank)
        problems = {
            context: replace(fit, footprint=held[context], read=question.taken(context))
            for context in held
        }
        check = tables.of_split("select" if "select" in splits else "search")
        return Solver(question, problems, check)

    def answer(self, number: int, parameters: dict[str, Any]) -> Candidate | None:
        """Solve one trial; None where its options cannot fit."""
        context, sequences = parameters["context"], parameters["sequences"]
        question, columns, budget = self._asked(parameters)
        whole = self.problems[context]
        problem = whole.allowing(columns).shrunk(parameters["shrinkage"])
        # What pages from the host land in is known of a choice alone: first as if it were nothing.
        landing, least = question.most_landing(context), question.sequences or 1
        tries = [(budget + landing, sequences), (budget, least)] if landing else [(budget, least)]
        for room, needed in tries:
            try:
                choice = columns[self._solved(problem, columns, room, parameters["split"])]
            except KvtuneError:
                return None
            if question.most_of(context, choice) >= needed:
                return replace(self, question=question).candidate(
                    choice, context, sequences, parameters, number
                )
        return None

    def beyond_room(self, parameters: dict[str, Any]) -> float:
        """By which share of its own bytes the least that a trial could store is beyond its room."""
        question, columns, budget = self._asked(parameters)
        heads, problem = question.tables.heads, self.problems[parameters["context"]]
        shares = [1 - budget / (heads * int(problem.footprint[columns].min()))]
        if question.read_budget is not None and problem.read is not None:
            least = heads * int(problem.read[columns].min())
            shares.append(1 - question.read_budget / max(least, 1))
        return max(*shares, _NO_MIX)

    def _asked(self, parameters: dict[str, Any]) -> tuple[Question, Choice, int]:
        """A trial's question, the options that it admits, and bytes for the pages of a prompt."""
        columns = self._columns(parameters)
        question = self.question.under(parameters.get("weights", self.question.weights))
        waits = any(holds_whole_prompt(question.tables.options[o]) for o in columns)
        at_once = parameters["context"], parameters["sequences"]
        return question, columns, question.prompt_budget(*at_once, waits)

    def asked(self, question: Question) -> Solver:
        """The same reduced tables for a question that has rules behind its options."""
        check = question.tables.of_split(self.check.samples[0].split)
        return replace(self, question=question, check=check)

    def under(self, weights: str) -> Solver:
        """The same where the weights have one format."""
        return replace(self, question=self.question.under(weights))

    def candidate(
        self,
        choice: Choice,
        context: int,
        sequences: int,
        parameters: dict[str, Any],
        number: int = 0,
    ) -> Candidate:
        """What a choice comes to, with the weights in the question's (widest) format.

        So many sequences were planned for. Where their number is not asked for, it is as many as
        fit: what a plan leaves of its bytes is for more of them, unless they would miss a limit.
        """
        weights = self.question.weights
        found = Candidate(
            number=number,
            parameters=parameters,
            choice=choice,
            kl=self.loss(choice),
            context=context,
            sequences=sequences,
            prompt_bytes=self.payload(choice, context),
            weights=weights,
            freed_bytes=self.question.freed[weights],
        )
        found = with_excess(found, self.question.excess)
        most = self.question.most_of(context, choice)
        if self.question.sequences is not None or most in (0, sequences):
            return found
        as_many = with_excess(replace(found, sequences=most), self.question.excess)
        return found if set(as_many.misses) - set(found.misses) else as_many

    @property
    def linked(self) -> NDArray[np.bool_]:
        """Which options store something together with another layer, ``[O]``."""
        return np.array([is_linked(option) for option in self.question.tables.options])

    def _solved(self, problem: Problem, columns: Choice, budget: int, split: str) -> Choice:
        """The best found of all heads, as places among ``columns``.

        Raises:
            KvtuneError: nothing fits.
        """
        most, tables = self.question.read_budget, self.question.tables

        def best(asked: Problem, others: Choice) -> Choice:
            left = budget - problem.spent(others)
            if most is None or problem.read is None:
                return solve(asked, left)
            return solve_both(asked, left, most - int(problem.read[others].sum()))

        nobody = np.zeros(0, np.int64)
        if split == PAIRS:
            return solve_pairs(problem, self.linked[columns], 2 * tables.kv_heads, best)
        size = {"heads": 1, "layers": tables.kv_heads, "engine": tables.heads}[split]
        tied = problem.tied(size) if size > 1 else problem
        return np.repeat(best(tied, nobody), size)

    def payload(self, choice: Choice, context: int) -> int:
        """Bytes of one prompt as formats count them, lengths included; its pages take more."""
        question = self.question
        if question.tables.rule_of(choice) is not None:
            return policy_of(question.tables, choice, "").footprint(context, question.head_dim)
        each = question.tables.footprints(context, question.head_dim)
        return int(each[choice].sum()) + footprint_of_lengths(1, question.tables.heads)

    def _columns(self, parameters: dict[str, Any]) -> Choice:
        """Options that a trial and the stack admit."""
        narrow, limits = parameters.get("format"), self.question.limits
        return np.flatnonzero(
            [
                _allowed(option, parameters)
                and expressible(option, limits)
                and (parameters["split"] == PAIRS or not is_linked(option))
                and (narrow is None or not is_narrow(option) or format_label(option) == narrow)
                for option in self.question.tables.options
            ]
        )

    def loss(self, choice: Choice) -> float:
        """Predicted on the selection samples, nats/token."""
        return float(self.check.sample_weights() @ self.check.by_sample(choice))

    def policy(self, candidate: Candidate) -> Policy:
        """The candidate as a policy, budgets as shares of the prompt."""
        tables, label = self.question.tables, candidate.parameters.get("uniform")
        rule = tables.rule_of(candidate.choice)
        if rule is None or rule.family == "uniform":
            label = "kvtune plan" if label is None else f"uniform {label}"
        return policy_of(tables, candidate.choice, str(label))


def policy_of(tables: Tables, choice: Choice, name: str) -> Policy:
    """A choice of options, or a rule, ``[I]``, as a policy."""
    if (rule := tables.rule_of(choice)) is not None:
        return rule.policy(tables.layers, tables.kv_heads, name)
    rows = choice.reshape(-1, tables.kv_heads)
    return Policy(name, tuple(tuple(tables.options[o] for o in row) for row in rows))


def _allowed(option: Option, parameters: dict[str, Any]) -> bool:
    """Whether a trial's families and precisions admit an option; all-token options always are."""
    if evicts(option):
        if not parameters.get(option.method.name, True):
            return False
        if is_variant(option) and not parameters.get("variants", True):
            return False
    if has_exact_sinks(option) and not parameters.get("exact_sinks", True):
        return False
    return all(form.bits >= parameters["least_bits"] for form in (option.keys, option.values))


def evicts(option: Option) -> bool:
    """Whether it keeps less than everything."""
    return option.budget.share is not None or option.budget.tokens is not None


def is_variant(option: Option) -> bool:
    """Whether the method runs with other hyper-parameters than the published ones."""
    return option.method != type(option.method)()


def has_exact_sinks(option: Option) -> bool:
    """Whether the first kept tokens stay in 16 bits."""
    return any(getattr(form, "exact_first", 0) > 0 for form in (option.keys, option.values))


def by_each_format(
    solver: Solver, points: Callable[[Solver], Iterable[Candidate]]
) -> Iterator[Candidate]:
    """Points with the weights in every format that is asked about, which their parameters name."""
    formats = solver.question.freed
    for weights in formats:
        named = {"weights": weights} if len(formats) > 1 else {}
        for point in points(solver.under(weights)):
            yield replace(point, parameters={**point.parameters, **named})
