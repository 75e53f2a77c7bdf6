"""LMCache: a YAML file for the store of prompts behind vLLM, in the host's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtune.common.units import GIB
from kvtune.common.yaml_tree import flow
from kvtune.policies.export.engine_wide import (
    EngineWide,
    limits_of_types,
    one_of,
    positive,
    sixteen_bits,
)
from kvtune.policies.export.plan import Plan

_CHUNK = 256
_STEPS = 1024  # of a GiB: sizes are whole mebibytes
_TYPES = (sixteen_bits("naive"),)


@dataclass(frozen=True)
class LMCache(EngineWide):
    """Whole prompts as vLLM holds them in 16 bits, so that one that comes again is not read again.

    What a plan keeps of a prompt has no place in it: it moves vLLM's blocks, and cannot change
    their shape. The file says how much of the host's memory as many sequences take as the plan
    serves.
    """

    name = "lmcache"
    stack = "LMCache"
    stack_version = "0.5.6"
    source = "lmcache/v1/config.py, lmcache/v1/cache_engine.py"
    proof = "parsed by the stack"
    types = _TYPES
    limits = limits_of_types(_TYPES)
    page_tokens = _CHUNK
    why_dropped = "LMCache stores the blocks that vLLM holds, and evicts whole prompts alone"
    notes = (
        "LMCACHE_CONFIG_FILE=lmcache.yaml vllm serve MODEL --kv-transfer-config "
        """'{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'""",
        "the memory is the host's; what vLLM holds on the GPU comes beside it (--to vllm).",
        "max_local_cpu_size counts GiB, though LMCache calls them GB; unknown keys are passed over "
        "there with a warning.",
        "not with kvtune's vLLM plugin: compressed prompts are no blocks of tokens.",
    )
    schema = {  # noqa: RUF012
        "chunk_size": positive,
        "local_cpu": one_of(True),
        "max_local_cpu_size": lambda value: isinstance(value, float) and value > 0,
        "remote_serde": one_of(*(each.name for each in _TYPES)),
    }

    def config(self, plan: Plan, chosen: Any, batch: int) -> dict[str, Any]:
        """Room for all sequences, in whole chunks."""
        tokens = -(-plan.sequence_tokens // _CHUNK) * _CHUNK
        facts = plan.facts
        each = facts.layers * facts.kv_heads * tokens * chosen.token_bytes(facts.head_dim)
        return {
            "chunk_size": _CHUNK,
            "local_cpu": True,
            "max_local_cpu_size": -(-batch * int(each) * _STEPS // GIB) / _STEPS,
            "remote_serde": chosen.name,
        }

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """A setting a line."""
        return "lmcache.yaml", "".join(f"{key}: {flow(value)}\n" for key, value in config.items())
