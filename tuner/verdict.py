"""The answer of a search in one sentence that can be quoted, and whether the plan beats others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtune.common.estimate import BAND, Estimate
from kvtune.common.units import GB, GIB, format_tokens
from kvtune.common.words import count, figure
from kvtune.tuner.explore.study import Study

OWN_FAMILY = "uniform"
"""What a stand-in's plans of the menu's options are, and how their names begin."""
SLOW_S = 0.2
"""A decode step that takes longer than this is slower than people read: some five tokens a second
(238 words a minute; Brysbaert, 2019)."""

SCALE = (
    "Scale, live on SmolLM2 (docs/concepts.md, The loss): all tokens in 4 bits lose 0.0069 and get "
    "97 % of needles' digits right; h2o at 3 % of the bytes loses 0.36 and gets 10 %."
)
"""What the headline's nats are to be held against (``benchmarks/results/quality-h200.json``)."""


class Compared(Protocol):
    """The plan, or a policy that it is compared with at equal bytes."""

    @property
    def name(self) -> str:
        """What the policy is called."""

    @property
    def family(self) -> str:
        """Which way of allocating it belongs to."""

    @property
    def prompt_bytes(self) -> int:
        """Of one compressed prompt on the device."""

    @property
    def host_bytes(self) -> int:
        """Of one compressed prompt in the host's memory."""

    @property
    def predicted(self) -> Estimate:
        """Its loss before anything ran live, nats/token."""

    @property
    def live(self) -> Estimate | None:
        """Its loss measured live, or None."""

    @property
    def times_the_plan(self) -> Estimate | None:
        """How many times the plan's live loss its own is, on the same samples, or None."""


def verdict_of(study: Study) -> Verdict | None:
    """What a finished study comes to; None of one that has not finished."""
    outcome, row = study.outcome, study.chosen
    if outcome is None or row is None:
        return None
    return Verdict(
        sequences=int(study.plans.sequences[row]),
        full_cache_sequences=outcome.full_cache_sequences,
        context_tokens=int(study.plans.context_tokens[row]),
        memory_bytes=study.facts.memory_bytes,
        kl=outcome.quality.kl,
        stand_in=study.facts.stand_in,
        stack=outcome.quality.stack,
        policies=outcome.baselines,
        retrieval=outcome.plan.retrieval_accuracy,
        full_cache_accuracy=outcome.full_cache_accuracy,
        largest_kl=study.facts.largest_kl,
        weights=str(study.weights[row]),
        step=outcome.latency,
    )


@dataclass(frozen=True)
class Verdict:
    """What a search comes to.

    Args:
        sequences: prompts that fit at once with the plan.
        full_cache_sequences: prompts that fit at once uncompressed.
        context_tokens: tokens of each prompt.
        memory_bytes: the memory limit.
        kl: loss of the plan on held-out samples, nats/token.
        stand_in: the model whose trace stood in for this one's, or "".
        stack: whose ``kl`` and ``retrieval`` are, where one runs plans otherwise than kvtune's
            runtime does, in which ``policies`` ran; or "".
        policies: the plan first, then what it is compared with.
        retrieval: share of needle digits that the plan gets right, measured live, or None.
        full_cache_accuracy: share of needle digits that the uncompressed model gets right, or None.
        largest_kl: the loss that was accepted, nats/token.
        weights: format of the model's weights beside the caches.
        step: time of a decode step of all sequences, s.
    """

    sequences: int
    full_cache_sequences: int
    context_tokens: int
    memory_bytes: int
    kl: Estimate
    stand_in: str
    stack: str
    policies: Sequence[Compared]
    retrieval: Estimate | None
    full_cache_accuracy: Estimate | None
    largest_kl: float
    weights: str
    step: Estimate

    @property
    def sentence(self) -> str:
        """``6 prompts instead of 1 in 1 GiB at 0.011 nats per token; needles 100 % of ...``."""
        each = f"of {format_tokens(self.context_tokens)}"
        prompts = f"{count(self.sequences)} prompt{'s' * (self.sequences != 1)}"
        where = f"in {limit_words(self.memory_bytes)}{self._narrower()}"
        loss = f"at {self._loss()} nats per token ({self._source()})"
        beside = f"{self._needles()}{self._excess()}{self._slow()}"
        return f"{prompts} {each} {self._instead()} {where} {loss}{beside}"

    def _narrower(self) -> str:
        """Weights that are not those of the model as it is published."""
        same = self.weights in ("bf16", "stored")
        return "" if same else f" with {self.weights} weights, whose own loss is not counted,"

    def _slow(self) -> str:
        """What memory was bought with, where somebody who reads along would wait."""
        if self.step.value <= SLOW_S:
            return ""
        return f"; a token takes {figure(self.step, tier=False)}"

    def _loss(self) -> str:
        """A number, or both ends of a band, inside which no number is likelier than others."""
        if self.kl.tier == BAND and self.kl.low < self.kl.high:
            return f"{self.kl.low:.2g} to {self.kl.high:.2g}"
        return f"{self.kl.value:.2g}"

    def _instead(self) -> str:
        full = self.full_cache_sequences
        if self.sequences <= full:
            return f"where {count(full)} fit uncompressed"
        return f"instead of {count(full)}" if full else "where none fits uncompressed"

    def _source(self) -> str:
        if self.stand_in:
            return f"predicted from {self.stand_in}, which stands in for the model"
        how = "measured live" if self.kl.tier == "live" else "predicted"
        return f"{how}, as {self.stack} stores prompts and answers" if self.stack else how

    def _needles(self) -> str:
        found, full = self.retrieval, self.full_cache_accuracy
        if found is None or full is None:
            return ""
        if not full.value:
            return "; needles are found by neither the plan nor the full cache" * (not found.value)
        return f"; needles {100 * found.value / full.value:.0f} % of the full cache's"

    def _excess(self) -> str:
        over = self.kl.tier != BAND and self.kl.value > self.largest_kl
        return f"; this is more than the {self.largest_kl:g} that was accepted" if over else ""

    @property
    def comparison(self) -> str:
        """Whether the plan loses less than the policies beside it, by the same estimator.

        It is called better only where an interval says so: that of the ratio on the same samples,
        where both ran; else the plan's own.
        """
        if not self.policies:
            return ""
        plan, *others = self.policies
        uniform = bool(self.stand_in) and plan.name.startswith(OWN_FAMILY)
        own = [other for other in others if uniform and other.family == OWN_FAMILY]
        others = [other for other in others if other not in own]
        own = own if equal_bytes(plan, own) else []  # curves end before an uncompressed plan
        pairs = {other.name: alike(plan, other) for other in others}
        known = {other.name: other for other in others if pairs[other.name]}
        close = [name for name, other in known.items() if not is_better(plan, other)]
        apart = [name for name, pair in pairs.items() if pair is None]
        said = [_as_run(plan, other, self.stand_in) for other in own]
        if close:
            where = "within the plan's interval or below it"
            said.append(f"The plan is not shown to be better than {_listed(close)}: {where}.")
        elif known:
            said.append(_ahead(plan, list(known.values()), self.stand_in))
        if apart:
            said.append(
                f"Of {_listed(apart)} the loss is estimated in another way and not compared."
            )
        if said and self.stack:
            said.append(f"All of these ran in kvtune's own runtime, not as {self.stack} runs them.")
        return " ".join(said)


