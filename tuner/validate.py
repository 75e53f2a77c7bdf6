"""Validation: the model really runs with a policy, on samples that no choice was made on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvtune.common.estimate import Estimate
from kvtune.common.kept import NOTHING_KEPT, Kept
from kvtune.common.progress import Progress, Silent
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import LiveRun, full_cache, full_policy, run_beside_full, run_live
from kvtune.runtime.live_stored import run_stored
from kvtune.runtime.prompts import Prompt, at_once, fresh_prompt
from kvtune.runtime.rounding import kl_of_rounding, rounds_visibly
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.tuner.quality import estimate, estimate_by_kind

_TOGETHER, _TOGETHER_ON_A_GPU = 6, 16  # policies a batch; the first is for a laptop's memory


@dataclass(frozen=True)
class Right:
    """Shares of answer tokens that the model would have given.

    Args:
        ours: under the policy.
        full: under the full cache.
    """

    ours: float
    full: float


@dataclass(frozen=True)
class Validation:
    """What live runs of one policy have found.

    Args:
        live: KL from the full cache, nats/token, tier live.
        perplexity_change: ratio to the full cache's, minus one.
        retrieval_accuracy: share of needle digits right; None without needles.
        full_cache_accuracy: the same of the uncompressed model.
        prompt_bytes: of one prompt, counted while compressing; the mean over samples.
        samples: that were run.
        by_kind: ``live`` of each kind of text alone.
        right_by_kind: answers right, of each kind of text alone that asks for some.
        losses: KL of every sample, nats/token, in the samples' order.
        counters: proof that the policy fired.
        rounding: KL of the uncompressed cache from itself where only rounding differs, nats/token,
            the mean over samples; None where it was not measured, as in float32.
    """

    live: Estimate
    perplexity_change: Estimate | None
    retrieval_accuracy: Estimate | None
    full_cache_accuracy: Estimate | None
    prompt_bytes: int
    samples: int
    by_kind: dict[str, Estimate] = field(default_factory=dict)
    right_by_kind: dict[str, Right] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)
    rounding: float | None = None


def validate_policy(
    policy: Policy,
    loaded: LoadedModel,
    samples: Sequence[Sample],
    *,
    stored_alike: bool = False,
    rounding: bool = False,
    progress: Progress | None = None,
) -> Validation:
    """Run one policy live: prompt, compression, observed tokens, all now."""
    needs = policy.needs

    def fresh(sample: Sample) -> Prompt:
        return fresh_prompt(loaded, sample, needs)

    return validate_policies(
        [policy], loaded, samples, fresh,
        stored_alike=stored_alike, rounding=rounding, progress=progress,
    )[0]  # fmt: skip


def validate_policies(
    policies: Sequence[Policy],
    loaded: LoadedModel,
    samples: Sequence[Sample],
    prompt_of: Callable[[Sample], Prompt],
    *,
    stored_alike: bool = False,
    rounding: bool = False,
    progress: Progress | None = None,
    kept: Kept = NOTHING_KEPT,
    uncompressed: dict[str, Tensor] | None = None,
) -> list[Validation]:
    """Run several policies live on the same samples.

    Args:
        policies: for the model's shape.
        loaded: the model.
        samples: held out.
        prompt_of: gives a sample's prompt, from a trace or run afresh; asked once a sample.
        stored_alike: as a stack runs it that reads prompts through what it stores of them, and
            stores answers likewise; else prompts are read whole, and answers stay in 16 bits.
        rounding: where the model does not run in float32, also measure what rounding alone makes
            of such losses: one more pass a sample, none of samples whose runs were all kept.
        progress: told of every sample and batch of policies.
        kept: runs that were done before, of this model on these samples; new ones are put there.
        uncompressed: log-probabilities under the full cache by sample, for whoever runs the same
            samples again; those that are missing are added.
    """
    way = "stored alike" if stored_alike else "live"
    each = [_Runs(sample, policies, kept, way) for sample in samples]
    rounding = rounding and rounds_visibly(loaded)
    known = {} if uncompressed is None else uncompressed
    together = _TOGETHER if loaded.device == "cpu" else _TOGETHER_ON_A_GPU
    steps = [(runs, some) for runs in each for some in runs.waiting(together)]
    for runs, some in (progress or Silent()).track(steps, "running live", len(steps)):
        if runs.prompt is None:
            runs.prompt = _asked_again(prompt_of(runs.sample), loaded)
        given = [policies[row] for row in some]
        found = _run(loaded, runs, given, stored_alike, known)
        if rounding and runs.rounding is None:  # before the runs are kept, so that it always is
            full = known[runs.sample.id]
            runs.keep_rounding(_of_rounding(loaded, runs, stored_alike, full))
        runs.take(some, found)
        if uncompressed is None and runs.prompt is None:
            del known[runs.sample.id]
    floor = _mean_rounding(each) if rounding else None
    return [
        replace(summarise([runs.done[row] for runs in each], samples), rounding=floor)
        for row in range(len(policies))
    ]


def _run(
    loaded: LoadedModel,
    runs: _Runs,
    policies: Sequence[Policy],
    stored_alike: bool,
    known: dict[str, Tensor],
) -> list[LiveRun]:
    """A batch of policies on one sample; ``known`` takes the full cache's log-probabilities."""
    sample, prompt = runs.sample, runs.prompt
    if prompt is None:
        raise ValueError("a batch runs between a sample's first run and its last")
    if stored_alike:
        full = known.get(sample.id)
        known[sample.id] = full_cache(loaded, sample, prompt) if full is None else full
        return run_stored(loaded, sample, policies, known[sample.id])
    if sample.id in known:
        return run_live(loaded, sample, prompt, policies, known[sample.id])
    known[sample.id], found = run_beside_full(loaded, sample, prompt, policies)
    return found


