"""What a search answers: the one model of ``result.json``, ``--json``, the explorer and the report.

``Figures`` are what a search and its file have in common, by the same names; ``SearchResult`` is
what a search has found, with its policies. ``stored_result.py`` reads the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import kvtune
from kvtune.common.bounds import Count, Loss, Name, NotNegative, Parameter, Whole
from kvtune.common.estimate import Estimate, Tier, checked_estimate
from kvtune.policies.policy import Policy
from kvtune.simulator.memory.at_once import prompts_at_once
from kvtune.simulator.memory.plan import MemoryPlan
from kvtune.tuner.lengths import LossAt
from kvtune.tuner.request import SearchRequest

if TYPE_CHECKING:
    from kvtune.tuner.timing import Times

PLAN_FILE = "policy.yaml"
Source = Literal["own trace", "stand-in"]


@dataclass(frozen=True)
class Quality:
    """A quality figure and whose it is.

    Args:
        kl: nats/token, with a 95 % interval over held-out samples, and tier; of a
            stand-in, a band.
        source: the model's own trace, or that of a stand-in.
        stand_in: the stand-in's name, or "".
        samples: held-out samples behind the figure.
        stack: that the figure is of, where one runs plans otherwise than kvtune's runtime; or "".
    """

    kl: Estimate
    source: Source
    stand_in: Name = ""
    samples: Whole = 0
    stack: Name = ""

    def as_dict(self) -> dict[str, Any]:
        """The form that goes into JSON: the figure flat, and whose trace it is from."""
        return {
            "kl_nats_per_token": self.kl.value,
            "interval": [self.kl.low, self.kl.high],
            "tier": self.kl.tier,
            "source": self.source,
            "stand_in": self.stand_in or None,
            "samples": self.samples,
            "stack": self.stack or None,
        }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """How a schema reads what ``as_dict`` wrote."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(
            _quality_from, handler.generate_schema(_FlatQuality)
        )


@dataclass(frozen=True)
class _FlatQuality:
    """The form of a quality in JSON."""

    kl_nats_per_token: Loss
    interval: tuple[Loss, Loss]
    tier: Tier
    source: Source = "own trace"
    stand_in: Name | None = None
    samples: Whole = 0
    stack: Name | None = None


def _quality_from(stored: _FlatQuality) -> Quality:
    """The quality, refused where its figure lies outside its own interval.

    Raises:
        ValueError: it does.
    """
    low, high = stored.interval
    kl = checked_estimate(Estimate(stored.kl_nats_per_token, low, high, "nats/token", stored.tier))
    return Quality(kl, stored.source, stored.stand_in or "", stored.samples, stored.stack or "")


@dataclass(frozen=True)
class FrontPoint:
    """One plan of the Pareto front: loss against tokens at once, with what it takes.

    Args:
        kl: predicted on the selection samples, nats/token.
        context_tokens: prompt tokens of each sequence.
        sequences: that fit at once under the limit.
        prompt_bytes: of one compressed prompt.
        share: of the bf16 bytes of the same prompt.
        time_per_token: of a decode step with all sequences, seconds.
        tokens_per_second: of all sequences together.
        parameters: what the study chose.
        weights: format of the model's weights beside it; its own loss is in no figure.
        chosen: whether this is the plan.
        band: of a stand-in, around ``kl``; None where the loss is the model's own.
        unseen: the loss of the best of all that serve as many, on selection samples that each
            choice did not see (cross-fitted); None of a plan that is not on the front.
    """

    kl: Loss
    context_tokens: Count
    sequences: Count
    prompt_bytes: Whole
    share: NotNegative
    time_per_token: Estimate
    tokens_per_second: Estimate
    parameters: dict[str, Parameter]
    weights: Name
    chosen: bool = False
    band: Estimate | None = None
    unseen: Estimate | None = None

    @property
    def believed(self) -> float:
        """Loss without the luck of being the best of many, where that is known, nats/token."""
        return self.kl if self.unseen is None else self.unseen.value


