"""What a long plan needs of the model: traces with long observed parts, and live generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtune.common.progress import Progress
from kvtune.policies.policy import Policy
from kvtune.runtime.generate import Generations
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
_CACHE_BYTES = 4 * 2**30  # of caches that generate side by side, if none of them evicted
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Live:
    """Generations of all policies on several prompts, and whether their steps were replayed.

    Args:
        runs: every policy on each prompt.
        replayed: steps that were replayed as a graph.
        fault: why no graph was made, if one was tried.
    """

    runs: list[list[GenerationRun]]
    replayed: int
    fault: str


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
    prompts: Sequence[Sequence[int]],
    policies: Sequence[LivePolicy],
    tokens: int,
    *,
    seeds: Sequence[int] = (),
    until: Callable[[], bool] = lambda: False,
    stretch: int = 16,
) -> Live:
    """Generate under several policies beside the full cache, whose tokens all of them read.

    Args:
        loaded: the model.
        prompts: equally long, and generated from side by side; the last token of each is the first
            to be read from its caches.
        policies: policies with their limits.
        tokens: to generate.
        seeds: of each full cache's choices; 0, 1, 2... unless given.
        until: whether to stop where it stands.
        stretch: tokens between two looks at that.
    """
    end = loaded.tokenizer.eos_token_id
    generations = Generations(
        loaded,
        prompts,
        policies,
        room=tokens,
        temperature=TEMPERATURE,
        seeds=seeds,
        banned=[] if end is None else [end],
    )
    while generations.generated < tokens:
        generations.advance(stretch)
        if until():
            break
    return Live(generations.runs(), generations.steps.replayed, generations.steps.fault)


def in_batches(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policies: Sequence[LivePolicy],
    prompt_tokens: int,
    tokens: int,
    progress: Progress,
) -> list[list[GenerationRun]]:
    """Each sample's prompt generated from, as many side by side as memory is meant to take."""
    geometry = loaded.geometry
    entries = geometry.layers * geometry.kv_heads * (prompt_tokens + tokens)
    each = entries * 2 * geometry.head_dim * _FLOAT_BYTES * (1 + len(policies))
    at_once = max(1, _CACHE_BYTES // each)
    batches = [range(at, min(at + at_once, len(samples))) for at in range(0, len(samples), at_once)]
    found = []
    for batch in progress.track(batches, "generating live", len(batches)):
        prompts = [samples[number].token_ids[: prompt_tokens + 1] for number in batch]
        found += generate(loaded, prompts, policies, tokens, seeds=batch).runs
    return found


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
        policies = [live_policy(plan.policy, asked) for plan in plans]
        ahead = min(tokens, asked.tokens)
        runs = in_batches(loaded, samples, policies, asked.prompt_tokens, ahead, progress)
        losses = np.array([[run.kl.mean() for run in each] for each in runs], float)
        return [mean_over_kinds(each, [sample.kind for sample in samples]) for each in losses.T]

    return run
