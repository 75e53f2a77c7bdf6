"""The run directory: what was asked, and what was found, each file whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import kvtune
from kvtune.common.estimate import Estimate
from kvtune.common.files import write_json, write_text
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    Pattern,
    PolicyDocument,
    Provenance,
    Serving,
    write_policy,
)
from kvtune.policies.policy_file.document import Quality as WrittenQuality
from kvtune.simulator.model_facts import model_facts
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
    write_text(request.run_dir / "config.json", json.dumps(asked, indent=2, default=str) + "\n")


def write_result(result: SearchResult) -> None:
    """Write ``policy.yaml``, the baselines' policies and ``result.json``."""
    run_dir = result.request.run_dir
    document = _document(result)
    write_text(run_dir / "policy.yaml", write_policy(document))
    for rival in result.rivals[1:]:
        if rival.policy is not None:
            text = write_policy(_baseline_document(document, rival, rival.policy))
            write_text(run_dir / str(policy_file(rival)), text)
    write_json(run_dir / "result.json", result_as_plain(result))


def _document(result: SearchResult) -> PolicyDocument:
    request, quality = result.request, result.quality
    written = WrittenQuality(quality.source, quality.stand_in, quality.kl)
    return PolicyDocument(
        policy=_short(result.policy),
        model=model_facts(request.shape),
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
            generated_tokens=request.generated_tokens,
            batch=result.sequences,
            gpu=request.gpu.slug,
            cache_bytes=result.budget.cache_bytes,
        ),
    )


def _baseline_document(plan: PolicyDocument, rival: Rival, policy: Policy) -> PolicyDocument:
    """A baseline's policy, with the plan's provenance and its own loss."""
    made = plan.provenance
    assert made is not None  # noqa: S101 - written above
    assert made.quality is not None  # noqa: S101
    quality = replace(made.quality, kl_nats_per_token=rival.live or rival.predicted)
    provenance = replace(made, quality=quality, memory={}, latency={})
    return replace(plan, policy=_short(replace(policy, name=rival.name)), provenance=provenance)


def _short(policy: Policy) -> Policy | Pattern:
    """One option everywhere as the one line that it is, which any model can take."""
    options = set(policy.options())
    return (
        Pattern(options.pop(), (), policy.allocator, policy.name) if len(options) == 1 else policy
    )


def policy_file(rival: Rival) -> str | None:
    """Where a rival's policy lies in the run directory; None of one that has none."""
    if rival.family == "kvtune":
        return "policy.yaml"
    return f"baselines/{rival.family}.yaml" if rival.policy is not None else None


def result_as_plain(result: SearchResult) -> dict[str, Any]:
    """The result as JSON data; the policy lies beside it as YAML."""
    return {
        "kvtune": kvtune.__version__,
        "model": result.request.shape.name,
        "gpu": result.request.gpu.slug,
        "policy": "policy.yaml",
        "budget": result.budget.as_dict(),
        "front": [_plain(point) for point in result.front],
        "rivals": [_plain(rival) | {"policy": policy_file(rival)} for rival in result.rivals],
        "quality": _plain(result.quality),
        "predicted": _plain(result.predicted),
        "memory": result.memory.as_dict(),
        "latency": result.latency.as_dict(),
        "prefill": result.prefill.as_dict(),
        "compression": result.compression.as_dict(),
        "context_tokens": result.context_tokens,
        "sequences": result.sequences,
        "full_cache_sequences": result.full_cache_sequences,
        "prompt_bytes": result.prompt_bytes,
        "share": result.share,
        "full_cache_accuracy": _value(result.full_cache_accuracy),
        "counters": result.counters,
        "notes": list(result.notes),
        "provenance": result.provenance,
    }


def _plain(record: FrontPoint | Rival | Quality) -> dict[str, Any]:
    return {name: _value(value) for name, value in vars(record).items()}


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _value(entry) for name, entry in value.items()}
    return value.as_dict() if isinstance(value, Estimate) else value
