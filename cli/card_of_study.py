"""The policy card of a finished study."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvtune.cli.command_line_of import command_of
from kvtune.cli.policy_card import Budget, Card, Other, Task
from kvtune.common.errors import KvtuneError
from kvtune.tuner.explore.dimensions import in_words
from kvtune.tuner.explore.study import Study

if TYPE_CHECKING:
    from kvtune.common.estimate import Estimate
    from kvtune.tuner.explore.view import View
    from kvtune.tuner.stored_result import StoredResult

_ROWS = 8  # budgets on one page


def card_of(study: Study) -> Card:
    """The card of a finished study's plan.

    Raises:
        KvtuneError: the search has not finished, or its plan was edited since.
    """
    from kvtune.tuner.explore.view import View
    from kvtune.tuner.explore.what_if import Setting, figures_of
    from kvtune.tuner.rounding import said_of_rounding
    from kvtune.tuner.verdict import verdict_of

    verdict, outcome, row, facts = verdict_of(study), study.outcome, study.chosen, study.facts
    if verdict is None or outcome is None or row is None:
        raise KvtuneError(
            f"this search is {study.state}, and a card is of a finished one",
            where=str(study.folder),
            hint="run the same search again to go on, then ask for its card.",
        )
    _refuse_edited(study)
    setting = Setting.asked(facts)
    view = View(study, figures_of(study, setting), setting)
    ran = [outcome.plan, *outcome.baselines[1:]]
    figures = view.figures
    return Card(
        kvtune_card=2,
        kvtune=facts.kvtune,
        model=facts.shape.name,
        model_source=facts.shape.source,
        trace_hash=_hash(outcome.provenance),
        gpu=facts.card.name,
        memory_limit_bytes=facts.memory_bytes,
        verdict=verdict.sentence,
        comparison=verdict.comparison,
        quality_source=facts.source,
        stand_in=facts.stand_in,
        stack=outcome.quality.stack,
        kl=outcome.quality.kl,
        held_out_samples=facts.held_out_samples,
        measured_tokens=facts.measured_tokens,
        retrieval=outcome.plan.retrieval_accuracy,
        full_cache_retrieval=outcome.full_cache_accuracy,
        context_tokens=verdict.context_tokens,
        sequences=verdict.sequences,
        at_once=_at_once(view, row, outcome, verdict.sequences),
        full_cache_sequences=verdict.full_cache_sequences,
        prompt_bytes=int(figures.prompt_bytes[row]),
        share=float(figures.share[row]),
        memory=outcome.memory,
        time_per_token=figures.estimate("step_s", row),
        tokens_per_second=figures.estimate("tokens_per_s", row),
        budgets=tuple(_budgets(view)),
        policies=tuple(_others(outcome)),
        command=command_of(study),
        tasks=tuple(_tasks(study, row)),
        layout=facts.layout,
        other_lengths=outcome.other_lengths,
        rounding=said_of_rounding(outcome.provenance, ran) or "",
    )


def _at_once(view: View, row: int, outcome: StoredResult, sequences: int) -> Estimate:
    """How many prompts fit at once, with the interval that memory leaves."""
    from kvtune.simulator.memory.at_once import prompts_at_once

    waiting = int(view.figures.waiting[row])
    return prompts_at_once(
        sequences, view.figures.budget(row).most_of(outcome.sequence_bytes, waiting)
    )


def _refuse_edited(study: Study) -> None:
    """A card tells a loss, which nobody knows of a plan that was edited."""
    from kvtune.tuner.edited import is_edited
    from kvtune.tuner.result import PLAN_FILE

    if is_edited(study.folder / PLAN_FILE):
        raise KvtuneError(
            "edited since it was searched: its loss is not known, and a card tells it",
            where=str(study.folder / PLAN_FILE),
            hint=f"kvtune validate {study.folder} measures it; the same search writes the plan "
            "anew, and keeps the edited file beside it.",
        )


def _others(outcome: StoredResult) -> Iterator[Other]:
    """The plan and its baselines, with what each loses."""
    for row in outcome.baselines:
        yield Other(row.name, row.prompt_bytes, row.predicted, row.live, row.retrieval_accuracy)


_ABOUT = {
    "prose": "going on with prose",
    "code": "going on with source code",
    "retrieval": "8 numbers hidden in text: RULER's multi-key needles",
    "recall": "values of keys in a long list (Liu et al., 2023)",
    "chat": "answers about a manual, turn by turn",
    "copy": "a long text, word for word",
    "guide": "going on with kvtune's own pages",
    "source": "going on with kvtune's own sources",
    "json": "orders of a few customers as JSON, made up",
    "logs": "lines that services write while they answer requests, made up",
    "dialogue": "two people settling who brings what, made up",
    "language": "stories in German, French and Spanish, made up",
    "user": "the searcher's own text",
}


def _tasks(study: Study, row: int) -> Iterator[Task]:
    live = study.live(study.plans[row])
    measured = live.by_kind if live else {}
    predicted = study.outcome.plan.by_kind if study.outcome else {}
    for kind, loss in predicted.items():
        yield Task(kind, _ABOUT.get(kind, ""), loss, measured.get(kind))


def _hash(provenance: dict[str, Any]) -> str:
    """Of the trace, else of the stand-in's weights, as far as the result says."""
    stand_in = provenance.get("stand_in")
    weights = stand_in.get("model_fingerprint", "") if isinstance(stand_in, dict) else ""
    return str(provenance.get("trace") or weights)


def _budgets(view: View) -> Iterator[Budget]:
    """The chosen plan, and plans of the front evenly between its ends."""
    study, figures = view.study, view.figures
    rows = sorted(map(int, view.front), key=lambda row: int(figures.prompt_bytes[row]))
    last = len(rows) - 1
    evenly = (
        {round(i * last / (_ROWS - 1)) for i in range(_ROWS)} if last >= _ROWS else range(_ROWS)
    )
    for place, row in enumerate(rows):
        if place in evenly or row == study.chosen:
            yield Budget(
                share=float(figures.share[row]),
                prompt_bytes=int(figures.prompt_bytes[row]),
                context_tokens=int(figures.context_tokens[row]),
                sequences=int(figures.tokens_that_fit[row] // figures.context_tokens[row]),
                kl=study.plans[row].kl,
                chosen=row == study.chosen,
                policy=in_words(study, row),
            )
