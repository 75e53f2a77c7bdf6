"""``result.json`` as its schema says it: what a finished search wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvtune.common.bounds import Count, Loss, Name, Parameter, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.stored import checked, read_json

AGAIN = "run the same search again."


@dataclass(frozen=True)
class StoredPoint:
    """One plan of the front."""

    parameters: dict[str, Parameter]
    chosen: bool
    kl: Loss | None = None
    context_tokens: Count | None = None
    sequences: Count | None = None
    prompt_bytes: Whole | None = None
    share: float | None = None
    time_per_token: Estimate | None = None
    tokens_per_second: Estimate | None = None
    band: Estimate | None = None


@dataclass(frozen=True)
class StoredRival:
    """The plan, or what it is compared with."""

    name: Name
    family: Name
    predicted: Estimate
    live: Estimate | None
    prompt_bytes: Whole
    perplexity_change: Estimate | None
    retrieval_accuracy: Estimate | None
    by_kind: dict[str, Loss] = field(default_factory=dict)
    live_by_kind: dict[str, Estimate] = field(default_factory=dict)
    times_the_plan: Estimate | None = None
    policy: Name | None = None


@dataclass(frozen=True)
class StoredQuality:
    """A loss and whose it is."""

    kl: Estimate
    source: Literal["own trace", "stand-in"] = "own trace"
    stand_in: Name = ""
    samples: Whole = 0


@dataclass(frozen=True)
class StoredResult:
    """The whole file. What older versions did not write is optional."""

    front: tuple[StoredPoint, ...]
    rivals: tuple[StoredRival, ...]
    quality: StoredQuality
    predicted: StoredQuality
    full_cache_sequences: Whole
    notes: tuple[str, ...]
    counters: dict[str, Whole]
    provenance: dict[str, Any]
    full_cache_accuracy: Estimate | None = None
    kvtune: Name = ""
    model: Name = ""
    gpu: Name = ""
    policy: Name = ""
    budget: dict[str, Any] | None = None
    memory: Estimate | None = None
    latency: Estimate | None = None
    prefill: Estimate | None = None
    compression: Estimate | None = None
    context_tokens: Count | None = None
    sequences: Count | None = None
    prompt_bytes: Whole | None = None
    share: float | None = None


def read_result(path: Path) -> StoredResult:
    """The result of a run directory.

    Raises:
        KvtuneError: it is not there, or damaged.
    """
    try:
        found = checked(StoredResult, read_json(path, AGAIN), str(path), AGAIN)
    except KvtuneError as error:
        raise KvtuneError(
            f"this result cannot be read: {error.message}", where=str(path), hint=AGAIN
        ) from error
    if not found.rivals or sum(point.chosen for point in found.front) != 1:
        raise KvtuneError(
            "this result cannot be read: it names no plan", where=str(path), hint=AGAIN
        )
    return found
