"""kvtune inside vLLM 0.26, the newest for torch 2.11: an attention backend, a spec and a worker.

This version has no hook by which a backend exchanges a layer's spec. Its ``--worker-cls`` names a
worker that does: the first layer asks for whole blocks, with the pages of all layers, and the other
layers share its memory, as layers of some models do (``shared_kv_cache_layers``). The rest is as in
``vllm_0_32``. Serve with ``--worker-cls kvtune.runtime.serving.vllm_0_26_worker.Worker``.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvtune.runtime.serving.vllm_attention import PlanBackend, register_attention
from kvtune.runtime.serving.vllm_planning import PlanManager, PlanSpec, plan_for


def register() -> None:
    """Called in each of vLLM's processes."""
    register_attention(f"{__name__}.Backend")


class WholeSpec(PlanSpec):
    """Whole blocks, with the pages of all layers."""

    @property
    def page_size_bytes(self) -> int:
        """Bytes of a block."""
        return self.planned.block_bytes


KVCacheSpecRegistry.register(WholeSpec, PlanManager)


class Backend(PlanBackend):
    """Says how a block's memory is viewed: as bytes."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *_: Any, **__: Any
    ) -> tuple[int, ...]:
        """Blocks of the plan's bytes."""
        return num_blocks, plan_for(num_kv_heads, head_size).block_bytes
