"""What a finished search found: ``result.json`` as frozen data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate


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
    try:
        return _outcome(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise KvtuneError(
            "this result cannot be read", where=str(path), hint="run the same search again."
        ) from error


def _outcome(plain: dict[str, Any]) -> Outcome:
    return Outcome(
        study=str(plain["provenance"].get("study", "")),
        parameters=next(point["parameters"] for point in plain["front"] if point["chosen"]),
        quality=as_estimate(plain["quality"]["kl"]),
        predicted=as_estimate(plain["predicted"]["kl"]),
        baselines=tuple(_baseline(rival) for rival in plain["rivals"]),
        full_cache_sequences=int(plain["full_cache_sequences"]),
        full_cache_accuracy=maybe_estimate(plain.get("full_cache_accuracy")),
        notes=tuple(plain["notes"]),
        counters=dict(plain["counters"]),
        provenance=dict(plain["provenance"]),
    )


def _baseline(plain: dict[str, Any]) -> Baseline:
    return Baseline(
        name=str(plain["name"]),
        family=str(plain["family"]),
        predicted=as_estimate(plain["predicted"]),
        live=maybe_estimate(plain["live"]),
        prompt_bytes=int(plain["prompt_bytes"]),
        perplexity_change=maybe_estimate(plain["perplexity_change"]),
        retrieval_accuracy=maybe_estimate(plain["retrieval_accuracy"]),
        by_kind=dict(plain.get("by_kind") or {}),
        live_by_kind=as_estimates(plain.get("live_by_kind")),
        policy=str(plain.get("policy") or ""),
    )


def as_estimate(plain: dict[str, Any]) -> Estimate:
    """The inverse of ``Estimate.as_dict``."""
    low, high = plain["interval"]
    return Estimate(plain["value"], low, high, plain["unit"], plain["tier"])


def maybe_estimate(plain: dict[str, Any] | None) -> Estimate | None:
    """The same of what may be missing."""
    return None if plain is None else as_estimate(plain)


def as_estimates(plain: dict[str, Any] | None) -> dict[str, Estimate]:
    """Figures by name; none where they were not written yet."""
    return {str(name): as_estimate(entry) for name, entry in (plain or {}).items()}
