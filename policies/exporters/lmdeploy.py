"""LMDeploy: the flags of ``lmdeploy serve api_server``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from kvtune.policies.engine_wide import (
    CacheType,
    EngineWide,
    limits_of_types,
    one_of,
    positive,
    sixteen_bits,
)
from kvtune.policies.exporter import Plan

_PAGE = 64
_SCALES = 8.0  # bytes of a token and head: a 16-bit scale and zero point for keys, and for values
_DETAIL = "asymmetric, a scale and a zero point a token and head"
_TYPES = (
    sixteen_bits("0"),
    CacheType("8", (8, 8), lambda head_dim: 2.0 * head_dim + _SCALES, "int8", _DETAIL),
    CacheType("4", (4, 4), lambda head_dim: 1.0 * head_dim + _SCALES, "int4", _DETAIL),
)


@dataclass(frozen=True)
class LMDeploy(EngineWide):
    """TurboMind's quantisation of the whole cache; there are no windows and no eviction."""

    name = "lmdeploy"
    stack = "LMDeploy"
    stack_version = "0.18.0"
    source = "lmdeploy/messages.py, lmdeploy/cli/utils.py"
    proof = "schema mirror"
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
        """Flags."""
        return {
            "backend": "turbomind",
            "quant-policy": int(chosen.name),
            "session-len": plan.sequence_tokens,
            "max-batch-size": batch,
            "cache-block-seq-len": _PAGE,
        }

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """One line."""
        flags = [f"--{key} {shlex.quote(str(value))}" for key, value in config.items()]
        return "lmdeploy.txt", " ".join(flags) + "\n"
