"""The run directory: what was asked, and what was found, each file whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import kvtune
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
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import PLAN_FILE, Baseline, SearchResult


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
    write_text(run_dir / PLAN_FILE, write_policy(document))
    for baseline in result.baselines[1:]:
        if baseline.policy is not None:
            policy = result.policies[baseline.policy]
            text = write_policy(_baseline_document(document, baseline, policy))
            write_text(run_dir / baseline.policy, text)
    write_json(run_dir / "result.json", result.as_dict())


def _document(result: SearchResult) -> PolicyDocument:
    request, quality = result.request, result.quality
    written = WrittenQuality(quality.source, quality.stand_in, quality.kl, quality.stack)
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
            other_lengths={str(at.prompt_tokens): at.kl.as_dict() for at in result.other_lengths},
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


def _baseline_document(plan: PolicyDocument, baseline: Baseline, policy: Policy) -> PolicyDocument:
    """A baseline's policy, with the plan's provenance and its own loss."""
    made = plan.provenance
    assert made is not None  # noqa: S101 - written above
    assert made.quality is not None  # noqa: S101
    quality = replace(made.quality, kl_nats_per_token=baseline.best, stack="")
    provenance = replace(made, quality=quality, memory={}, latency={}, other_lengths={})
    return replace(plan, policy=_short(replace(policy, name=baseline.name)), provenance=provenance)


def _short(policy: Policy) -> Policy | Pattern:
    """One option everywhere as the one line that it is, which any model can take."""
    options = set(policy.options())
    return (
        Pattern(options.pop(), (), policy.allocator, policy.name) if len(options) == 1 else policy
    )
