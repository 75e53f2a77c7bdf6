"""A comparison on disk: ``compare.json`` and every strategy's plan."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from typing import Any

from kvtune.common.files import write_json, write_text
from kvtune.policies.policy_file.document import PolicyDocument, write_policy
from kvtune.simulator.model_facts import model_facts
from kvtune.tuner.compare.result import Comparison, Outcome, Times
from kvtune.tuner.request import SearchRequest

RESULT = "compare.json"


def write_comparison(found: Comparison, request: SearchRequest) -> None:
    """Every plan as a policy file, and the result so far."""
    facts, folder = model_facts(request.shape), request.run_dir
    for outcome in found.outcomes:
        if outcome.policy is not None:
            document = PolicyDocument(outcome.policy, facts)
            write_text(folder / policy_file(outcome), write_policy(document))
    write_json(folder / RESULT, as_plain(found))


def policy_file(outcome: Outcome) -> str:
    """Where a strategy's plan lies in the folder."""
    return f"{100 * outcome.asked_share:g}%/{outcome.strategy}.yaml"


def as_plain(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON data; plans lie beside it as YAML."""
    return {
        **{name: getattr(found, name) for name in ("model", "device", "workload", "seconds")},
        "prepared": asdict(found.prepared),
        "held_out_samples": found.held_out_samples,
        "outcomes": [_outcome_as_plain(each) for each in found.outcomes],
        "verdict": list(found.sentences()),
    }


def _outcome_as_plain(outcome: Outcome) -> dict[str, Any]:
    names = ("strategy", "words", "asked_share", "share", "plans_run")
    return {
        **{name: getattr(outcome, name) for name in names},
        "kl": outcome.kl.as_dict() if outcome.kl else None,
        "times_the_tuner": _times(outcome.times_the_tuner),
        "points": [{"seconds": p.seconds, "kl": p.kl.as_dict()} for p in outcome.points],
        "policy": policy_file(outcome) if outcome.policy else None,
    }


def _times(times: Times | None) -> dict[str, Any] | None:
    """A ratio; an end that is not bounded, or that is not known, is None."""
    if times is None:
        return None
    value, *interval = (each if isfinite(each) else None for each in vars(times).values())
    return {"value": value, "interval": interval}
