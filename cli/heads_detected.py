"""How ``kvtune heads detect`` comes to scores: by attention, or by gates that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from kvtune.cli.output import Output
    from kvtune.policies.head_scores import HeadScores
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.samples import Sample

By = Literal["attention", "duo", "rlkv"]


def refuse_unread(context: typer.Context, by: str) -> None:
    """Attention is looked at without steps of learning, and learning repeats no random tokens."""
    from kvtune.cli.unread import refuse_typed

    if by == "attention":
        hint = "gates are learned in steps: add --by duo or --by rlkv, or leave it out."
        refuse_typed(context, ("steps",), "--by attention", hint)
    else:
        hint = "random tokens that repeat are looked at by --by attention: leave it out."
        refuse_typed(context, ("block",), f"--by {by}", hint)


def scored(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    by: By,
    *,
    block: int,
    steps: int | None,
    seed: int,
    output: Output,
) -> HeadScores:
    """Scores of all heads of a model.

    Args:
        loaded: the model.
        samples: needle samples that it reads.
        by: what scores are made from.
        block: random tokens that repeat, which attention is looked at over.
        steps: of learning gates; None for as many as usual.
        seed: of everything drawn.
        output: where progress is shown.
    """
    if by == "attention":
        return _measured(loaded, samples, block, seed, output)
    given = {"seed": seed} | ({} if steps is None else {"steps": steps})
    learned = _duo if by == "duo" else _rlkv
    return learned(loaded, samples, given, output)


def _measured(
    loaded: LoadedModel, samples: Sequence[Sample], block: int, seed: int, output: Output
) -> HeadScores:
    from kvtune.runtime.head_detectors import detect as measure

    return measure(loaded, samples, block=block, seed=seed, progress=output.progress)


def _duo(
    loaded: LoadedModel, samples: Sequence[Sample], given: dict[str, int], output: Output
) -> HeadScores:
    from kvtune.runtime.duo_gates import Distillation, duo_scores, train_gates

    training = Distillation(**given)
    return duo_scores(
        loaded, train_gates(loaded, samples, training, progress=output.progress), training
    )


def _rlkv(
    loaded: LoadedModel, samples: Sequence[Sample], given: dict[str, int], output: Output
) -> HeadScores:
    from kvtune.runtime.rlkv_gates import GateTraining, questions_of, rlkv_scores, train_gates

    training = GateTraining(**given)
    asked = questions_of(samples, loaded.device)
    gates = train_gates(loaded, asked, training, progress=output.progress)
    return rlkv_scores(loaded, gates, training)
