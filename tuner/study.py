"""The outer search: an Optuna study over few, meaningful choices, the Gram solver inside.

Sampling runs in memory; finished trials are recorded in a journal, so that an interrupted study
goes on where it was. A trial is solved on the search samples and judged on the selection samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress, Silent
from kvtune.policies.format import Format
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.tables import Tables
from kvtune.tuner.allocate import Choice, Problem, solve

if TYPE_CHECKING:
    import optuna

SPLITS = ("heads", "layers")


@dataclass(frozen=True)
class Question:
    """What is fixed before the study: the room for caches and what is asked of it.

    Args:
        tables: quality of options on the model, every split.
        head_dim: of the model that will run, which a stand-in's tables may differ from.
        rooms: bytes left for all sequences' caches, by the context P of a sequence in tokens;
            of several contexts the study chooses.
        generated_bytes: that each sequence's generated tokens take, in 16 bits.
        sequences: how many at once; None lets the study choose.
    """

    tables: Tables
    head_dim: int
    rooms: Mapping[int, int]
    generated_bytes: int
    sequences: int | None = None

    @property
    def contexts(self) -> list[int]:
        """Those that the study may choose, shortest first."""
        return sorted(self.rooms)

    def full_bytes(self, context: int) -> int:
        """Bytes of one uncompressed prompt, bf16."""
        return 2 * 2 * context * self.head_dim * self.tables.heads

    def prompt_budget(self, context: int, sequences: int, waits: bool = False) -> int:
        """Bytes that each sequence's compressed prompt may take.

        Args:
            context: prompt tokens.
            sequences: at once.
            waits: whether a policy may wait for a prompt's end, all layers of one uncompressed.
        """
        lengths = footprint_of_lengths(1, self.tables.heads)
        layers = self.tables.layers
        waiting = self.full_bytes(context) * (layers - 1) // layers if waits else 0
        return (self.rooms[context] - waiting) // sequences - self.generated_bytes - lengths

    def most_sequences(self, context: int) -> int:
        """As many as fit with every head on its smallest option."""
        smallest = int(self.tables.footprints(context, self.head_dim).min())
        each = smallest * self.tables.heads + footprint_of_lengths(1, self.tables.heads)
        return int(self.rooms[context] // (each + self.generated_bytes))


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
        prompt_bytes: of one compressed prompt, lengths included.
    """

    number: int
    parameters: dict[str, Any]
    choice: Choice
    kl: float
    context: int
    sequences: int
    prompt_bytes: int

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
        """Fit on the search samples; judge on the selection samples, if there are any."""
        tables = question.tables
        splits = {sample.split for sample in tables.samples}
        footprints = {c: tables.footprints(c, question.head_dim) for c in question.contexts}
        fit = Problem.of(tables.of_split("search"), footprints[question.contexts[0]], rank=rank)
        problems = {context: replace(fit, footprint=f) for context, f in footprints.items()}
        check = tables.of_split("select" if "select" in splits else "search")
        return Solver(question, problems, check)

    def answer(self, number: int, parameters: dict[str, Any]) -> Candidate | None:
        """Solve one trial; None where its options cannot fit."""
        columns = np.flatnonzero([_allowed(o, parameters) for o in self.question.tables.options])
        context, sequences = parameters["context"], parameters["sequences"]
        waits = any(self.question.tables.options[o].method.needs.reconstruction for o in columns)
        budget = self.question.prompt_budget(context, sequences, waits)
        whole = self.problems[context]
        problem = whole.allowing(columns).shrunk(parameters["shrinkage"])
        heads = self.question.tables.kv_heads
        by_layer = parameters["split"] == "layers"
        try:
            picked = solve(problem.tied(heads) if by_layer else problem, budget)
        except KvtuneError:
            return None
        choice = columns[np.repeat(picked, heads) if by_layer else picked]
        kl = float(self.check.sample_weights() @ self.check.by_sample(choice))
        spent = whole.spent(choice) + footprint_of_lengths(1, self.question.tables.heads)
        return Candidate(number, parameters, choice, kl, context, sequences, spent)

    def policy(self, candidate: Candidate, name: str = "kvtune plan") -> Policy:
        """The candidate as a policy, budgets as shares of the prompt."""
        options = self.question.tables.options
        rows = candidate.choice.reshape(-1, self.question.tables.kv_heads)
        return Policy(name, tuple(tuple(options[o] for o in row) for row in rows))


