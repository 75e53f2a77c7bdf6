"""The outer search: an Optuna study over few, meaningful choices, the Gram solver inside.

Sampling runs in memory; finished trials are recorded in a journal, so that an interrupted study
goes on where it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress, Silent
from kvtune.tuner.journal import Journal, Trial
from kvtune.tuner.question import Candidate, Question, Solver, evicts, has_exact_sinks, is_variant
from kvtune.tuner.samplers import Sampler, sampler_of
from kvtune.tuner.stagnation import PATIENCE, stagnates

if TYPE_CHECKING:
    import optuna


def suggest(trial: optuna.Trial, question: Question) -> dict[str, Any]:
    """The outer choices of one trial."""
    methods = sorted({o.method.name for o in question.options} - {"full"})
    least = sorted({f.bits for o in question.options for f in (o.keys, o.values)})
    chosen: dict[str, Any] = {
        name: trial.suggest_categorical(name, [True, False]) for name in methods
    }
    if not any(chosen.values()):
        chosen = dict.fromkeys(methods, True)
    for name in _switches(question):
        chosen[name] = trial.suggest_categorical(name, [True, False])
    chosen["least_bits"] = trial.suggest_categorical("least_bits", least)
    if question.narrow_formats:
        chosen["format"] = trial.suggest_categorical("format", question.narrow_formats)
    chosen["split"] = trial.suggest_categorical("split", list(question.splits))
    chosen["shrinkage"] = trial.suggest_float("shrinkage", 0.0, 0.8)
    context = question.contexts[0]
    if len(question.contexts) > 1:
        context = trial.suggest_categorical("context", question.contexts)
    chosen["context"] = context
    if len(question.freed) > 1:
        chosen["weights"] = trial.suggest_categorical("weights", list(question.freed))
        question = question.under(chosen["weights"])
    chosen["sequences"] = question.sequences or trial.suggest_int(
        _sequences_at(context, chosen.get("weights")),
        1,
        max(question.most_sequences(context), 1),
        log=True,
    )
    return chosen


def _sequences_at(context: int, weights: str | None) -> str:
    """A parameter of each context and format of weights: how many fit depends on them."""
    return f"sequences of {context} tokens" + (f", {weights} weights" if weights else "")


def _switches(question: Question) -> list[str]:
    """What can be left out as a whole: our variants of methods, sinks stored in 16 bits."""
    present = {
        "variants": any(evicts(o) and is_variant(o) for o in question.options),
        "exact_sinks": any(has_exact_sinks(o) for o in question.options),
    }
    return [name for name, there in present.items() if there]


def run_study(
    solver: Solver,
    *,
    trials: int,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    sampler: Sampler = "tpe",
    found: Callable[[Candidate], None] = lambda _: None,
) -> list[Candidate]:
    """Search; every finished trial's candidate, in order.

    It ends before all trials are done where the front has stopped to grow.

    Args:
        solver: the question.
        trials: how many in all, those found in the journal included.
        seed: of the sampler; the same seed gives the same candidates, interrupted or not.
        journal: file that finished trials are recorded to and resumed from.
        progress: told of every trial.
        sampler: which proposes the trials.
        found: told of every candidate, those of the journal first.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    progress = progress or Silent()
    brain = optuna.create_study(directions=list(solver.question.objectives))
    record = Journal(journal, progress)
    known = [_replay(brain, solver, trial, record, sampler, seed) for trial in record.trials]
    remaining = range(len(known), trials)
    if remaining:
        enqueue_defaults(brain, solver.question, skip=len(known))

    def new() -> Iterator[Candidate | None]:
        for number in progress.track(remaining, "searching", len(remaining)):
            if stagnates(candidates):
                progress.note(f"stopped after {number} trials: the last {PATIENCE} added nothing")
                return
            brain.sampler = sampler_of(sampler, seed, number)
            candidate = _try(brain, solver)
            record.add(_recorded(brain.trials[number]))
            yield candidate

    candidates: list[Candidate] = []
    for candidate in chain(known, new()):
        if candidate is not None:
            candidates.append(candidate)
            found(candidate)
    return candidates