def _of_rounding(
    loaded: LoadedModel, runs: _Runs, stored_alike: bool, full: Tensor
) -> NDArray[np.float32]:
    """KL of the uncompressed cache from itself on one sample, a mean for each way to run it."""
    sample, prompt = runs.sample, runs.prompt
    if prompt is None:
        raise ValueError("rounding is measured between a sample's first run and its last")
    if stored_alike:
        (again,) = run_stored(loaded, sample, [full_policy(loaded)], full)
        return np.array([again.kl.mean()])
    return np.array(kl_of_rounding(loaded, sample, prompt, full).mean(1).tolist(), np.float32)


def _mean_rounding(each: Sequence[_Runs]) -> float | None:
    """The mean over samples of the way that rounds more; the other may be what ran before."""
    known = [runs.rounding for runs in each if runs.rounding is not None]
    return float(np.mean(known, axis=0).max()) if known else None


def _asked_again(prompt: Prompt, loaded: LoadedModel) -> Prompt:
    """A prompt whose layers are read once, and what policies look at computed once.

    A GPU would wait for each layer's reading.
    """
    if loaded.device == "cpu":
        return cache(prompt)
    return at_once(prompt, loaded.geometry.layers)


@dataclass
class _Runs:
    """Runs of policies on one sample: those kept from before, and those that are added.

    Args:
        sample: that the policies run on.
        policies: B of them.
        kept: where runs are kept.
        way: how they run, which runs are kept by.
        done: finished runs by the policy's number.
        prompt: of the sample, from its first run to its last.
        rounding: KL of the uncompressed cache from itself, a mean for each way to run it,
            nats/token; None where it is not known.
    """

    sample: Sample
    policies: Sequence[Policy]
    kept: Kept
    way: str
    done: dict[int, LiveRun] = field(default_factory=dict)
    prompt: Prompt | None = None
    rounding: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Look up what was kept."""
        if (arrays := self.kept.get(*self._rounding_key)) is not None:
            self.rounding = arrays["kl"]
        for row, policy in enumerate(self.policies):
            if (arrays := self.kept.get(*self._key(policy))) is not None:
                self.done[row] = LiveRun.of_arrays(arrays)

    def waiting(self, together: int) -> Iterator[list[int]]:
        """Numbers of the policies that are yet to run, in batches."""
        rows = [row for row in range(len(self.policies)) if row not in self.done]
        yield from (rows[at : at + together] for at in range(0, len(rows), together))

    def take(self, rows: Sequence[int], found: Sequence[LiveRun]) -> None:
        """Keep what a batch has found."""
        for row, run in zip(rows, found, strict=True):
            self.kept.put(run.as_arrays(), *self._key(self.policies[row]))
            self.done[row] = run
        if len(self.done) == len(self.policies):
            self.prompt = None

    def keep_rounding(self, kl: NDArray[np.float32]) -> None:
        """Keep what rounding alone makes of the sample's losses."""
        self.kept.put({"kl": kl}, *self._rounding_key)
        self.rounding = kl

    @property
    def _rounding_key(self) -> tuple[object, ...]:
        return "rounding", self.way, self.sample.id

    def _key(self, policy: Policy) -> tuple[object, ...]:
        return self.way, self.sample.id, replace(policy, name="")


