"""Rules as plans of a stand-in: filled to the byte, their budgets divided when a prompt is known.

The menu's options have shares of a grid and formats of the tables. What rules lost when they ran on
the source is known at any share between (``curves.py``), and which head is which matters to none of
them, so that they are plans for a model whose heads nobody has seen. For every number of sequences
there are two: the best uniform rule, and the best that divides its budgets or has been published
since.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvtune.simulator.quality.rules import Rule
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.baselines import STRONG
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.curves import Curves, Row, row_at, rows_at
from kvtune.tuner.filling import Filling, SequenceBytes
from kvtune.tuner.question import Question
from kvtune.tuner.simple_points import as_many_as_time_allows
from kvtune.tuner.solver import Solver

GROUPS: tuple[Collection[str], ...] = (
    ("uniform",),
    ("adakv", *(name for name, rules in STRONG.items()
                if not any(method.needs.calibration for _, method in rules))),
)  # fmt: skip
"""Families of which the best is a plan; what is calibrated on the model first needs the model."""
_STEPS = 12  # numbers of sequences, from one to as many as fit


@dataclass(frozen=True)
class Offer:
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


def said_of_methods(tables: Tables, with_rules: bool) -> str:
    """Which methods a search on a stand-in tries, since its menu is what was measured before.

    Args:
        tables: of the source, without rules.
        with_rules: whether rules that ran live on the source are offered too.
    """
    known = ", ".join(sorted({option.method.name for option in tables.options}))
    ran = sorted({method.name for group in GROUPS for family in group
                  for _, method in STRONG.get(family, ())})  # fmt: skip
    rules = f", and those that ran live on it, for all heads alike: {', '.join(ran)}"
    return (
        f"methods: those of the stand-in's tables: {known}{rules if with_rules else ''}. --menu "
        "chooses only where the model's own weights are at hand (--model PATH)."
    )


def offers_of(
    question: Question, curves: Curves, held: SequenceBytes, largest_kl: float
) -> list[Offer]:
    """Rules for every context and format of weights, from one sequence to as many as fit.

    Among them is the one with most sequences whose loss is acceptable.

    Args:
        question: what is asked.
        curves: what rules lost live on the source.
        held: device memory of one sequence, by the runtime's rules.
        largest_kl: loss that is acceptable, nats/token.
    """
    found: list[Offer] = []
    for weights in question.freed:
        asked = question.under(weights)
        for context in asked.contexts:
            for group in GROUPS:
                found += _of_group(_Choosing(asked, curves, held, context, group), largest_kl)
    return found


def rule_points(solver: Solver, offers: Sequence[Offer], first: int) -> list[Candidate]:
    """Offers as candidates; the tables of ``solver`` have them in the same order.

    Args:
        solver: the question, with rules.
        offers: the rules.
        first: number of the first candidate.
    """
    behind, heads = len(solver.question.tables.options), solver.question.tables.heads
    several = len(solver.question.freed) > 1
    points = []
    for number, each in enumerate(offers):
        parameters = {
            "uniform": each.rule.label, "context": each.context, "sequences": each.sequences,
            **({"weights": each.weights} if several else {}),
        }  # fmt: skip
        asked = solver.under(each.weights)
        choice = np.full(heads, behind + number, np.int64)
        point = asked.candidate(choice, each.context, each.sequences, parameters, first + number)
        points.append(as_many_as_time_allows(point, asked.question))
    return points


def _of_group(choosing: _Choosing, largest_kl: float) -> Iterator[Offer]:
    """The best of some families at several numbers of sequences."""
    question = choosing.question
    most = question.most_sequences(choosing.context)
    if question.sequences:
        counts = {question.sequences} if question.sequences <= most else set()
    else:
        counts = {int(n) for n in np.geomspace(1, max(most, 1), _STEPS).round()}

        def loses_more(count: int) -> bool:
            found = choosing.at(count)
            return found is None or _value(found.rule) > largest_kl

        counts.add(max(bisect_left(range(1, most + 1), True, key=loses_more), 1))
    each = (choosing.at(count) for count in sorted(counts))
    return (found for found in each if found is not None)


def _value(rule: Rule) -> float:
    assert rule.live is not None  # noqa: S101 - of a curve
    return rule.live.value


@dataclass(frozen=True)
class _Choosing:
    """The best rule of some families, by what they lost live on the source, at one context."""

    question: Question
    curves: Curves
    held: SequenceBytes
    context: int
    families: Collection[str]

    def at(self, sequences: int) -> Offer | None:
        """The best where so many sequences share the memory; None where none fits."""
        filling = Filling(self.question, self.held, self.context, sequences)
        share = filling.room(waits=False) / self.question.full_bytes(self.context)
        if share <= 0:
            return None
        length = self.context / self.question.tables.prompt_tokens
        rows = rows_at(self.curves, share, self.families, length)
        rules = [rule for row in rows if (rule := self._rule(row, filling, length)) is not None]
        if not rules:
            return None
        best = min(rules, key=_value)
        return Offer(best, self.context, sequences, self.question.weights)

    def _rule(self, row: Row, filling: Filling, length: float, again: int = 1) -> Rule | None:
        """A family's rule, filled; None where nobody ran it with so few bytes.

        Pages are not full and take some of the room: where the bytes that are then left ask for
        another precision, or do not hold every token of a rule that keeps them, that one is filled.
        """
        parts = row.stored()
        filled = None if parts is None else filling.filled(*parts)
        if filled is None:
            return None
        share = filled.prompt_bytes / self.question.full_bytes(self.context)
        other = next(rows_at(self.curves, share, (row.family,), length), None)
        if other is None:
            return None
        if other.name != row.name and (again or row.keeps_all):
            return self._rule(other, filling, length, max(again - 1, 0))
        lost = row_at(self.curves[row.family], share, row.family, row.name)
        losses = _by_sample(lost, self.question.tables)
        return Rule(row.family, filled.option, filled.allocator, losses, lost.loss)


def _by_sample(row: Row, tables: Tables) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A curve's loss on samples of the tables: that of each one's kind of text, ``[n]``."""
    kinds = (sample.kind.partition(", ")[0] for sample in tables.samples)
    losses = [row.by_kind.get(kind, row.loss.value) for kind in kinds]
    return np.array(losses, np.float32)
