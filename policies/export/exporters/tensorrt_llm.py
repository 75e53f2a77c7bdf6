"""TensorRT-LLM: a YAML file for ``trtllm-serve MODEL --config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtune.common.yaml_tree import flow
from kvtune.policies.export.engine_wide import (
    CacheType,
    EngineWide,
    limits_of_types,
    positive,
    sixteen_bits,
)
from kvtune.policies.export.plan import Plan

_PAGE = 32
_TYPES = (
    sixteen_bits("auto"),
    CacheType(
        "fp8", (8, 8), lambda head_dim: 2.0 * head_dim, "fp8", "scales of the checkpoint, else 1.0"
    ),
)


@dataclass(frozen=True)
class TensorRTLLM(EngineWide):
    """One dtype for the whole cache.

    ``max_attention_window`` takes a size a layer, but Llama's attention does not read it
    (TensorRT-LLM issue 11244), and sinks are ignored: tokens are kept.
    """

    name = "tensorrt-llm"
    stack = "TensorRT-LLM"
    stack_version = "main 0004396720 (2026)"
    source = "tensorrt_llm/llmapi/llm_args.py, docs/source/features/kvcache.md"
    proof = "schema mirror"
    types = _TYPES
    limits = limits_of_types(_TYPES)
    page_tokens = _PAGE
    why_dropped = "its windows are not read by Llama's attention, and per-head budgets have no key"
    notes = (
        "trtllm-serve MODEL --config trtllm.yaml",
        "unknown keys are refused there; max_tokens and the fraction of free memory both bound the "
        "cache, and the smaller one counts.",
    )
    schema = {  # noqa: RUF012
        "max_batch_size": positive,
        "max_seq_len": positive,
        "max_num_tokens": positive,
        "kv_cache_config": lambda value: (
            set(value) == {"dtype", "tokens_per_block", "max_tokens"}
            and value["dtype"] in {each.name for each in _TYPES}
            and value["tokens_per_block"] in {2**n for n in range(10)}
            and positive(value["max_tokens"])
        ),
    }

    def config(self, plan: Plan, chosen: CacheType, batch: int) -> dict[str, Any]:
        """Fields of ``TorchLlmArgs``."""
        pages = -(-plan.sequence_tokens // _PAGE)
        return {
            "max_batch_size": batch,
            "max_seq_len": plan.sequence_tokens,
            "max_num_tokens": max(8192, batch),
            "kv_cache_config": {
                "dtype": chosen.name,
                "tokens_per_block": _PAGE,
                "max_tokens": batch * pages * _PAGE,
            },
        }

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """YAML; the cache's settings lie one level deeper."""
        lines = []
        for key, value in config.items():
            if isinstance(value, dict):
                inside = "".join(f"  {name}: {flow(each)}\n" for name, each in value.items())
                lines.append(f"{key}:\n{inside}")
            else:
                lines.append(f"{key}: {flow(value)}\n")
        return "trtllm.yaml", "".join(lines)
