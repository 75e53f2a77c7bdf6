"""The run directory: what was asked, and what was found, each file whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import kvtune
from kvtune.common.estimate import Estimate
from kvtune.common.files import atomic, write_json, write_text
from kvtune.policies.document import (
    ModelFacts,
    PolicyDocument,
    Provenance,
    Serving,
    write_policy,
)
from kvtune.policies.document import Quality as WrittenQuality
from kvtune.tuner.request import FrontPoint, Quality, Rival, SearchRequest, SearchResult


def record_config(request: SearchRequest) -> None:
    """Write ``config.json``; raises KvtuneError where the folder cannot be written."""
    asked = {
        **asdict(replace(request, shape=None, gpu=None)),  # type: ignore[arg-type]
        "shape": request.shape.name,
        "gpu": request.gpu.slug,
        "run_dir": request.run_dir.name,
        "kvtune": kvtune.__version__,
    }
    with atomic(request.run_dir / "config.json") as file:
        file.write_text(json.dumps(asked, indent=2, default=str) + "\n")


def write_result(result: SearchResult) -> None:
    """Write ``policy.yaml`` and ``result.json``."""
    run_dir = result.request.run_dir
    write_text(run_dir / "policy.yaml", write_policy(_document(result)))
    write_json(run_dir / "result.json", result_as_plain(result))


def _document(result: SearchResult) -> PolicyDocument:
    request, quality = result.request, result.quality
    written = WrittenQuality(quality.source, quality.stand_in, quality.kl)
    return PolicyDocument(
        policy=result.policy,
        model=ModelFacts(
            request.shape.name,
            request.shape.layers,
            request.shape.kv_heads,
            request.shape.head_dim,
        ),
        provenance=Provenance(
            quality=written,
            kvtune=kvtune.__version__,
            trace=str(result.provenance.get("trace", "")),
            seed=request.seed,
            memory=result.memory.as_dict(),
            latency=result.latency.as_dict(),
        ),
        serving=Serving(
            weights=result.budget.weight_format,
            context_tokens=result.context_tokens,
            batch=result.sequences,
            gpu=request.gpu.slug,
        ),
    )


def result_as_plain(result: SearchResult) -> dict[str, Any]:
    """The result as JSON data; the policy lies beside it as YAML."""
    return {
        "kvtune": kvtune.__version__,
        "model": result.request.shape.name,
        "gpu": result.request.gpu.slug,
        "policy": "policy.yaml",
        "budget": result.budget.as_dict(),
        "front": [_plain(point) for point in result.front],
        "rivals": [_plain(rival) for rival in result.rivals],
        "quality": _plain(result.quality),
        "predicted": _plain(result.predicted),
        "memory": result.memory.as_dict(),
        "latency": result.latency.as_dict(),
        "prefill": result.prefill.as_dict(),
        "context_tokens": result.context_tokens,
        "sequences": result.sequences,
        "full_cache_sequences": result.full_cache_sequences,
        "prompt_bytes": result.prompt_bytes,
        "share": result.share,
        "counters": result.counters,
        "notes": list(result.notes),
        "provenance": result.provenance,
    }


def _plain(record: FrontPoint | Rival | Quality) -> dict[str, Any]:
    fields = vars(record).items()
    return {k: v.as_dict() if isinstance(v, Estimate) else v for k, v in fields}
