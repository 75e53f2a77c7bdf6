"""What a finished search found: ``result.json`` as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtune.common.estimate import Estimate
from kvtune.tuner.explore.stored_result import StoredRival, read_result


@dataclass(frozen=True)
class Baseline:
    """The plan, or what it is compared with, at equal bytes.

    Args:
        name: for example ``uniform h2o int4``.
        family: kvtune, layers, greedy, uniform, pyramid or adakv.
        predicted: KL on held-out samples before anything ran live, nats/token.
        live: the same measured live, or None.
        prompt_bytes: of one compressed prompt.
        perplexity_change: live, ratio minus one, or None.
        retrieval_accuracy: live, share of needle digits right, or None.
        by_kind: predicted on held-out samples by kind of text; empty where not known.
        live_by_kind: measured on those; empty where not known.
        times_the_plan: how many times the plan's live loss its own is, or None.
        policy: its file inside the run directory, or "".
    """

    name: str
    family: str
    predicted: Estimate
    live: Estimate | None
    prompt_bytes: int
    perplexity_change: Estimate | None
    retrieval_accuracy: Estimate | None
    by_kind: dict[str, float]
    live_by_kind: dict[str, Estimate]
    times_the_plan: Estimate | None
    policy: str

    @property
    def best(self) -> Estimate:
        """Live where there is one."""
        return self.live or self.predicted


@dataclass(frozen=True)
class Outcome:
    """A finished search.

    Args:
        study: key of its question.
        parameters: of the chosen plan.
        quality: of the chosen plan at the best tier there is, held-out samples.
        predicted: the same before live.
        baselines: the plan first.
        full_cache_sequences: that would fit uncompressed.
        full_cache_accuracy: retrieval of the uncompressed model, or None.
        notes: automatic choices, each with its reason.
        counters: proof that the plan fired live.
        provenance: versions, seeds, hashes.
    """

    study: str
    parameters: dict[str, Any]
    quality: Estimate
    predicted: Estimate
    baselines: tuple[Baseline, ...]
    full_cache_sequences: int
    full_cache_accuracy: Estimate | None
    notes: tuple[str, ...]
    counters: dict[str, int]
    provenance: dict[str, Any]


def read_outcome(path: Path) -> Outcome:
    """The result of a run directory.

    Raises:
        KvtuneError: damaged.
    """
    found = read_result(path)
    return Outcome(
        study=str(found.provenance.get("study", "")),
        parameters=next(point.parameters for point in found.front if point.chosen),
        quality=found.quality.kl,
        predicted=found.predicted.kl,
        baselines=tuple(_baseline(rival) for rival in found.rivals),
        full_cache_sequences=found.full_cache_sequences,
        full_cache_accuracy=found.full_cache_accuracy,
        notes=found.notes,
        counters=found.counters,
        provenance=found.provenance,
    )


def _baseline(rival: StoredRival) -> Baseline:
    return Baseline(**vars(rival) | {"policy": rival.policy or ""})
