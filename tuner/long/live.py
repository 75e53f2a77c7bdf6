"""What a long plan needs of the model: traces with long observed parts, and live generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvtune.common.progress import Progress
from kvtune.policies.policy import Policy
from kvtune.runtime.generate import Generation
from kvtune.runtime.generation_run import GenerationRun
from kvtune.runtime.live_policies import LivePolicy
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.traces.trace import Trace
from kvtune.tuner.long.menu import LongMenu
from kvtune.tuner.long.plans import Generated, LongPlan, RunPlans
from kvtune.tuner.quality import mean_over_kinds
from kvtune.tuner.sources import queries_of, signals_of

PROBES = 4
TEMPERATURE = 1.0
"""Of the full cache's choices: greedy texts of a small model repeat themselves."""


def capture_long(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    folder: Path,
    menu: LongMenu,
    progress: Progress | None = None,
) -> Trace:
    """Record samples with what the menu's methods read."""
    from kvtune.traces.capture import capture

    return capture(
        loaded,
        samples,
        folder,
        probes=PROBES,
        signals=signals_of(menu.needs),
        queries=queries_of(menu.needs, samples[0].observed),
        progress=progress,
    )


def generate(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    policies: Sequence[LivePolicy],
    tokens: int,
    *,
    seed: int = 0,
    until: Callable[[], bool] = lambda: False,
    stretch: int = 16,
) -> list[GenerationRun]:
    """Generate under several policies beside the full cache, whose tokens all of them read.

    Args:
        loaded: the model.
        prompt_ids: its last token is the first to be read from the caches.
        policies: policies with their limits.
        tokens: to generate.
        seed: of the full cache's choices.
        until: whether to stop where it stands.
        stretch: tokens between two looks at that.
    """
    end = loaded.tokenizer.eos_token_id
    generation = Generation(
        loaded,
        prompt_ids,
        policies,
        room=tokens,
        temperature=TEMPERATURE,
        seed=seed,
        banned=[] if end is None else [end],
    )
    while generation.generated < tokens:
        generation.advance(stretch)
        if until():
            break
    return generation.results()


def live_policy(policy: Policy, asked: Generated) -> LivePolicy:
    """A policy in a generation, held to the bound."""
    return LivePolicy(policy, residual=asked.menu.residual, limit_bytes=asked.bound_bytes)


def live_rounds(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    asked: Generated,
    tokens: int,
    progress: Progress,
) -> RunPlans:
    """How to run plans on the selection prompts for a few tokens of what is planned for."""

    def run(plans: Sequence[LongPlan]) -> list[float]:
        each: list[list[float]] = []
        for sample in progress.track(samples, "generating live", len(samples)):
            policies = [live_policy(plan.policy, asked) for plan in plans]
            ids = sample.token_ids[: asked.prompt_tokens + 1]
            runs = generate(loaded, ids, policies, min(tokens, asked.tokens), seed=len(each))
            each.append([float(run.kl.mean()) for run in runs])
        kinds = [sample.kind for sample in samples]
        return [mean_over_kinds(losses, kinds) for losses in np.array(each).T]

    return run
