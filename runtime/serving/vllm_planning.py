"""What vLLM's scheduler is told of a plan: blocks a request, and settings that a plan needs.

Shared by the adapters of all versions of vLLM.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvtune.common.errors import KvtuneError
from kvtune.policies.policy_file.reader import read_policy
from kvtune.policies.servable import check_servable
from kvtune.runtime.serving.blocks import PlannedBlocks, left_to_answers

logger = init_logger("vllm.kvtune")


@dataclass(frozen=True, kw_only=True)
class PlanSpec(FullAttentionSpec):  # type: ignore[misc]
    """What vLLM's planner knows of the cache: blocks that a sequence takes under the plan.

    Adapters say how large a page is. ``non_causal`` is vLLM's switch for attention that needs whole
    prompts: its engine then turns chunked prefill and prefix caching off, as a compressed prompt
    needs too.
    """

    planned: PlannedBlocks

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of a request with the longest possible prompt."""
        check_engine(vllm_config)
        longest: int = vllm_config.model_config.max_model_len
        blocks: int = self.planned.blocks(max(1, longest - 1), longest) * self.page_size_bytes
        return blocks

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
        """Blocks that a request lacks to hold so many tokens, and those it must leave to others."""
        left = 0 if request_id in self.prompts else self._left_to_others()
        return self._missing(request_id, num_tokens) + left

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        """Give them; the first call is for the whole prompt."""
        missing = self._missing(request_id, num_tokens)
        self.prompts.setdefault(request_id, num_tokens)
        blocks = self.block_pool.get_new_blocks(missing) if missing else []
        self.req_to_blocks[request_id].extend(blocks)
        return list(blocks)

    def _missing(self, request_id: str, num_tokens: int) -> int:
        prompt = self.prompts.get(request_id, num_tokens)
        have = len(self.req_to_blocks.get(request_id, ()))
        return max(0, self.planned.blocks(prompt, num_tokens) - have)

    def _left_to_others(self) -> int:
        """None where nobody runs: else whoever needs most of the memory would wait for ever."""
        if not self.prompts:
            return 0
        held = sum(map(len, self.req_to_blocks.values()))
        return left_to_answers(held + self.block_pool.get_num_free_blocks())

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


def check_layer(spec: FullAttentionSpec) -> None:
    """Refuse layers that do not attend to all of the past.

    Raises:
        KvtuneError: names the layer's spec.
    """
    if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
        raise KvtuneError(f"kvtune's vLLM plugin serves full attention, not {spec}")


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
