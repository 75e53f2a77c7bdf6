"""kvtune inside vLLM 0.32 and 0.33, by its public hooks: an attention backend and a cache spec.

The spec has no views of its own (``has_layer_views``), so that vLLM allocates its cache memory as
ever and hands over the whole of it; a block of it holds pages of our sizes. The spec's manager asks
for as many blocks as the plan takes, so that the scheduler admits what really fits. vLLM frees,
preempts and aborts as ever: a request's pages are in its blocks, and go back with them.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvtune.common.errors import KvtuneError
from kvtune.policies.policy_file.reader import read_policy
from kvtune.runtime.serving.blocks import PlannedBlocks, check_servable
from kvtune.runtime.serving.running import Running, Step

logger = init_logger("vllm.kvtune")


def register() -> None:
    """Take the place of the CPU's attention; on a GPU stand as ``--attention-backend CUSTOM``."""
    name = f"{__name__}.Backend"
    register_backend(AttentionBackendEnum.CUSTOM, name)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, name)


@dataclass(frozen=True, kw_only=True)
class PlanSpec(FullAttentionSpec):  # type: ignore[misc]
    """What vLLM's planner knows of the cache: blocks that a sequence takes under the plan.

    ``non_causal`` is vLLM's switch for attention that needs whole prompts: its engine then turns
    chunked prefill and prefix caching off, as a compressed prompt needs too.
    """

    planned: PlannedBlocks

    has_layer_views = False
    uses_slot_mapping = False
    prefix_cacheable = False

    @property
    def page_size_bytes(self) -> int:
        """A layer's share of a block."""
        return self.planned.block_bytes // self.planned.policy.layers

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of a request with the longest possible prompt."""
        check_engine(vllm_config)
        longest: int = vllm_config.model_config.max_model_len
        return self.planned.blocks(max(1, longest - 1), longest) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """No fewer than any request holds, nor than vLLM's own tables index."""
        indexed: int = -(-max_len // self.block_size)
        return max(self.planned.blocks(max_len, 2 * max_len), indexed)

    @classmethod
    def merge(cls, specs: list[PlanSpec]) -> PlanSpec:
        """All layers have the same."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers under one plan have one spec")
        return specs[0]


class PlanManager(SingleTypeKVCacheManager):  # type: ignore[misc]
    """Gives each request as many blocks as the plan takes for its lengths."""

    def __init__(self, kv_cache_spec: PlanSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.planned = kv_cache_spec.planned
        self.prompts: dict[str, int] = {}  # tokens that were read in one piece, by request

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that a request lacks to hold so many tokens."""
        prompt = self.prompts.get(request_id, num_tokens)
        have = len(self.req_to_blocks.get(request_id, ()))
        return max(0, self.planned.blocks(prompt, num_tokens) - have)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        """Give them; the first call is for the whole prompt."""
        missing = self.get_num_blocks_to_allocate(request_id, num_tokens)
        self.prompts.setdefault(request_id, num_tokens)
        blocks = self.block_pool.get_new_blocks(missing) if missing else []
        self.req_to_blocks[request_id].extend(blocks)
        return list(blocks)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """A request has ended, or is preempted and will be read again."""
        self.prompts.pop(request_id, None)
        return list(super().pop_blocks_for_free(request_id))

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Compressed prompts have nothing in common."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:  # fmt: skip
        """None: a prompt that was compressed for one request is no prefix of another."""
        return tuple([] for _ in kv_cache_group_ids), 0


KVCacheSpecRegistry.register(PlanSpec, PlanManager)


class Backend(AttentionBackend):  # type: ignore[misc]
    """Attention through the plan's pages."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's registry that is free for others."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """What layers call."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """What a step calls."""
        return Builder

    @classmethod
    def customize_spec(cls, spec: FullAttentionSpec) -> FullAttentionSpec:
        """The plan's spec in place of one that holds every token.

        Raises:
            KvtuneError: a layer or a plan that this cannot serve.
        """
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            raise KvtuneError(f"kvtune's vLLM plugin serves full attention, not {spec}")
        known = {each.name: getattr(spec, each.name) for each in dataclasses.fields(spec)}
        planned = plan_for(spec.num_kv_heads, spec.head_size)
        return PlanSpec(**known | {"non_causal": True, "dcp_sharded": False}, planned=planned)


def plan_for(kv_heads: int, head_dim: int) -> PlannedBlocks:
    """The plan that ``KVTUNE_POLICY`` names, for a model of these heads.

    Raises:
        KvtuneError: it is for another model, or nothing that pages hold.
    """
    document = read_policy(os.environ["KVTUNE_POLICY"])
    config = get_current_vllm_config_or_none()
    if config is not None:
        layers = config.model_config.hf_text_config.num_hidden_layers
    elif document.model is not None:
        layers = document.model.layers
    else:
        raise KvtuneError("the policy file does not say which model it is for")
    policy = document.bind(layers, kv_heads)
    policy.check_fits(layers, kv_heads)
    check_servable(policy, head_dim)
    return PlannedBlocks(policy, head_dim)


def check_engine(config: Any) -> None:
    """Refuse engines whose settings a compressed prompt does not allow.

    Raises:
        KvtuneError: names the switch.
    """
    longest, most = (
        config.model_config.max_model_len,
        config.scheduler_config.max_num_batched_tokens,
    )
    parallel = config.parallel_config
    if most < longest:
        raise KvtuneError(
            f"a prompt of up to {longest} tokens must be read in one step, and a step takes {most}",
            hint=f"give --max-num-batched-tokens {longest}, or a smaller --max-model-len.",
        )
    if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
        raise KvtuneError("kvtune's vLLM plugin serves a model that is on one device")
    if getattr(config, "use_v2_model_runner", False):
        raise KvtuneError(
            "vLLM's second model runner passes over layers that lay out their own memory",
            hint="set VLLM_USE_V2_MODEL_RUNNER=0.",
        )
    if config.speculative_config is not None:
        raise KvtuneError("kvtune's vLLM plugin does not serve speculative decoding")
    logger.info_once(
        "kvtune: prompts are read whole and compressed by %s; prefix caching and chunked prefill "
        "are off", os.environ["KVTUNE_POLICY"],
    )  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """A step of all layers, and who holds the requests."""

    running: Running
    step: Step


class _Table:
    """vLLM's block table."""

    def __init__(self, table: Tensor) -> None:
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

    _cudagraph_support = AttentionCGSupport.NEVER  # other operations are captured piece by piece

    def __init__(
        self, kv_cache_spec: PlanSpec, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.running = Running(kv_cache_spec.planned, torch.device(device))

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """The step's requests."""
        given = common_attn_metadata
        lengths = given.seq_lens_cpu_upper_bound
        lengths = given.seq_lens if lengths is None else lengths
        layer = self.vllm_config.compilation_config.static_forward_context[self.layer_names[0]]
        self.running.attach(layer.kv_cache)
        step = self.running.begin(
            _Table(given.block_table_tensor[: given.num_reqs]),
            given.query_start_loc_cpu.tolist(),
            lengths[: given.num_reqs].tolist(),
        )
        return Metadata(self.running, step)


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
