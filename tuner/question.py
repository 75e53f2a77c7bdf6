"""What is asked of the search, and how one trial answers: the Gram solver on reduced tables.

A trial is solved on the search samples and judged on the selection samples.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.option import Option
from kvtune.policies.paging import landing_bytes
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.memory.peak import waiting_bytes
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.allocate import Problem, solve, solve_both
from kvtune.tuner.exchange import Choice
from kvtune.tuner.limits import Excess, no_limits, with_excess
from kvtune.tuner.linked import PAIRS, is_linked, solve_pairs
from kvtune.tuner.within import expressible, format_label, is_narrow, splits_of

_NO_MIX = 1e-3  # beyond its room by so little counts a trial that keeps each limit, but not both


@dataclass(frozen=True)
class Question:
    """What is fixed before the study: the room for caches and what is asked of it.

    Args:
        tables: quality of options on the model, every split.
        head_dim: of the model that will run, which a stand-in's tables may differ from.
        rooms: bytes left for all sequences' caches and for what the runtime works with, by the
            context P of a sequence in tokens; of several contexts the study chooses.
        held: bytes that one head's prompt takes in pages under each option, ``[O]``, by context.
        generated_bytes: that each sequence's generated tokens take in pages of 16 bits.
        working: bytes that the runtime works with, for a context and so many sequences.
        sequences: how many at once; None lets the study choose.
        limits: of the stack that the plan is for; None for any plan.
        most_read: bytes that a decode step may read of each sequence's prompt; None for any.
        excess: by which share of each limit on its cost a candidate is beyond it.
        most_moved: bytes that it may bring over from the host, likewise; one of the two at most.
        freed: bytes that each format of the weights leaves beyond ``rooms``, widest format first,
            whose 0 they are; of several formats the study chooses.
    """

    tables: Tables
    head_dim: int
    rooms: Mapping[int, int]
    held: Mapping[int, NDArray[np.int64]]
    generated_bytes: int
    working: Callable[[int, int], int]
    sequences: int | None = None
    limits: EngineLimits | None = None
    most_read: int | None = None
    excess: Excess = no_limits
    most_moved: int | None = None
    freed: Mapping[str, int] = field(default_factory=lambda: {"": 0})

    @property
    def weights(self) -> str:
        """The format of the weights; the widest, where the study chooses."""
        return next(iter(self.freed))

    def under(self, weights: str) -> Question:
        """The same question where the weights have one format."""
        freed = self.freed[weights]
        rooms = {context: room + freed for context, room in self.rooms.items()}
        return replace(self, rooms=rooms, freed={weights: freed})

    @property
    def objectives(self) -> tuple[Literal["minimize", "maximize"], ...]:
        """Loss, then tokens at once and what the weights freed, each where the study chooses it.

        What narrower weights lose is not known here. A plan that needs them is therefore no better
        than one that serves less and does not: the bytes that they free count against it.
        """
        serves_more = self.sequences is None or len(self.contexts) > 1
        return (
            "minimize",
            *(("maximize",) if serves_more else ()),
            *(("minimize",) if len(self.freed) > 1 else ()),
        )

    @property
    def options(self) -> list[Option]:
        """The tables' options that the stack can express."""
        return [option for option in self.tables.options if expressible(option, self.limits)]

    @property
    def splits(self) -> tuple[str, ...]:
        """What may choose for itself: heads, layers, the engine as a whole, or pairs of layers."""
        linked = any(is_linked(option) for option in self.options)
        return (*splits_of(self.limits), PAIRS) if linked else splits_of(self.limits)

    @property
    def narrow_formats(self) -> list[str]:
        """Formats of which a plan may have one beside 16 bits; empty where it may have any."""
        if self.limits is None or self.limits.distinct_formats != 1:
            return []
        return sorted({format_label(option) for option in self.options if is_narrow(option)})

    @property
    def contexts(self) -> list[int]:
        """Those that the study may choose, shortest first."""
        return sorted(self.rooms)

    def full_bytes(self, context: int) -> int:
        """Bytes of one uncompressed prompt, bf16."""
        return 2 * 2 * context * self.head_dim * self.tables.heads

    def sequences_of(self, context: int, held_bytes: int, waits: bool = False) -> int:
        """How many sequences fit whose compressed prompts take so many bytes of pages each."""
        each = held_bytes + self.generated_bytes
        counts = range(1, max(self.rooms[context], 0) // each + 1)

        def is_full(count: int) -> bool:
            return count * each > self._room(context, count, waits)

        return bisect.bisect_left(counts, True, key=is_full)

    def _room(self, context: int, sequences: int, waits: bool) -> int:
        """Bytes for the caches of so many sequences."""
        room = self.rooms[context] - self.working(context, sequences)
        waiting = waiting_bytes(self.full_bytes(context), self.tables.layers) if waits else 0
        return room - waiting - sequences * self._landing(context)

    def _landing(self, context: int) -> int:
        """Bytes where pages from the host land, one layer's, of one sequence at most."""
        if self.most_moved is None:
            return 0
        shape = context, self.head_dim
        each = max(landing_bytes(o, o.budget.resolve(context), *shape) for o in self.options)
        return min(self.tables.kv_heads * each, 2 * self.most_moved)

    def prompt_budget(self, context: int, sequences: int, waits: bool = False) -> int:
        """Bytes that the pages of each sequence's compressed prompt may take.

        Args:
            context: prompt tokens.
            sequences: at once.
            waits: whether a policy may wait for a prompt's end, all layers of one uncompressed.
        """
        return self._room(context, sequences, waits) // sequences - self.generated_bytes

    @property
    def read_budget(self) -> int | None:
        """What a solution may take of ``taken``: of ``most_read`` without the heads' lengths."""
        if self.most_moved is not None:
            return self.most_moved
        lengths = footprint_of_lengths(1, self.tables.heads)
        return None if self.most_read is None else max(self.most_read - lengths, 0)

    def taken(self, context: int) -> NDArray[np.int64]:
        """Bytes of one head that ``read_budget`` counts, ``[O]``: moved over, or else read."""
        counted = self.tables.bytes_read if self.most_moved is None else self.tables.bytes_moved
        return counted(context, self.head_dim)

    def most_sequences(self, context: int) -> int:
        """As many as fit with every head on its smallest option."""
        allowed = [expressible(option, self.limits) for option in self.tables.options]
        smallest = int(self.held[context][np.flatnonzero(allowed)].min())
        return self.sequences_of(context, smallest * self.tables.heads)


@dataclass(frozen=True)
class Candidate:
    """One trial's answer.

    Args:
        number: of the trial.
        parameters: what Optuna chose.
        choice: option of each head, ``[I]``.
        kl: predicted on the selection samples, nats/token.
        context: prompt tokens of each sequence.
        sequences: that fit at once.
        prompt_bytes: of one compressed prompt as formats count them, lengths included.
        excess: by which share of each limit it is beyond it; negative where it keeps to it.
        weights: format of the model's weights beside it.
        freed_bytes: that this format leaves beyond the widest one of the question.
        unseen: of a point of the front, loss on samples that the choice did not see.
    """

    number: int
    parameters: dict[str, Any]
    choice: Choice
    kl: float
    context: int
    sequences: int
    prompt_bytes: int
    excess: dict[str, float] = field(default_factory=dict)
    weights: str = ""
    freed_bytes: int = 0
    unseen: Estimate | None = None

    @property
    def believed(self) -> float:
        """Loss without the luck of being the best of many, where that is known, nats/token."""
        return self.kl if self.unseen is None else self.unseen.value

    @property
    def place(self) -> tuple[str, int]:
        """The format of the weights and the context: what memory is left depends on them."""
        return self.weights, self.context

    @property
    def misses(self) -> dict[str, float]:
        """The limits that it does not keep to, and by which share of each."""
        return {name: by for name, by in self.excess.items() if by > 0}

    @property
    def tokens_at_once(self) -> int:
        """Prompt tokens of all sequences together: what memory is spent on."""
        return self.context * self.sequences


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
        try:
            choice = columns[self._solved(problem, columns, budget, parameters["split"])]
        except KvtuneError:
            return None
        return replace(self, question=question).candidate(
            choice, context, sequences, parameters, number
        )

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
        """What a choice comes to, with the weights in the question's (widest) format."""
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
        return with_excess(found, self.question.excess)

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
        option = candidate.parameters.get("uniform")
        name = "kvtune plan" if option is None else f"uniform {option}"
        return policy_of(self.question.tables, candidate.choice, name)


def policy_of(tables: Tables, choice: Choice, name: str) -> Policy:
    """A choice of options, ``[I]``, as a policy."""
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


def holds_whole_prompt(option: Option) -> bool:
    """Whether a prompt's uncompressed cache is held until all layers have read it."""
    return option.method.needs.asks_model or is_linked(option)


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


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that no other beats in both predicted loss and tokens at once, most last.

    Those of each format of the weights among themselves, the widest format first.
    """
    formats = sorted({candidate.freed_bytes for candidate in candidates})
    each = ([c for c in candidates if c.freed_bytes == freed] for freed in formats)
    return [candidate for one in each for candidate in _front(one)]


def _front(candidates: Sequence[Candidate]) -> list[Candidate]:
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.tokens_at_once, c.kl, c.number)):
        if not best or candidate.kl < best[-1].kl:
            best.append(candidate)
    return best[::-1]


def pick(front_: Sequence[Candidate], largest_kl: float) -> Candidate:
    """The candidate with most tokens at once within ``largest_kl``; else the least loss.

    Of several formats of the weights the widest in which there is one: what narrower ones lose is
    in no figure.
    """
    within = [candidate for candidate in front_ if candidate.believed <= largest_kl]
    if within:
        return min(within, key=lambda c: (c.freed_bytes, -c.tokens_at_once))
    return min(front_, key=lambda c: c.believed)
