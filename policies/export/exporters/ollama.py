"""Ollama: an environment file for ``ollama serve``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from kvtune.policies.export.engine_wide import (
    CacheType,
    EngineWide,
    limits_of_types,
    one_of,
    positive,
    sixteen_bits,
)
from kvtune.policies.export.plan import Plan

_BLOCK = 32


def _type(bits: int) -> CacheType:
    """Codes, and a 16-bit scale for each 32 channels of a token."""
    name, size = f"q{bits}_0", (bits + 16 / _BLOCK) / 4  # bytes of a key's and a value's channel
    detail = f"{name}: blocks of {_BLOCK} channels of a token, symmetric, one 16-bit scale"
    return CacheType(
        name, (bits, bits), lambda head_dim: head_dim * size, f"int{bits}", detail, _BLOCK
    )


_TYPES = (sixteen_bits("f16"), _type(8), _type(4))


@dataclass(frozen=True)
class Ollama(EngineWide):
    """One type for keys and values of all models that the server runs."""

    name = "ollama"
    stack = "Ollama"
    stack_version = "0.33.0-rc2"
    source = "envconfig/config.go, llm/server.go"
    proof = "schema mirror"
    types = _TYPES
    limits = limits_of_types(_TYPES)
    why_dropped = "Ollama evicts nothing before a context is full, which holds the answer too"
    notes = (
        "set -a; . ./ollama.env; ollama serve",
        "a quantised cache needs flash attention; without it Ollama takes f16 silently.",
        "OLLAMA_CONTEXT_LENGTH is of one sequence; a model's num_ctx overrides it.",
    )
    schema = {  # noqa: RUF012
        "OLLAMA_KV_CACHE_TYPE": one_of(*(each.name for each in _TYPES)),
        "OLLAMA_FLASH_ATTENTION": one_of(0, 1),
        "OLLAMA_CONTEXT_LENGTH": positive,
        "OLLAMA_NUM_PARALLEL": positive,
    }

    def config(self, plan: Plan, chosen: CacheType, batch: int) -> dict[str, Any]:
        """Variables of the server."""
        return {
            "OLLAMA_KV_CACHE_TYPE": chosen.name,
            "OLLAMA_FLASH_ATTENTION": int(chosen.name != "f16"),
            "OLLAMA_CONTEXT_LENGTH": plan.sequence_tokens,
            "OLLAMA_NUM_PARALLEL": batch,
        }

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """A variable a line."""
        lines = (f"{key}={shlex.quote(str(value))}\n" for key, value in config.items())
        return "ollama.env", "".join(lines)
