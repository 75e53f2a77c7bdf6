"""What live runs of a study's plans have found, kept beside it as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtune.common.estimate import Estimate
from kvtune.common.files import write_text
from kvtune.tuner.explore.outcome import as_estimates, maybe_estimate

FOLDER = "validated"


@dataclass(frozen=True)
class Measured:
    """One plan, run live.

    Args:
        kl: nats/token, on held-out samples.
        perplexity_change: ratio minus one, or None.
        retrieval_accuracy: share of needle digits right, or None.
        full_cache_accuracy: the same of the uncompressed model.
        prompt_bytes: counted while compressing.
        device: where it ran.
        by_kind: ``kl`` of each kind of text alone; empty where not known.
    """

    kl: Estimate
    perplexity_change: Estimate | None
    retrieval_accuracy: Estimate | None
    full_cache_accuracy: Estimate | None
    prompt_bytes: int
    device: str
    by_kind: dict[str, Estimate] = field(default_factory=dict)


def keep_answer(folder: Path, study: str, trial: int, answer: str) -> Measured:
    """Keep what ``kvtune validate --json`` said of a plan.

    Raises:
        KeyError, TypeError, ValueError: it is no such answer.
    """
    found = _measured(json.loads(answer))
    write_text(folder / FOLDER / study / f"trial-{trial}.json", answer)
    return found


def read_measured(folder: Path, study: str) -> dict[int, Measured]:
    """Of one study, by trial; files that are no answers are passed over."""
    found = {}
    for path in sorted((folder / FOLDER / study).glob("trial-*.json")):
        try:
            found[int(path.stem.removeprefix("trial-"))] = _measured(json.loads(path.read_text()))
        except (OSError, KeyError, TypeError, ValueError):
            continue
    return found


def _measured(plain: dict[str, Any]) -> Measured:
    quality = plain["quality"]
    low, high = quality["interval"]
    return Measured(
        kl=Estimate(quality["kl_nats_per_token"], low, high, "nats/token", quality["tier"]),
        perplexity_change=maybe_estimate(plain["perplexity_change"]),
        retrieval_accuracy=maybe_estimate(plain["retrieval_accuracy"]),
        full_cache_accuracy=maybe_estimate(plain["full_cache_accuracy"]),
        prompt_bytes=int(plain["counted_bytes"]),
        device=str(plain.get("device", "")),
        by_kind=as_estimates(plain.get("by_kind")),
    )