def summarise(runs: Sequence[LiveRun], samples: Sequence[Sample]) -> Validation:
    """Figures of one policy over its samples."""
    kinds = [sample.kind for sample in samples]
    change = estimate([float((r.nll - r.full_nll).mean()) for r in runs], kinds, "live", "")
    asked = [np.array(sample.answer_mask) for sample in samples]
    needles = sum(sample.needles for sample in samples)
    losses = [float(run.kl.mean()) for run in runs]

    def accuracy(correct: list[np.ndarray]) -> Estimate | None:
        hits = [row[mask] for row, mask in zip(correct, asked, strict=True)]
        return share_right(float(np.concatenate(hits).mean()), needles) if needles else None

    return Validation(
        live=estimate(losses, kinds, "live"),
        perplexity_change=_through_exp(change),
        retrieval_accuracy=accuracy([run.correct for run in runs]),
        full_cache_accuracy=accuracy([run.full_correct for run in runs]),
        prompt_bytes=round(float(np.mean([run.footprint_bytes for run in runs]))),
        samples=len(samples),
        by_kind=estimate_by_kind(losses, kinds, "live"),
        right_by_kind=_right_by_kind(runs, samples),
        losses=tuple(losses),
        counters=_counters(runs, samples),
    )


def _right_by_kind(runs: Sequence[LiveRun], samples: Sequence[Sample]) -> dict[str, Right]:
    found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for run, sample in zip(runs, samples, strict=True):
        if sample.needles:
            asked = np.array(sample.answer_mask)
            ours, full = found.setdefault(sample.kind, ([], []))
            ours.append(run.correct[asked])
            full.append(run.full_correct[asked])
    return {
        kind: Right(float(np.concatenate(ours).mean()), float(np.concatenate(full).mean()))
        for kind, (ours, full) in sorted(found.items())
    }


def union_of_needs(policies: Sequence[Policy]) -> Needs:
    """The signals that any of the policies reads."""
    needs = Needs()
    for policy in policies:
        needs |= policy.needs
    return needs


def _through_exp(change: Estimate) -> Estimate:
    """A difference of log-perplexities as a ratio minus one."""
    value, low, high = (float(np.expm1(x)) for x in (change.value, change.low, change.high))
    return Estimate(value, low, high, "ratio - 1", "live")


def share_right(share: float, trials: int) -> Estimate:
    """A share with its Wilson 95 % interval; the digits of one needle are no separate trials."""
    z = 1.96
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z / (1 + z * z / trials)
    reach *= float(np.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)))
    return Estimate(share, max(centre - reach, 0.0), min(centre + reach, 1.0), "share", "live")


def _counters(runs: Sequence[LiveRun], samples: Sequence[Sample]) -> dict[str, int]:
    offered = sum(run.kept.size * s.prompt for run, s in zip(runs, samples, strict=True))
    evicting = sum(int((run.kept < s.prompt).sum()) for run, s in zip(runs, samples, strict=True))
    return {
        "tokens_offered": offered,
        "tokens_kept": int(sum(run.kept.sum() for run in runs)),
        "heads_run": sum(run.kept.size for run in runs),
        "heads_that_evicted": evicting,
    }
