"""LMDeploy: the flags of ``lmdeploy serve api_server``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from kvtune.policies.export.engine_wide import (
    CacheType,
    EngineWide,
    asymmetric,
    limits_of_types,
    one_of,
    positive,
    sixteen_bits,
)
from kvtune.policies.export.plan import Plan

_PAGE = 64
_SCALES = 8.0  # bytes of a token and head: a 16-bit scale and zero point for keys, and for values
_TYPES = (
    sixteen_bits("0"),
    asymmetric("8", 8, _SCALES),
    asymmetric("4", 4, _SCALES),
)


@dataclass(frozen=True)
class LMDeploy(EngineWide):
    """TurboMind's quantisation of the whole cache; there are no windows and no eviction."""

    name = "lmdeploy"
    stack = "LMDeploy"
    stack_version = "0.18.0"
    source = "lmdeploy/messages.py, lmdeploy/cli/utils.py"
    proof = "parsed by the stack"
    types = _TYPES
    limits = limits_of_types(_TYPES)
    page_tokens = _PAGE
    why_dropped = "LMDeploy evicts nothing"
    notes = (
        "lmdeploy serve api_server MODEL and the flags of lmdeploy.txt",
        "unknown names are taken silently by LMDeploy's Python configuration, and so are blocks of "
        "0 tokens; they are checked here.",
        "the bytes of scales are taken from the description, not from a run.",
    )
    schema = {  # noqa: RUF012
        "backend": one_of("turbomind"),
        "quant-policy": one_of(*(int(each.name) for each in _TYPES)),
        "session-len": positive,
        "max-batch-size": positive,
        "cache-block-seq-len": one_of(64, 128),
    }

    def config(self, plan: Plan, chosen: CacheType, batch: int) -> dict[str, Any]:
        """The flags of the server and their values."""
        return {
            "backend": "turbomind",
            "quant-policy": int(chosen.name),
            "session-len": plan.sequence_tokens,
            "max-batch-size": batch,
            "cache-block-seq-len": _PAGE,
        }

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """The flags in one line of text."""
        flags = [f"--{key} {shlex.quote(str(value))}" for key, value in config.items()]
        return "lmdeploy.txt", " ".join(flags) + "\n"
