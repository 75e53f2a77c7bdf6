"""What a trial may choose, and the trials that every study begins with."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtune.tuner.question import Question
from kvtune.tuner.solver import evicts, has_exact_sinks, is_variant

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