def _try(brain: optuna.Study, solver: Solver) -> Candidate | None:
    """The next trial's candidate; None, and a failed trial, where its options cannot fit."""
    from optuna.trial import TrialState

    trial = brain.ask()
    _ = trial.relative_params  # NSGA-II overlooks parents whose proposals nobody looked at
    candidate = _answered(trial, solver)
    if candidate is None:
        brain.tell(trial, state=TrialState.FAIL)
        return None
    brain.tell(trial, _values(candidate, solver.question))
    return candidate


def values_of(trial: optuna.Trial, solver: Solver) -> list[float] | None:
    """A trial's values; None where its options cannot fit."""
    candidate = _answered(trial, solver)
    return None if candidate is None else _values(candidate, solver.question)


def _answered(trial: optuna.Trial, solver: Solver) -> Candidate | None:
    """The candidate of what a trial chooses, its limits told to the sampler."""
    candidate = solver.answer(trial.number, suggest(trial, solver.question))
    for name, by in candidate.excess.items() if candidate else ():
        trial.set_constraint(name, by)
    return candidate


def _values(candidate: Candidate, question: Question) -> list[float]:
    """What the question's objectives are of a candidate."""
    several = len(question.freed) > 1
    return [
        candidate.kl,
        *([float(candidate.tokens_at_once)] if "maximize" in question.objectives else []),
        *([float(candidate.freed_bytes)] if several else []),
    ]


def _recorded(trial: optuna.trial.FrozenTrial) -> Trial:
    state: Literal["complete", "failed"] = "complete" if trial.values else "failed"
    return Trial(trial.number, state, dict(trial.params))


def _replay(
    brain: optuna.Study,
    solver: Solver,
    trial: Trial,
    journal: Journal,
    sampler: Sampler,
    seed: int,
) -> Candidate | None:
    """A recorded trial's candidate, solved again: milliseconds, and nothing big is stored.

    Raises:
        KvtuneError: this question's trials cannot choose what was recorded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of choices that are out of range; refused below
        brain.enqueue_trial(trial.parameters)
        brain.sampler = sampler_of(sampler, seed, trial.trial)
        candidate = _try(brain, solver)
    if _recorded(brain.trials[trial.trial]) != trial:
        raise KvtuneError(
            f"trial {trial.trial} does not belong to this search",
            where=str(journal.path),
            hint="remove the file; the same search then begins anew.",
        )
    return candidate


def enqueue_defaults(brain: optuna.Study, question: Question, skip: int) -> None:
    """Start from the strong default, per head, over the range of contexts and sequences.

    All families with their published hyper-parameters: of the settings run live on SmolLM2's
    selection samples, none without sinks in 16 bits did better from 6 % of the bytes on, and the
    share of the cross terms mattered little (``plans_on_selection`` in
    ``benchmarks/results/quality-h100.json``).
    """
    methods = sorted({o.method.name for o in question.options} - {"full"})
    least = min(f.bits for o in question.options for f in (o.keys, o.values))
    default: dict[str, Any] = dict.fromkeys(methods, True)
    reads_less = question.read_budget is not None  # by readers whose blocks are pages: variants
    default |= {name: name != "variants" or reads_less for name in _switches(question)}
    default |= {"least_bits": least, "split": question.splits[0]}
    formats: list[dict[str, str]] = [{"format": name} for name in question.narrow_formats] or [{}]
    starts = [{**step, **form} for form in formats for step in _ladder(question)]
    for start in starts[skip:]:
        brain.enqueue_trial({**default, "shrinkage": 0.4, **start})


def _ladder(question: Question) -> list[dict[str, Any]]:
    """Steps from one sequence to as many as fit: eight, or five a context and format of weights."""
    contexts, formats = question.contexts, list(question.freed)
    count = max(8 // (len(contexts) * len(formats)), 5)
    steps: list[dict[str, Any]] = []
    for context, weights in product(contexts, formats):
        here: dict[str, Any] = {"context": context} if len(contexts) > 1 else {}
        here |= {"weights": weights} if len(formats) > 1 else {}
        most = max(question.under(weights).most_sequences(context), 1)
        numbers = sorted({int(n) for n in np.geomspace(1, most, count).round()})
        name = _sequences_at(context, here.get("weights"))
        steps += [here] if question.sequences else [{**here, name: n} for n in numbers]
    return steps
