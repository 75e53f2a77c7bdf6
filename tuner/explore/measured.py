"""What live runs of a study's plans have found, kept beside it as JSON."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtune.common.bounds import Loss, Name, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, Tier
from kvtune.common.files import write_text
from kvtune.common.stored import checked, parse_json, read_json

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


@dataclass(frozen=True)
class _Quality:
    """A loss as ``result.json`` writes it: value and interval side by side."""

    kl_nats_per_token: Loss
    interval: tuple[Loss, Loss]
    tier: Tier
    source: Name = ""
    stand_in: Name | None = None
    samples: Whole = 0
    stack: Name | None = None


@dataclass(frozen=True)
class _Answer:
    """What ``kvtune validate --json`` says."""

    quality: _Quality
    perplexity_change: Estimate | None
    retrieval_accuracy: Estimate | None
    full_cache_accuracy: Estimate | None
    counted_bytes: Whole
    device: Name = ""
    by_kind: dict[str, Estimate] = field(default_factory=dict)
    command: Name = ""
    kvtune: Name = ""
    policy: dict[str, Any] = field(default_factory=dict)
    predicted: Estimate | None = None
    prompt_bytes: Whole = 0
    counters: dict[str, Whole] = field(default_factory=dict)
    times: dict[str, Any] | None = None
    untimed: str | None = None


def keep_answer(folder: Path, study: str, trial: int, answer: str) -> Measured:
    """Keep what ``kvtune validate --json`` said of a plan.

    Raises:
        KvtuneError: it is no such answer.
    """
    found = _measured(parse_json(answer, "the validation's answer"), "the validation's answer")
    write_text(folder / FOLDER / study / f"trial-{trial}.json", answer)
    return found


def read_measured(folder: Path, study: str) -> dict[int, Measured]:
    """Of one study, by trial; files that are no answers are passed over."""
    found = {}
    for path in sorted((folder / FOLDER / study).glob("trial-*.json")):
        trial = path.stem.removeprefix("trial-")
        if trial.isascii() and trial.isdecimal() and len(trial) < 10:
            with suppress(KvtuneError):
                found[int(trial)] = _measured(read_json(path), str(path))
    return found


def _measured(plain: Any, where: str) -> Measured:
    answer = checked(_Answer, plain, where)
    quality = answer.quality
    figure = Estimate(quality.kl_nats_per_token, *quality.interval, "nats/token", quality.tier)
    return Measured(
        kl=checked(Estimate, figure.as_dict(), where),
        perplexity_change=answer.perplexity_change,
        retrieval_accuracy=answer.retrieval_accuracy,
        full_cache_accuracy=answer.full_cache_accuracy,
        prompt_bytes=answer.counted_bytes,
        device=answer.device,
        by_kind=answer.by_kind,
    )
