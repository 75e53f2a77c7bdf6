"""SGLang: a YAML file for ``sglang serve --config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtune.common.yaml_tree import flow
from kvtune.policies.export.engine_wide import (
    CacheType,
    EngineWide,
    limits_of_types,
    one_of,
    positive,
    sixteen_bits,
    text,
)
from kvtune.policies.export.plan import Plan

_TYPES = (
    sixteen_bits("auto"),
    CacheType(
        "fp8_e4m3", (8, 8), lambda head_dim: 2.0 * head_dim, "fp8",
        "scales of quantization-param-path or the checkpoint, else 1.0",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SGLang(EngineWide):
    """One dtype for the whole cache; windows come from the model's own configuration alone."""

    name = "sglang"
    stack = "SGLang"
    stack_version = "0.5.23"
    source = "srt/arg_groups/fields/*.py, srt/server_args.py, srt/mem_cache/kv_cache_dtype.py"
    proof = "parsed by the stack"
    types = _TYPES
    limits = limits_of_types(_TYPES)
    why_dropped = "SGLang has one slot a token for all layers and heads, and evicts nothing"
    notes = (
        "sglang serve --config sglang.yaml",
        "max-total-tokens is what the sequences take; SGLang lowers it where memory is less.",
    )
    schema = {  # noqa: RUF012 (declared as ClassVar by the base)
        "model-path": text,  # model_path, with an underscore, is refused
        "kv-cache-dtype": one_of(*(each.name for each in _TYPES)),
        "context-length": positive,
        "max-running-requests": positive,
        "max-total-tokens": positive,
    }

    def config(self, plan: Plan, chosen: CacheType, batch: int) -> dict[str, Any]:
        """Flag names, with hyphens."""
        return {
            **({"model-path": plan.model} if plan.model else {}),
            "kv-cache-dtype": chosen.name,
            "context-length": plan.sequence_tokens,
            "max-running-requests": batch,
            "max-total-tokens": batch * plan.sequence_tokens,
        }

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """YAML, a key a line."""
        return "sglang.yaml", "".join(f"{key}: {flow(value)}\n" for key, value in config.items())
