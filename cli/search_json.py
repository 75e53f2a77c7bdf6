"""The JSON object of ``kvtune search``; docs/json.md describes it."""

from __future__ import annotations

from typing import Any

from kvtune.cli.inputs import POLICY_FILE
from kvtune.cli.search_report import verdict
from kvtune.policies.policy_file.document import as_plain, read_policy
from kvtune.tuner.request import FrontPoint, Quality, Rival, SearchResult
from kvtune.tuner.run_directory import policy_file


def answer(result: SearchResult) -> dict[str, Any]:
    """All that a search found; the plan is what its policy file holds."""
    request, found = result.request, verdict(result)
    return {
        "model": request.shape.name,
        "gpu": request.gpu.slug,
        "run_dir": str(request.run_dir),
        "verdict": found.sentence,
        "comparison": found.comparison,
        "plan": as_plain(read_policy(request.run_dir / POLICY_FILE)),
        "budget": result.budget,
        "quality": quality(result.quality),
        "predicted_quality": quality(result.predicted),
        "memory": result.memory,
        "latency": result.latency,
        "prefill": result.prefill,
        "compression": result.compression,
        "context_tokens": result.context_tokens,
        "sequences": result.sequences,
        "full_cache_sequences": result.full_cache_sequences,
        "prompt_bytes": result.prompt_bytes,
        "share": result.share,
        "front": [_point(point) for point in result.front],
        "baselines": [_rival(rival) for rival in result.rivals],
        "full_cache_accuracy": result.full_cache_accuracy,
        "counters": result.counters,
        "notes": result.notes,
        "provenance": result.provenance,
        "times": result.times,
        "untimed": result.untimed,
    }


def quality(found: Quality) -> dict[str, Any]:
    """The figure flat, with interval, tier and whose trace it is from."""
    return {
        "kl_nats_per_token": found.kl.value,
        "interval": [found.kl.low, found.kl.high],
        "tier": found.kl.tier,
        "source": found.source,
        "stand_in": found.stand_in or None,
        "samples": found.samples,
    }


def _point(point: FrontPoint) -> dict[str, Any]:
    plain = dict(vars(point))
    band = plain.pop("band")
    return plain | {"kl": band or {"value": point.kl, "unit": "nats/token", "tier": "table"}}


def _rival(rival: Rival) -> dict[str, Any]:
    return vars(rival) | {"policy": policy_file(rival)}
