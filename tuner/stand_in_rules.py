"""Rules as plans of a stand-in: filled to the byte, their budgets divided when a prompt is known.

The menu's options have shares of a grid and formats of the tables. What rules lost when they ran on
the source is known at any share between (``curves.py``), and which head is which matters to none of
them, so that they are plans for a model whose heads nobody has seen. For every number of sequences
there are two: the best uniform rule, and the best that divides its budgets or has been published
since.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.quality.rules import Rule
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.baselines import STRONG
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.curves import Curves, Row, row_at, rows_at, share_of
from kvtune.tuner.question import Question
from kvtune.tuner.simple_points import as_many_as_time_allows
from kvtune.tuner.solver import Solver

GROUPS: tuple[Collection[str], ...] = (
    ("uniform",),
    ("adakv", *(name for name, rules in STRONG.items()
                if not any(method.needs.calibration for _, method in rules))),
)  # fmt: skip
"""Families of which the best is a plan; what is calibrated on the model first needs the model."""
_NEARLY = 0.99
_STEPS = 12  # numbers of sequences, from one to as many as fit
SequenceBytes = Callable[[Policy, int], int]
"""Device memory of one sequence under a policy, its prompt so long."""


@dataclass(frozen=True)
class Filled:
    """A rule that fills what so many sequences leave to each.

    Args:
        rule: with its loss.
        context: prompt tokens of each sequence.
        sequences: at once.
        weights: format of the model's weights beside them.
    """

    rule: Rule
    context: int
    sequences: int
    weights: str


def filled_rules(
    question: Question, curves: Curves, held: SequenceBytes, largest_kl: float
) -> list[Filled]:
    """Rules for every context and format of weights, from one sequence to as many as fit.

    Among them is the one with most sequences whose loss is acceptable.

    Args:
        question: what is asked.
        curves: what rules lost live on the source.
        held: device memory of one sequence, by the runtime's rules.
        largest_kl: loss that is acceptable, nats/token.
    """
    found: list[Filled] = []
    for weights in question.freed:
        asked = question.under(weights)
        for context in asked.contexts:
            for group in GROUPS:
                found += _of_group(_Filling(asked, curves, held, context, group), largest_kl)
    return found


def rule_points(solver: Solver, filled: Sequence[Filled], first: int) -> list[Candidate]:
    """Filled rules as candidates; the tables of ``solver`` have them in the same order.

    Args:
        solver: the question, with rules.
        filled: the rules.
        first: number of the first candidate.
    """
    behind, heads = len(solver.question.tables.options), solver.question.tables.heads
    several = len(solver.question.freed) > 1
    points = []
    for number, each in enumerate(filled):
        parameters = {
            "uniform": each.rule.label, "context": each.context, "sequences": each.sequences,
            **({"weights": each.weights} if several else {}),
        }  # fmt: skip
        asked = solver.under(each.weights)
        choice = np.full(heads, behind + number, np.int64)
        point = asked.candidate(choice, each.context, each.sequences, parameters, first + number)
        points.append(as_many_as_time_allows(point, asked.question))
    return points


def _of_group(filling: _Filling, largest_kl: float) -> Iterator[Filled]:
    """The best of some families at several numbers of sequences."""
    question = filling.question
    most = question.most_sequences(filling.context)
    if question.sequences:
        counts = {question.sequences} if question.sequences <= most else set()
    else:
        counts = {int(n) for n in np.geomspace(1, max(most, 1), _STEPS).round()}

        def loses_more(count: int) -> bool:
            found = filling.at(count)
            return found is None or _value(found.rule) > largest_kl

        counts.add(max(bisect_left(range(1, most + 1), True, key=loses_more), 1))
    each = (filling.at(count) for count in sorted(counts))
    return (found for found in each if found is not None)


def _value(rule: Rule) -> float:
    assert rule.live is not None  # noqa: S101 - of a curve
    return rule.live.value


@dataclass(frozen=True)
class _Filling:
    """What rules of some families are filled to, at one context."""

    question: Question
    curves: Curves
    held: SequenceBytes
    context: int
    families: Collection[str]

    def at(self, sequences: int) -> Filled | None:
        """The best rule where so many sequences share the memory; None where none fits."""
        share = self._room(sequences, waits=False) / self.question.full_bytes(self.context)
        length = self.context / self.question.tables.prompt_tokens
        best: Filled | None = None
        for row in rows_at(self.curves, share, self.families, length) if share > 0 else ():
            rule = self._filled(row, sequences)
            if rule is not None and (best is None or _value(rule) < _value(best.rule)):
                best = Filled(rule, self.context, sequences, self.question.weights)
        return best

    def _room(self, sequences: int, *, waits: bool) -> int:
        """Bytes of one sequence, generated tokens included."""
        question = self.question
        return question.prompt_budget(self.context, sequences, waits) + question.generated_bytes

    def _filled(self, row: Row, sequences: int) -> Rule | None:
        """A family's rule with the largest budget that fits; None where a token a head does not."""
        parts = row.stored()
        if parts is None:
            return None
        allocator, method, form = parts
        tables, context = self.question.tables, self.context

        def option(tokens: int) -> Option:
            if tokens < context:
                return Option(method, Budget(share=tokens / context), form, form)
            return Option(Full(), ALL, form, form)

        room = self._room(
            sequences, waits=Policy.uniform(option(1), 1, 1, allocator=allocator).waits
        )

        def fits(tokens: int) -> bool:
            alone = Policy.uniform(option(tokens), 1, 1, allocator=allocator)
            return tables.heads * self.held(alone, context) <= room and self._is_read(alone)

        kept = bisect_left(range(1, context + 1), True, key=lambda tokens: not fits(tokens))
        if not kept:
            return None
        if kept == context:  # nothing is left to divide
            allocator = AsGiven()
        policy = Policy.uniform(option(kept), 1, 1, allocator=allocator)
        share = self._payload(policy) / self.question.full_bytes(context)
        points = self.curves[row.family]
        if share < _NEARLY * share_of(points[0]):  # nobody ran it with so few
            return None
        lost = row_at(points, share, row.family, row.name)
        return Rule(row.family, option(kept), allocator, _by_sample(lost, tables), lost.loss)

    def _payload(self, alone: Policy) -> int:
        """Bytes of a prompt as formats count them, from those of one head."""
        heads = self.question.tables.heads
        each = alone.footprint(self.context, self.question.head_dim) - footprint_of_lengths(1, 1)
        return heads * each + footprint_of_lengths(1, heads)

    def _is_read(self, alone: Policy) -> bool:
        """Whether a decode step may read as much."""
        most = self.question.most_read
        return most is None or self._payload(alone) <= most


def _by_sample(row: Row, tables: Tables) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A curve's loss on samples of the tables: that of each one's kind of text, ``[n]``."""
    kinds = (sample.kind.partition(", ")[0] for sample in tables.samples)
    losses = [row.by_kind.get(kind, row.loss.value) for kind in kinds]
    return np.array(losses, np.float32)