def _allowed(option: Option, parameters: dict[str, Any]) -> bool:
    """Whether a trial's families and precisions admit an option; all-token options always are."""
    if _evicts(option):
        if not parameters.get(option.method.name, True):
            return False
        if _is_variant(option) and not parameters.get("variants", True):
            return False
    if _exact_sinks(option) and not parameters.get("exact_sinks", True):
        return False
    return all(_bits(form) >= parameters["least_bits"] for form in (option.keys, option.values))


def _evicts(option: Option) -> bool:
    return option.budget.share is not None or option.budget.tokens is not None


def _is_variant(option: Option) -> bool:
    """Whether the method runs with other hyper-parameters than the published ones."""
    return option.method != type(option.method)()


def _exact_sinks(option: Option) -> bool:
    return any(getattr(form, "exact_first", 0) > 0 for form in (option.keys, option.values))


def _bits(form: Format) -> int:
    return int(getattr(form, "bits", 8 if form.name == "fp8" else 16))


def suggest(trial: optuna.Trial, question: Question) -> dict[str, Any]:
    """The outer choices of one trial."""
    methods = sorted({o.method.name for o in question.tables.options} - {"full"})
    least = sorted({_bits(f) for o in question.tables.options for f in (o.keys, o.values)})
    chosen: dict[str, Any] = {
        name: trial.suggest_categorical(name, [True, False]) for name in methods
    }
    if not any(chosen.values()):
        chosen = dict.fromkeys(methods, True)
    for name in _switches(question):
        chosen[name] = trial.suggest_categorical(name, [True, False])
    chosen["least_bits"] = trial.suggest_categorical("least_bits", least)
    chosen["split"] = trial.suggest_categorical("split", list(SPLITS))
    chosen["shrinkage"] = trial.suggest_float("shrinkage", 0.0, 0.8)
    context = question.contexts[0]
    if len(question.contexts) > 1:
        context = trial.suggest_categorical("context", question.contexts)
    chosen["context"] = context
    chosen["sequences"] = question.sequences or trial.suggest_int(
        _sequences_at(context), 1, max(question.most_sequences(context), 1), log=True
    )
    return chosen


def _sequences_at(context: int) -> str:
    """A context's own parameter: how many sequences fit depends on it."""
    return f"sequences of {context} tokens"


def _switches(question: Question) -> list[str]:
    """What can be left out as a whole: our variants of methods, sinks stored in 16 bits."""
    present = {
        "variants": any(_evicts(o) and _is_variant(o) for o in question.tables.options),
        "exact_sinks": any(_exact_sinks(o) for o in question.tables.options),
    }
    return [name for name, there in present.items() if there]


