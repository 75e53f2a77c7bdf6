"""The outer search: an Optuna study over few, meaningful choices, the Gram solver inside.

Sampling runs in memory; finished trials are recorded in a journal, so that an interrupted study
goes on where it was. A trial is solved on the search samples and judged on the selection samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        prompt_tokens: P that a sequence's cache is planned for.
        cache_bytes: room for all sequences' caches.
        generated_bytes: that each sequence's generated tokens take, in 16 bits.
        sequences: how many at once; None lets the study choose.
    """

    tables: Tables
    head_dim: int
    prompt_tokens: int
    cache_bytes: int
    generated_bytes: int
    sequences: int | None = None

    @property
    def full_bytes(self) -> int:
        """Bytes of one uncompressed prompt, bf16."""
        return 2 * 2 * self.prompt_tokens * self.head_dim * self.tables.heads

    def prompt_budget(self, sequences: int) -> int:
        """Bytes that each sequence's compressed prompt may take."""
        lengths = footprint_of_lengths(1, self.tables.heads)
        return self.cache_bytes // sequences - self.generated_bytes - lengths

    @property
    def most_sequences(self) -> int:
        """As many as fit with every head on its smallest option."""
        smallest = int(self.tables.footprints(self.prompt_tokens, self.head_dim).min())
        each = smallest * self.tables.heads + footprint_of_lengths(1, self.tables.heads)
        return int(self.cache_bytes // (each + self.generated_bytes))


@dataclass(frozen=True)
class Candidate:
    """One trial's answer.

    Args:
        number: of the trial.
        parameters: what Optuna chose.
        choice: option of each head, ``[I]``.
        kl: predicted on the selection samples, nats/token.
        sequences: that fit at once.
        prompt_bytes: of one compressed prompt, lengths included.
    """

    number: int
    parameters: dict[str, Any]
    choice: Choice
    kl: float
    sequences: int
    prompt_bytes: int


@dataclass(frozen=True)
class Solver:
    """The question with its tables reduced once, ready for many trials."""

    question: Question
    fit: Problem
    check: Tables

    @staticmethod
    def of(question: Question, rank: int = 64) -> Solver:
        """Fit on the search samples; judge on the selection samples, if there are any."""
        tables = question.tables
        splits = {sample.split for sample in tables.samples}
        footprint = tables.footprints(question.prompt_tokens, question.head_dim)
        fit = Problem.of(tables.of_split("search"), footprint, rank=rank)
        return Solver(question, fit, tables.of_split("select" if "select" in splits else "search"))

    def answer(self, number: int, parameters: dict[str, Any]) -> Candidate | None:
        """Solve one trial; None where its options cannot fit."""
        columns = np.flatnonzero([_allowed(o, parameters) for o in self.question.tables.options])
        sequences = parameters["sequences"]
        budget = self.question.prompt_budget(sequences)
        problem = self.fit.allowing(columns).shrunk(parameters["shrinkage"])
        heads = self.question.tables.kv_heads
        by_layer = parameters["split"] == "layers"
        try:
            picked = solve(problem.tied(heads) if by_layer else problem, budget)
        except KvtuneError:
            return None
        choice = columns[np.repeat(picked, heads) if by_layer else picked]
        kl = float(self.check.sample_weights() @ self.check.by_sample(choice))
        spent = self.fit.spent(choice) + footprint_of_lengths(1, self.question.tables.heads)
        return Candidate(number, parameters, choice, kl, sequences, spent)

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
    chosen["sequences"] = question.sequences or trial.suggest_int(
        "sequences", 1, max(question.most_sequences, 1), log=True
    )
    return chosen


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
) -> list[Candidate]:
    """Search; every finished trial's candidate, in order.

    Args:
        solver: the question.
        trials: how many in all, those found in the journal included.
        seed: of the sampler; the same seed gives the same candidates, interrupted or not.
        journal: file that finished trials are recorded to and resumed from.
        progress: told of every trial.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = ["minimize"] if solver.question.sequences else ["minimize", "maximize"]
    brain = optuna.create_study(directions=directions)
    record = _Journal(journal, directions)
    brain.add_trials(record.trials)
    candidates = [c for t in brain.trials if (c := _recall(solver, t)) is not None]
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
            values = [candidate.kl, candidate.sequences][: len(directions)]
            trial.set_user_attr("parameters", parameters)
            trial.set_user_attr("prompt_bytes", candidate.prompt_bytes)
            brain.tell(trial, values)
            candidates.append(candidate)
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
    """Start from the strong default, per head, over the range of sequences.

    All families with their published hyper-parameters: of thirty settings run live on SmolLM2's
    selection samples, those without our variants did best at 3, 6, 12 and 25 % of the bytes
    (``plans_on_selection`` in ``benchmarks/results/quality-h100.json``).
    """
    most = max(question.most_sequences, 1)
    ladder = sorted({int(n) for n in np.geomspace(1, most, 8).round()})
    steps: Sequence[dict[str, int]] = (
        [{}] if question.sequences else [{"sequences": n} for n in ladder]
    )
    methods = {o.method.name for o in question.tables.options} - {"full"}
    least = min(_bits(f) for o in question.tables.options for f in (o.keys, o.values))
    default: dict[str, Any] = dict.fromkeys(methods, True)
    default |= {name: name != "variants" for name in _switches(question)}
    default |= {"least_bits": least, "split": "heads"}
    for step in steps[skip:]:
        brain.enqueue_trial({**default, "shrinkage": 0.4, **step})


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
    """Candidates that no other beats in both predicted loss and sequences, most sequences last."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.sequences, c.kl, c.number)):
        if not best or candidate.kl < best[-1].kl:
            best.append(candidate)
    return best[::-1]


def pick(front_: Sequence[Candidate], largest_kl: float) -> Candidate:
    """The candidate with most sequences within ``largest_kl``; else the one that loses least."""
    within = [candidate for candidate in front_ if candidate.kl <= largest_kl]
    return max(within, key=lambda c: c.sequences) if within else min(front_, key=lambda c: c.kl)
