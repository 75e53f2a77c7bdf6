"""What a claim is measured by: one sample, several policies, a figure each; more is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvtune.benchmarks.decode_replay import replay_decoding
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.method import Method, find_method
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import ALL_QUERIES, Needs
from kvtune.runtime.generate import Generation, prompt_signals
from kvtune.runtime.live import LiveRun, run_live
from kvtune.runtime.live_policies import LivePolicy
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.tuner.validate import union_of_needs


@dataclass(frozen=True)
class NamedPolicy:
    """A policy by names, so that one whose method is missing is skipped alone."""

    method: str
    share: float = 0.0
    tokens: int | None = None
    parameters: tuple[tuple[str, Any], ...] = ()
    allocator: Allocator = AsGiven()
    stored: tuple[Format, Format] = (Bf16(), Bf16())

    def made(self) -> Method:
        return find_method(self.method)(**dict(self.parameters))

    def policy(self, loaded: LoadedModel, whole: int) -> Policy:
        """Its share is of ``whole`` tokens."""
        tokens = self.tokens or round(self.share * whole)
        shape = loaded.geometry.layers, loaded.geometry.kv_heads
        option = Option(self.made(), Budget(tokens=tokens), *self.stored)
        return Policy.uniform(option, *shape, allocator=self.allocator)


Measure = Callable[[LoadedModel, Sample, Sequence[NamedPolicy]], list[float]]


def generated(loaded: LoadedModel, sample: Sample, named: Sequence[NamedPolicy]) -> list[float]:
    """Less KL a token while the full cache generates as many tokens as a sample observes."""
    room, prompt = sample.observed, sample.token_ids[: sample.prompt]
    live = [LivePolicy(each.policy(loaded, len(sample.token_ids))) for each in named]
    generation = Generation(loaded, prompt, live, room=room, temperature=1.0, seed=1)
    generation.advance(room)
    return [-float(run.kl.mean()) for run in generation.results()]


def cosine(loaded: LoadedModel, sample: Sample, named: Sequence[NamedPolicy]) -> list[float]:
    """Cosine of the masked with the full attention, replayed on a sample's observed tokens."""
    layers = list(replayable(loaded, sample))
    budgets = np.ones((1, loaded.geometry.kv_heads), np.int64)
    found = []
    for each in named:
        method, tokens = each.made(), round(each.share * len(sample.token_ids))
        assert isinstance(method, DecodeMethod)
        runs = (replay_decoding(layer, method, tokens * budgets) for layer in layers)
        found.append(float(np.mean([float(run.cosine.mean()) for run in runs])))
    return found


def replayable(loaded: LoadedModel, sample: Sample) -> Iterator[LayerReplay]:
    """The layers of a whole sample, split where its observed tokens begin; without probes."""
    whole = prompt_signals(loaded, (*sample.token_ids, sample.next_token), Needs(ALL_QUERIES))
    for layer in range(loaded.geometry.layers):
        signals, at = whole(layer), sample.prompt
        prompt = replace(
            signals,
            queries=signals.queries[:, :at],
            keys=signals.keys[:, :at],
            values=signals.values[:, :at],
            _memo={},
        )
        queries = signals.queries[:, at:].unflatten(0, (signals.keys.shape[0], -1))
        rest = signals.keys[:, at:], signals.values[:, at:]
        yield LayerReplay(prompt, queries, *rest, torch.empty(0))


def _live(loaded: LoadedModel, sample: Sample, named: Sequence[NamedPolicy]) -> list[LiveRun]:
    policies = [each.policy(loaded, sample.prompt) for each in named]
    prompt = fresh_prompt(loaded, sample, union_of_needs(policies))
    return run_live(loaded, sample, prompt, policies)


def compressed(loaded: LoadedModel, sample: Sample, named: Sequence[NamedPolicy]) -> list[float]:
    """Less KL a token over the observed tokens, of a prompt compressed once."""
    return [-float(run.kl.mean()) for run in _live(loaded, sample, named)]


def asked_later(loaded: LoadedModel, sample: Sample, named: Sequence[NamedPolicy]) -> list[float]:
    """More answer digits right, the questions coming after the prompt has been compressed."""
    asked = np.array(sample.answer_mask)
    return [100 * float(run.correct[asked].mean()) for run in _live(loaded, sample, named)]


def asked_before(loaded: LoadedModel, sample: Sample, named: Sequence[NamedPolicy]) -> list[float]:
    """More answer digits right, the first question being the prompt's end."""
    return asked_later(loaded, first_question(sample), named)


PLAIN, NEEDLES = ("prose", "code"), ("retrieval",)
KINDS_OF: dict[Measure, tuple[str, ...]] = {
    generated: PLAIN,
    cosine: PLAIN,
    compressed: (*PLAIN, *NEEDLES),
    asked_later: NEEDLES,
    asked_before: NEEDLES,
}


def first_question(sample: Sample) -> Sample:
    """The sample cut off after its first answer, all before that answer being the prompt."""
    first = next(needle for needle in sample.needle_of_row if needle >= 0)
    rows = [t for t, needle in enumerate(sample.needle_of_row) if needle == first]
    end = sample.prompt + rows[-1] + 1
    return replace(
        sample,
        token_ids=sample.token_ids[:end],
        next_token=sample.targets[rows[-1]],
        observed=end - sample.prompt - rows[0],
        needle_of_row=sample.needle_of_row[rows[0] : rows[-1] + 1],
    )
