"""kvtune inside vLLM 0.32 and 0.33, by its public hooks: an attention backend and a cache spec.

The spec has no views of its own (``has_layer_views``), so that vLLM allocates its cache memory as
ever and hands over the whole of it; a block of it holds pages of our sizes. The spec's manager asks
for as many blocks as the plan takes, so that the scheduler admits what really fits. vLLM frees,
preempts and aborts as ever: a request's pages are in its blocks, and go back with them.
"""

from __future__ import annotations

import dataclasses

from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvtune.runtime.serving.vllm_attention import PlanBackend, register_attention
from kvtune.runtime.serving.vllm_planning import (
    PlanManager,
    PlanSpec,
    check_layer,
    plan_for,
)


def register() -> None:
    """Called in each of vLLM's processes."""
    register_attention(f"{__name__}.Backend")


class LayerSpec(PlanSpec):
    """A layer's share of blocks; its memory is that of all layers."""

    has_layer_views = False
    uses_slot_mapping = False
    prefix_cacheable = False

    @property
    def page_size_bytes(self) -> int:
        """A layer's share of a block."""
        return self.planned.block_bytes // self.planned.policy.layers


KVCacheSpecRegistry.register(LayerSpec, PlanManager)


class Backend(PlanBackend):
    """Asks for memory by a spec that the layer's is exchanged for."""

    @classmethod
    def customize_spec(cls, spec: FullAttentionSpec) -> FullAttentionSpec:
        """The plan's spec in place of one that holds every token.

        Raises:
            KvtuneError: a layer or a plan that this cannot serve.
        """
        check_layer(spec)
        known = {each.name: getattr(spec, each.name) for each in dataclasses.fields(spec)}
        planned = plan_for(spec.num_kv_heads, spec.head_size)
        return LayerSpec(**known | {"non_causal": True, "dcp_sharded": False}, planned=planned)
