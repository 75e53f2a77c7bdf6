"""Attention through a plan's pages, as vLLM calls it: once a step, and once a layer.

Shared by the adapters of all versions of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from kvtune.common.errors import KvtuneError
from kvtune.runtime.serving.running import Running
from kvtune.runtime.serving.seat_planning import most_room
from kvtune.runtime.serving.step import Step


def register_attention(backend: str) -> None:
    """Take the place of the CPU's attention; on a GPU stand as ``--attention-backend CUSTOM``.

    Args:
        backend: module and class.
    """
    register_backend(AttentionBackendEnum.CUSTOM, backend)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, backend)


class PlanBackend(AttentionBackend):  # type: ignore[misc]
    """Attention through the plan's pages; adapters add how the cache's memory is asked for."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's registry that is free for others."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """The class whose objects vLLM's layers call."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """What a step calls."""
        return Builder


@dataclass(frozen=True)
class Metadata:
    """A step of all layers, and who holds the requests."""

    running: Running
    step: Step


class _Table:
    """vLLM's block table, a tensor or numpy's."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def first(self) -> list[int]:
        """The first block of each request."""
        found: list[int] = self.table[:, 0].tolist()
        return found

    def blocks(self, row: int, start: int, stop: int) -> list[int]:
        """Some of one request's blocks."""
        found: list[int] = self.table[row, start:stop].tolist()
        return found


class Builder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Says once a step who reads a prompt and who generates; one of all layers."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1  # who generates comes first: no tokens are picked out one by one

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        requests = vllm_config.scheduler_config.max_num_seqs
        room = most_room(kv_cache_spec.planned, requests, vllm_config.model_config.max_model_len)
        self.running = Running(kv_cache_spec.planned, torch.device(device), room=room)
        self.host_table: Callable[[], Any] | None = None  # where it is known, nobody waits

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """The step's requests; of a trial step, which has none, rows of nobody."""
        given, count = common_attn_metadata, common_attn_metadata.num_reqs
        lengths = given.seq_lens_cpu_upper_bound
        lengths = given.seq_lens if lengths is None else lengths
        self._attach()
        step = self.running.begin(
            _Table((self.host_table() if self.host_table else given.block_table_tensor)[:count]),
            given.query_start_loc_cpu.tolist(),
            lengths[:count].tolist(),
        )
        if given.max_query_len == 1 and not (step.prompts or step.generating):
            step = self.running.nobody(count)
        return Metadata(self.running, step)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """A step of rows that are nobody's until the graph is replayed."""
        self._attach()
        return Metadata(self.running, self.running.capture(common_attn_metadata.num_reqs))

    def _attach(self) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        layer = layers[self.layer_names[0]]
        self.running.attach(layer.kv_cache, layer.impl.num_heads)


class Impl(AttentionImpl):  # type: ignore[misc]
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        beyond = {
            "ALiBi": alibi_slopes, "a sliding window": sliding_window, "sinks": sinks,
            "soft-capped logits": logits_soft_cap, "shared layers": kv_sharing_target_layer_name,
        }  # fmt: skip
        if found := [name for name, value in beyond.items() if value]:
            raise KvtuneError(f"kvtune's vLLM plugin does not serve attention with {found[0]}")
        if attn_type != "decoder":
            raise KvtuneError(f"kvtune's vLLM plugin does not serve {attn_type} attention")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill in the output ``[T, Hq, D]``; zero while vLLM only tries out its memory."""
        if attn_metadata is None:
            return output.zero_()
        out = output.view(query.shape)
        number = extract_layer_index(layer.layer_name)
        attn_metadata.running.attend(
            attn_metadata.step, number, (query, key, value), out, self.scale
        )
        return output
