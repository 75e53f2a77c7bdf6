"""A model on cards that serve requests, and what one policy's sequences take of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, Tier
from kvtune.common.units import format_bytes
from kvtune.policies.policy import Policy
from kvtune.policies.servable import check_servable
from kvtune.profiles.elsewhere import StackChoice
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import split_over
from kvtune.simulator.latency.front_end import NOTHING, FrontEnd
from kvtune.simulator.latency.stacks import KV_BYTES, KvFormat, StackSetting
from kvtune.simulator.memory.engine_memory import EngineFlags, engine_memory
from kvtune.simulator.memory.plan import memory_plan
from kvtune.simulator.memory.weights import WeightFormat
from kvtune.simulator.serving.sequence import Footprint
from kvtune.simulator.serving.step import Limits
from kvtune.simulator.serving.step_times import End, EngineTimes


@dataclass(frozen=True)
class Server:
    """What serves requests: a model, cards, and the limits of an engine.

    Args:
        shape: the whole model.
        gpu: one of the cards.
        weights: format of the matrices.
        cache: memory for the cache on each card, bytes.
        limits: of the engine's steps.
        block_tokens: generated tokens that a block holds.
        host_bytes: for the share of each card in sequences that had to leave; 0 for none.
        gpus: cards that share each layer.
        setting: how a serving stack serves it; None for kvtune's own kernels.
        notes: what of the memory is not as the stack would have it.
    """

    shape: ModelShape
    gpu: GpuProfile
    weights: WeightFormat
    cache: Estimate
    limits: Limits
    block_tokens: int = 16
    host_bytes: int = 0
    gpus: int = 1
    setting: StackSetting | None = None
    notes: tuple[str, ...] = ()

    @property
    def local(self) -> ModelShape:
        """One card's share of the model."""
        return split_over(self.shape, self.gpus)

    @property
    def stack(self) -> StackChoice:
        """Whose kernels."""
        return self.setting.stack if self.setting else "kvtune"


@dataclass(frozen=True)
class Prepared:
    """A server that holds its sequences under one policy.

    Args:
        name: of the policy.
        server: model, card and engine.
        footprint: bytes of a sequence on each card.
        times: of the engine's steps: likely, and at both ends of their intervals.
        front: what a first token takes beside them.
        limits: of the engine's steps where the policy changes them; None for the server's.
        tiers: of the times of each part of a step, by what it does.
    """

    name: str
    server: Server
    footprint: Footprint
    times: Mapping[End, EngineTimes]
    front: FrontEnd = NOTHING
    limits: Limits | None = None
    tiers: Mapping[str, Tier] = field(default_factory=dict)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of cache."""
        return self.server.block_tokens * self.footprint.token


class StackKernels(NamedTuple):
    """Whose kernels serve a model.

    Args:
        stack: a serving stack, or ``kvtune``.
        kv_format: of a stack's cache.
        expert_parallel: groups of cards that have routed experts of their own, under a stack.
    """

    stack: StackChoice = "kvtune"
    kv_format: KvFormat = "bfloat16"
    expert_parallel: int = 1


OWN = StackKernels()


def server(
    shape: ModelShape,
    gpu: GpuProfile,
    memory_bytes: int,
    weights: str,
    limits: Limits,
    *,
    block_tokens: int = 16,
    host_bytes: int = 0,
    gpus: int = 1,
    kernels: StackKernels = OWN,
) -> Server:
    """Split each card's memory: weights, overhead and a step's activations, the rest for the cache.

    Under vLLM the cache is what vLLM leaves for it (``simulator/memory/engine_memory.py``); where
    that is not known, it is what kvtune would leave, and a note says so.

    Args:
        shape: the whole model.
        gpu: one of the cards.
        memory_bytes: limit of each card.
        weights: format of the matrices, or ``auto``.
        limits: of the engine's steps.
        block_tokens: generated tokens that a block holds.
        host_bytes: of the host for sequences that had to leave all cards.
        gpus: cards that share each layer.
        kernels: whose they are, and of what cache.

    Raises:
        KvtuneError: nothing is left for the cache, a step cannot hold all sequences, or so many
            cards cannot share the model's heads.
    """
    local = split_over(shape, gpus)
    if limits.step_tokens < limits.sequences:
        raise KvtuneError(
            f"a step of {limits.step_tokens} tokens cannot give {limits.sequences} sequences one "
            "each",
            hint="raise --max-batched-tokens or lower --max-sequences.",
        )
    asked = min(limits.step_tokens, shape.max_context)
    chosen = memory_plan(local, gpu, memory_bytes, context_tokens=asked, weights=weights)
    cache = replace(chosen, batch=limits.sequences, chunk_tokens=limits.step_tokens).cache
    notes: tuple[str, ...] = ()
    if kernels.stack == "vllm":
        asked_of = memory_bytes, chosen.weight_format, limits, block_tokens, gpus, kernels
        try:
            cache = _left_by_vllm(shape, gpu, *asked_of)
        except KvtuneError as unknown:
            notes = (f"the cache's memory is what kvtune would leave for it: {unknown.message}",)
    if cache.value < local.kv_bytes(block_tokens, KV_BYTES[kernels.kv_format]):
        raise KvtuneError(
            f"nothing of {format_bytes(memory_bytes)} is left for the cache when steps hold "
            f"{limits.step_tokens} tokens of {limits.sequences} sequences",
            hint="lower --max-batched-tokens or --max-sequences, or raise --mem.",
        )
    host = host_bytes // gpus
    weight_format = chosen.weight_format
    setting = None
    if kernels.stack != "kvtune":
        of = kernels.kv_format, kernels.expert_parallel
        setting = StackSetting(kernels.stack, weight_format, gpus, *of)
    return Server(
        shape, gpu, weight_format, cache, limits, block_tokens, host, gpus, setting, notes
    )


def _left_by_vllm(
    shape: ModelShape,
    gpu: GpuProfile,
    memory_bytes: int,
    weights: WeightFormat,
    limits: Limits,
    block_tokens: int,
    gpus: int,
    kernels: StackKernels,
) -> Estimate:
    """What vLLM would leave for its cache on each card.

    A limit of the whole card is its default share of it, as where none is named.

    Raises:
        KvtuneError: a kind of layer whose blocks are not modelled.
    """
    share = None if memory_bytes == gpu.visible_bytes else memory_bytes / gpu.visible_bytes
    flags = EngineFlags(
        gpu_memory_utilization=share,
        max_num_seqs=limits.sequences,
        max_num_batched_tokens=limits.step_tokens,
        kv_cache_bytes=KV_BYTES[kernels.kv_format],
        block_size=block_tokens,
        expert_parallel=kernels.expert_parallel > 1,
    )
    return engine_memory(shape, gpu, weights, flags, gpus=gpus).cache


def check_planned(server: Server, setting: StackSetting, policy: Policy) -> None:
    """Refuse policies under stacks that kvtune has no plugin for, and those that it refuses."""
    if setting.stack != "vllm" or setting.kv_format != "bfloat16":
        raise KvtuneError(
            f"a policy is served by kvtune's plugin in vLLM, not by {setting.stack} over "
            f"{setting.kv_format}",
            hint="--stack vllm without --kv-cache-dtype; or leave out --policy, or --stack.",
        )
    check_servable(policy, server.shape.head_dim)
