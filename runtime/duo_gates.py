"""DuoAttention's gates: which KV heads must see everything for hidden keys to be found again.

A gate mixes a head's attention over everything with that over sinks and a recent window. Samples
hide keys in a long text and ask for them; gates are moved so that the model's last hidden states
where it answers stay what they are with all gates open, while a price draws all gates down.
Weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress, Silent
from kvtune.policies.head_scores import HeadScores
from kvtune.runtime.head_gates import gate_scores, gated, open_gates, weights_fixed
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.traces.seam import attending


@dataclass(frozen=True)
class Distillation:
    """How gates are learned; as DuoAttention's authors do it but for lengths and steps.

    Args:
        steps: of the optimiser, a sample each; 2,000 in the authors' code.
        sinks: first tokens that a gated head always sees; 128 there, of prompts of 1k to 32k.
        window: newest tokens that it always sees; 256 there.
        rate: of Adam.
        price: of the mean gate.
        ramp: share of the steps in which the rate rises at first, and falls at last.
        floor: least share of the rate.
        seed: of the order of samples.
    """

    steps: int = 300
    sinks: int = 16
    window: int = 64
    rate: float = 0.02
    price: float = 0.05
    ramp: float = 0.2
    floor: float = 0.1
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Of the optimiser at a step: up, level, and down."""
        ends = max(self.ramp * self.steps, 1)
        return self.rate * max(min(1, (step + 1) / ends, (self.steps - step) / ends), self.floor)


def train_gates(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    training: Distillation,
    *,
    progress: Progress | None = None,
    seen: Callable[[int, float, float], None] | None = None,
) -> Tensor:
    """Gates of all KV heads, ``[L, H]`` float32 from 0 to 1; every head begins at 1.

    loss = mean over answers' tokens and channels of (state with gates - state with all open)^2
           + price * mean gate

    Source: Xiao et al., "DuoAttention", ICLR 2025, arXiv 2410.10819, and its code at fe93c31.
    Differs: hidden keys are numbers, where theirs are words; prompts are shorter; the whole
    attention that is mixed is that of the gated model's own states, as the paper writes it, where
    the code takes it from the model with all gates open.

    Args:
        loaded: the model.
        samples: with needles, of the search split, so that nothing evaluated is looked at.
        training: how.
        progress: told of every step.
        seen: given each step's number, distance and mean gate.

    Raises:
        KvtuneError: no sample asks for a needle.
    """
    asked = [sample for sample in samples if sample.needles]
    if not asked:
        raise KvtuneError("there is nothing to learn from: no sample asks for a hidden number")

    @cache
    def wanted(at: int) -> Tensor:
        with torch.no_grad():
            return _states(loaded, asked[at])

    gates = open_gates(loaded)
    optimiser = torch.optim.Adam([gates], lr=training.rate)
    handler = gated(gates, training.sinks, training.window)
    with weights_fixed(loaded.model):
        for step in (progress or Silent()).track(
            range(training.steps), "learning gates", training.steps
        ):
            at = _drawn(step, len(asked), training.seed)
            whole = wanted(at)
            with attending(handler):
                distance = (_states(loaded, asked[at]) - whole).square().mean()
            optimiser.zero_grad()
            (distance + training.price * gates.mean()).backward()
            optimiser.param_groups[0]["lr"] = training.rate_at(step)
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            if seen is not None:
                seen(step, float(distance.detach()), float(gates.detach().mean()))
    return gates.detach()


def duo_scores(loaded: LoadedModel, gates: Tensor, training: Distillation) -> HeadScores:
    """The gates as head scores, called ``duo``."""
    data = f"{training.steps} steps, {training.sinks} sinks and a window of {training.window}"
    return gate_scores(loaded, "duo", gates, "DuoAttention, distilled", data, training.seed)


def _states(loaded: LoadedModel, sample: Sample) -> Tensor:
    """Last hidden states where tokens of answers are foretold, ``[T, C]`` float32."""
    ids = torch.tensor([sample.token_ids], device=loaded.device)
    states = loaded.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    rows = sample.prompt + np.flatnonzero(sample.answer_mask)
    found: Tensor = states[torch.from_numpy(rows).to(states.device)].float()
    return found


def _drawn(step: int, samples: int, seed: int) -> int:
    """The sample of a step: all of them, in an order drawn anew each time."""
    times, at = divmod(step, samples)
    return int(np.random.default_rng((seed, times)).permutation(samples)[at])