def alike(plan: Compared, other: Compared) -> tuple[Estimate, Estimate] | None:
    """Both losses by one estimator, live where both ran; None where they have none in common."""
    if plan.live and other.live:
        return plan.live, other.live
    if plan.predicted.tier == other.predicted.tier:
        return plan.predicted, other.predicted
    return None


def is_better(plan: Compared, other: Compared) -> bool:
    """Whether the intervals say that the plan loses less than another policy."""
    if other.times_the_plan is not None:
        return other.times_the_plan.low > 1
    pair = alike(plan, other)
    return pair is not None and pair[1].value > pair[0].high


def _as_run(plan: Compared, other: Compared, stand_in: str) -> str:
    """Where the plan's own kind of rule, run live on the stand-in, lies in the plan's band."""
    low, high, ran = plan.predicted.low, plan.predicted.high, other.predicted.value
    where = "within" if low <= ran <= high else "below" if ran < low else "above"
    return (
        f"The plan is a uniform rule. The best such rule lost {ran:.2g} when {stand_in} ran it, "
        f"{where} the plan's band."
    )


def _ahead(plan: Compared, others: Sequence[Compared], stand_in: str) -> str:
    """That the plan loses less than all others, and which comes next by the figures shown."""

    def losses(other: Compared) -> tuple[Estimate, Estimate]:
        pair = alike(plan, other)
        assert pair is not None  # noqa: S101 - they were chosen so
        return pair

    best = min(others, key=lambda other: losses(other)[1].value)
    ours, theirs = losses(best)
    times = f"{theirs.value / ours.value:.2g} times as much" if ours.value > 0 else "more"
    who = "the others" if len(others) > 1 else "the other"
    room = "at equal bytes" if equal_bytes(plan, others) else "in at least as many bytes"
    if theirs.tier == BAND:
        return (
            f"On {stand_in} itself the plan loses {ours.value:.2g}, less than {who} {room}; "
            f"{_rule(best)} comes next there with {theirs.value:.2g}, {times}."
            f"{_of_bands(ours, losses, others)}"
        )
    if found := best.times_the_plan:
        times += f" ({found.low:.2g} to {found.high:.2g})"
    return f"The plan loses less than {who} {room}; {best.name} comes next and loses {times}."


def _of_bands(
    ours: Estimate,
    losses: Callable[[Compared], tuple[Estimate, Estimate]],
    others: Sequence[Compared],
) -> str:
    """What the bands themselves say, which another model's losses may lie anywhere in."""
    lowest = min(others, key=lambda other: losses(other)[1].low)
    theirs = losses(lowest)[1]
    if theirs.low > ours.high:
        return " Its band lies below all of theirs."
    return f" As bands they overlap; {_rule(lowest)}'s reaches lowest, to {theirs.low:.2g}."


def _rule(other: Compared) -> str:
    """A policy's name without where it ran, which the sentence says."""
    return other.name.partition(", live on ")[0]


def equal_bytes(plan: Compared, others: Sequence[Compared]) -> bool:
    """Whether all take the plan's bytes but for rounding; some rules have no use for so many.

    Bytes on the host count as those on the device.
    """
    held = plan.prompt_bytes + plan.host_bytes
    return all(other.prompt_bytes + other.host_bytes >= 0.97 * held for other in others)


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def limit_words(size: int) -> str:
    """A memory limit in the unit that it is round in: ``16 GB``, ``1 GiB``, else ``14.96 GiB``."""
    if size % GB == 0 and size % GIB:
        return f"{size // GB} GB"
    return f"{size / GIB:.2f}".rstrip("0").rstrip(".") + " GiB"
