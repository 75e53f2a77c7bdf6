"""A policy card: what a policy takes and loses, on one page that travels with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtune.common.estimate import Estimate
from kvtune.tuner.lengths import LossAt


@dataclass(frozen=True)
class Budget:
    """One plan of the front: what a prompt's cache takes, and what that loses.

    Args:
        share: of the bf16 bytes of the same prompt.
        prompt_bytes: of one compressed prompt.
        context_tokens: of a prompt.
        sequences: prompts that fit at once.
        kl: on the selection samples, nats/token.
        chosen: whether this is the card's policy.
        policy: in a few words: one rule for all heads, or what most heads have.
    """

    share: float
    prompt_bytes: int
    context_tokens: int
    sequences: int
    kl: Estimate
    chosen: bool
    policy: str = ""


@dataclass(frozen=True)
class Other:
    """A policy that the plan is compared with at equal bytes.

    Args:
        name: what it is called.
        prompt_bytes: of one compressed prompt.
        predicted: loss before anything ran live, nats/token.
        live: loss measured live, or None.
        retrieval: share of needle digits right, live, or None.
    """

    name: str
    prompt_bytes: int
    predicted: Estimate
    live: Estimate | None
    retrieval: Estimate | None


@dataclass(frozen=True)
class Task:
    """The policy's loss on one kind of held-out text.

    Args:
        name: of the kind.
        about: what such a sample asks of the model.
        predicted: mean loss before anything ran live, nats/token, with its interval.
        live: loss measured live, or None.
    """

    name: str
    about: str
    predicted: Estimate
    live: Estimate | None


@dataclass(frozen=True)
class Card:
    """Everything on a policy card.

    Args:
        kvtune_card: version of this format.
        kvtune: version that searched.
        model: name of the model.
        model_source: where its shape is from.
        trace_hash: of the trace that losses were read from, or of the weights of the model that
            stood in; "" where not known.
        gpu: the card's name.
        memory_limit_bytes: that everything together may take.
        verdict: the answer in one sentence.
        comparison: whether the plan loses less than the policies beside it.
        quality_source: the model's own trace, or a stand-in's.
        stand_in: the model whose trace stood in, or "".
        stack: that the policy's losses and retrieval are of, where one runs it otherwise than
            kvtune's own runtime, in which ``policies`` ran; or "".
        kl: loss of the policy on held-out samples, nats/token.
        held_out_samples: behind that figure.
        measured_tokens: prompt tokens of those samples.
        retrieval: share of needle digits right, live, or None.
        full_cache_retrieval: the same of the uncompressed cache, or None.
        context_tokens: of a prompt.
        sequences: prompts that fit at once.
        at_once: the same, between those that fit at both ends of what is left for caches.
        full_cache_sequences: prompts that fit uncompressed.
        prompt_bytes: of one compressed prompt.
        share: of the bf16 bytes of the same prompt.
        memory: peak of everything together, B.
        time_per_token: of a decode step of all sequences, s.
        tokens_per_second: of all sequences together.
        budgets: plans of the front, least bytes first.
        policies: the plan first, then what it is compared with.
        command: that repeats the search.
        tasks: the policy's loss by kind of held-out text.
        other_lengths: the policy's loss on prompts of other lengths, shortest first.
        layout: how budgets are counted, where that is not in kvtune's own pages; or "".
        rounding: which live losses are partly rounding, where the model ran in 16 bits; or "".
    """

    kvtune_card: Literal[2]
    kvtune: str
    model: str
    model_source: str
    trace_hash: str
    gpu: str
    memory_limit_bytes: int
    verdict: str
    comparison: str
    quality_source: Literal["own trace", "stand-in"]
    stand_in: str
    stack: str
    kl: Estimate
    held_out_samples: int
    measured_tokens: int
    retrieval: Estimate | None
    full_cache_retrieval: Estimate | None
    context_tokens: int
    sequences: int
    at_once: Estimate
    full_cache_sequences: int
    prompt_bytes: int
    share: float
    memory: Estimate
    time_per_token: Estimate
    tokens_per_second: Estimate
    budgets: tuple[Budget, ...]
    policies: tuple[Other, ...]
    command: str
    tasks: tuple[Task, ...] = ()
    layout: str = ""
    other_lengths: tuple[LossAt, ...] = ()
    rounding: str = ""

    @property
    def quality(self) -> str:
        """``stand-in (smollm2-135m)`` or ``own trace``, and whose runtime."""
        source = f"stand-in ({self.stand_in})" if self.stand_in else self.quality_source
        return f"{source}, as {self.stack} stores prompts and answers" if self.stack else source
