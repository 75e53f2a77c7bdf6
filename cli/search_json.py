"""The JSON object of ``kvtune search``; docs/json.md describes it."""

from __future__ import annotations

from typing import Any

from kvtune.cli.inputs import POLICY_FILE
from kvtune.cli.search_report import verdict
from kvtune.policies.policy_file.document import as_plain, read_policy
from kvtune.tuner.result import SearchResult


def answer(result: SearchResult) -> dict[str, Any]:
    """What ``result.json`` holds, with the plan itself, the verdict, and times of this machine."""
    folder, found = result.request.run_dir, verdict(result)
    return result.as_dict() | {
        "run_dir": str(folder),
        "verdict": found.sentence,
        "comparison": found.comparison,
        "plan": as_plain(read_policy(folder / POLICY_FILE)),
        "budget": result.budget,
        "at_once": result.at_once,
        "full_cache_at_once": result.full_cache_at_once,
        "times": result.times,
        "untimed": result.untimed,
    }