@dataclass(frozen=True)
class Baseline:
    """The plan, or what it is compared with, at equal bytes.

    Args:
        name: for example ``uniform h2o int4``.
        family: kvtune, layers, greedy, uniform, pyramid or adakv; beside a stand-in's plan, the
            name of a method too.
        predicted: KL on held-out samples before anything ran live.
        live: the same measured live; None where no weights are at hand.
        prompt_bytes: of one compressed prompt on the device.
        perplexity_change: live, ratio minus one; None likewise.
        retrieval_accuracy: live, share of needle digits right; None likewise.
        by_kind: predicted on held-out samples by kind of text, each with an interval; empty where
            it is off a curve.
        live_by_kind: measured on those; empty where it did not run.
        times_the_plan: how many times the plan's loss its own is, live on the same samples; None
            of the plan, and where no interval can be given.
        policy: its policy's file inside the run directory; None where it has none.
        host_bytes: of one compressed prompt in the host's memory.
    """

    name: Name
    family: Name
    predicted: Estimate
    live: Estimate | None
    prompt_bytes: Whole
    perplexity_change: Estimate | None = None
    retrieval_accuracy: Estimate | None = None
    by_kind: dict[str, Estimate] = field(default_factory=dict)
    live_by_kind: dict[str, Estimate] = field(default_factory=dict)
    times_the_plan: Estimate | None = None
    policy: Name | None = None
    host_bytes: Whole = 0

    @property
    def best(self) -> Estimate:
        """Live where there is one."""
        return self.live or self.predicted


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a search has found, in the order in which ``result.json`` has it.

    Args:
        front: most tokens at once last.
        baselines: the plan first, then what it is compared with.
        quality: of the plan, the best tier there is.
        predicted_quality: of the plan, before live.
        memory: peak of everything together, bytes.
        latency: of one decode step of all sequences, seconds.
        prefill: of one prompt, seconds.
        compression: of one prompt, beside its prefill, seconds.
        context_tokens: prompt tokens of each sequence, chosen where that was left open.
        sequences: that fit at once with the plan.
        sequence_bytes: device memory of one by its end, as the stack lays it out that it is for.
        full_cache_sequences: that would fit uncompressed.
        prompt_bytes: of one compressed prompt.
        share: of the bf16 bytes of the same prompt.
        full_cache_accuracy: retrieval accuracy of the uncompressed model, live; or None.
        counters: proof that the policy fired: tokens kept and offered, heads compressed.
        notes: automatic choices, each with its reason.
        provenance: versions, seeds, hashes.
        on_stack: the plan as the stack runs it that ``quality`` is of, where that is another than
            kvtune's own runtime, in which ``baselines`` ran; or None.
        other_lengths: the plan's loss on prompts of other lengths, shortest first: of those that
            it was run at, and of its context where plans have been run at such lengths.
    """

    front: tuple[FrontPoint, ...]
    baselines: tuple[Baseline, ...]
    quality: Quality
    predicted_quality: Quality
    memory: Estimate
    latency: Estimate
    prefill: Estimate
    compression: Estimate
    context_tokens: Count
    sequences: Count
    sequence_bytes: Count
    full_cache_sequences: Whole
    prompt_bytes: Whole
    share: NotNegative
    full_cache_accuracy: Estimate | None
    counters: dict[str, Whole]
    notes: tuple[str, ...]
    provenance: dict[str, Any]
    on_stack: Baseline | None = None
    other_lengths: tuple[LossAt, ...] = ()

    @property
    def plan(self) -> Baseline:
        """The plan's figures, those of the stack where it was run as one runs it."""
        return self.on_stack or self.baselines[0]

    @property
    def figures(self) -> dict[str, Any]:
        """Each by its name."""
        return {each.name: getattr(self, each.name) for each in fields(Figures)}


@dataclass(frozen=True, kw_only=True)
class SearchResult(Figures):
    """All that a search found: its figures, and what they are of.

    Args:
        request: what was asked.
        budget: device memory, weights, overhead and what is left for the cache, at that context.
        policy: the chosen plan.
        policies: of the plan and of every baseline that has one, by its file.
        times: of the plan beside the uncompressed cache, measured, where it ran live on a GPU.
        untimed: why it ran there and was not timed; or None.
    """

    request: SearchRequest
    budget: MemoryPlan
    policy: Policy
    policies: dict[str, Policy]
    times: Times | None = None
    untimed: str | None = None

    @property
    def at_once(self) -> Estimate:
        """How many prompts fit at once with the plan; no more where a time bounds them."""
        most = self.budget.most_of(self.sequence_bytes, self.budget.waiting(self.policy))
        found = prompts_at_once(self.sequences, most)
        limits = self.request.limits
        timed = (limits.time_per_token_s, limits.first_token_s) != (None, None)
        return replace(found, high=found.value) if timed else found

    @property
    def full_cache_at_once(self) -> Estimate:
        """How many fit uncompressed, each with its answer."""
        return prompts_at_once(self.full_cache_sequences, self.budget.most(None))

    def as_dict(self) -> dict[str, Any]:
        """As ``result.json`` holds it; the policies lie beside that file."""
        return {
            "kvtune": kvtune.__version__,
            "model": self.request.shape.name,
            "gpu": self.request.gpu.slug,
            "policy": PLAN_FILE,
            "budget": self.budget.as_dict(),
            **_plain(self.figures),
        }


def _plain(value: Any) -> Any:
    """A value as JSON data."""
    if isinstance(value, (Estimate, Quality)):
        return value.as_dict()
    if isinstance(value, (FrontPoint, Baseline, LossAt)):
        return {name: _plain(each) for name, each in vars(value).items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
