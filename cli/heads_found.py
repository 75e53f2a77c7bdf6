"""What ``kvtune heads`` asks for: scores measured or learned, and plans that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtune.cli.output import Output
    from kvtune.policies.head_scores import HeadScores
    from kvtune.policies.policy import Policy
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.samples import Sample


def measured(
    loaded: LoadedModel, samples: Sequence[Sample], block: int, seed: int, output: Output
) -> HeadScores:
    """What attention of the samples looks at."""
    from kvtune.runtime.head_detectors import detect as measure

    return measure(loaded, samples, block=block, seed=seed, progress=output.progress)


def duo(
    loaded: LoadedModel, samples: Sequence[Sample], given: dict[str, int], output: Output
) -> HeadScores:
    """Gates that are learned so that states stay as they are (DuoAttention)."""
    from kvtune.runtime.duo_gates import Distillation, duo_scores, train_gates

    training = Distillation(**given)
    return duo_scores(
        loaded, train_gates(loaded, samples, training, progress=output.progress), training
    )


def rlkv(
    loaded: LoadedModel, samples: Sequence[Sample], given: dict[str, int], output: Output
) -> HeadScores:
    """Gates that are learned from generated answers (RLKV)."""
    from kvtune.runtime.rlkv_gates import GateTraining, questions_of, rlkv_scores, train_gates

    training = GateTraining(**given)
    asked = questions_of(samples, loaded.device)
    gates = train_gates(loaded, asked, training, progress=output.progress)
    return rlkv_scores(loaded, gates, training)


def plan_of(
    heads: HeadScores,
    system: str,
    kv_heads: int,
    score: str,
    context: int,
    sparsity: float,
    budget: int,
) -> Policy:
    """A policy by a system's published rule."""
    from kvtune.policies import head_plans

    def of(name: str) -> Any:
        return heads.of_kv_heads(score or name, kv_heads)

    if system == "razor":
        echo = heads.of_kv_heads("echo", kv_heads)
        return head_plans.razor_plan(of("induction"), echo, context)
    if system == "duo":
        return head_plans.gates_plan("DuoAttention", of("duo"), sparsity, head_plans.DUO, 256)
    if system == "rlkv":
        return head_plans.gates_plan("RLKV", of("rlkv"), sparsity, head_plans.RLKV, 64)
    return head_plans.headkv_plan(of("retrieval"), budget)