def run_study(
    solver: Solver,
    *,
    trials: int,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    found: Callable[[Candidate], None] = lambda _: None,
) -> list[Candidate]:
    """Search; every finished trial's candidate, in order.

    Args:
        solver: the question.
        trials: how many in all, those found in the journal included.
        seed: of the sampler; the same seed gives the same candidates, interrupted or not.
        journal: file that finished trials are recorded to and resumed from.
        progress: told of every trial.
        found: told of every candidate, those of the journal first.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    fixed = solver.question.sequences and len(solver.question.contexts) == 1
    directions = ["minimize"] if fixed else ["minimize", "maximize"]
    brain = optuna.create_study(directions=directions)
    record = _Journal(journal, directions)
    brain.add_trials(record.trials)
    candidates = []
    for candidate in (_recall(solver, trial) for trial in brain.trials):
        if candidate is not None:
            candidates.append(candidate)
            found(candidate)
    remaining = range(len(brain.trials), trials)
    if remaining:
        _enqueue_defaults(brain, solver.question, skip=len(brain.trials))
    for _ in (progress or Silent()).track(remaining, "searching", len(remaining)):
        brain.sampler = _sampler(seed, len(brain.trials))
        trial = brain.ask()
        parameters = suggest(trial, solver.question)
        candidate = solver.answer(trial.number, parameters)
        if candidate is None:
            brain.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            values = [candidate.kl, candidate.tokens_at_once][: len(directions)]
            trial.set_user_attr("parameters", parameters)
            trial.set_user_attr("prompt_bytes", candidate.prompt_bytes)
            brain.tell(trial, values)
            candidates.append(candidate)
            found(candidate)
        record.add(brain.trials[trial.number])
    return candidates


def _sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """A trial's own: its draws must not depend on how many were drawn since the last start."""
    import optuna

    stream = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return optuna.samplers.TPESampler(seed=stream, n_startup_trials=16)


def _recall(solver: Solver, trial: optuna.trial.FrozenTrial) -> Candidate | None:
    """A recorded trial's candidate, solved again: milliseconds, and nothing big is stored."""
    parameters = trial.user_attrs.get("parameters")
    return None if parameters is None else solver.answer(trial.number, parameters)


def _enqueue_defaults(brain: optuna.Study, question: Question, skip: int) -> None:
    """Start from the strong default, per head, over the range of contexts and sequences.

    All families with their published hyper-parameters: of the settings run live on SmolLM2's
    selection samples, none without sinks in 16 bits did better from 6 % of the bytes on, and the
    share of the cross terms mattered little (``plans_on_selection`` in
    ``benchmarks/results/quality-h100.json``).
    """
    methods = {o.method.name for o in question.tables.options} - {"full"}
    least = min(_bits(f) for o in question.tables.options for f in (o.keys, o.values))
    default: dict[str, Any] = dict.fromkeys(methods, True)
    default |= {name: name != "variants" for name in _switches(question)}
    default |= {"least_bits": least, "split": "heads"}
    for step in _ladder(question)[skip:]:
        brain.enqueue_trial({**default, "shrinkage": 0.4, **step})


def _ladder(question: Question) -> list[dict[str, int]]:
    """Steps from one sequence to as many as fit, eight in all or five a context."""
    several = len(question.contexts) > 1
    count = max(8 // len(question.contexts), 5)
    steps = []
    for context in question.contexts:
        here = {"context": context} if several else {}
        most = max(question.most_sequences(context), 1)
        numbers = sorted({int(n) for n in np.geomspace(1, most, count).round()})
        name = _sequences_at(context)
        steps += [here] if question.sequences else [{**here, name: n} for n in numbers]
    return steps


class _Journal:
    """Finished trials on disk. Sampling from it would cost far more than recording to it."""

    def __init__(self, path: Path | None, directions: list[str]) -> None:
        self.study: optuna.Study | None = None
        if path is not None:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            path.parent.mkdir(parents=True, exist_ok=True)
            storage = JournalStorage(JournalFileBackend(str(path)))
            self.study = optuna.create_study(
                storage=storage, study_name="kvtune", directions=directions, load_if_exists=True
            )

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.trials if self.study else []

    def add(self, trial: optuna.trial.FrozenTrial) -> None:
        if self.study:
            self.study.add_trial(trial)


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that no other beats in both predicted loss and tokens at once, most last."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.tokens_at_once, c.kl, c.number)):
        if not best or candidate.kl < best[-1].kl:
            best.append(candidate)
    return best[::-1]


def pick(front_: Sequence[Candidate], largest_kl: float) -> Candidate:
    """The candidate with most tokens at once within ``largest_kl``; else the least loss."""
    within = [candidate for candidate in front_ if candidate.kl <= largest_kl]
    if within:
        return max(within, key=lambda c: c.tokens_at_once)
    return min(front_, key=lambda c: c.kl)
