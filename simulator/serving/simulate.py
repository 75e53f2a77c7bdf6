"""A model on a card serves requests under a policy: memory, times and engine put together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import format_bytes
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.budget import memory_budget
from kvtune.simulator.memory.peak import add, fixed_parts
from kvtune.simulator.memory.weights import WeightFormat
from kvtune.simulator.serving.engine import Engine
from kvtune.simulator.serving.footprint import footprint
from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.record import Record
from kvtune.simulator.serving.report import Goals, Served, served
from kvtune.simulator.serving.requests import Requests
from kvtune.simulator.serving.scheduler import Limits, Scheduler
from kvtune.simulator.serving.times import End, Load, step_times


@dataclass(frozen=True)
class Server:
    """What serves.

    Args:
        shape: the model.
        gpu: the card.
        weights: format of the matrices.
        cache: memory for the cache, bytes.
        limits: of the engine's steps.
        block_tokens: generated tokens that a block holds.
        host_bytes: for sequences that had to leave the card; 0 for none.
    """

    shape: ModelShape
    gpu: GpuProfile
    weights: WeightFormat
    cache: Estimate
    limits: Limits
    block_tokens: int = 16
    host_bytes: int = 0


def server(
    shape: ModelShape,
    gpu: GpuProfile,
    memory_bytes: int,
    weights: str,
    limits: Limits,
    *,
    block_tokens: int = 16,
    host_bytes: int = 0,
) -> Server:
    """Split a memory limit: weights, overhead and a step's activations, the rest for the cache.

    Raises:
        KvtuneError: nothing is left for the cache, or a step cannot hold all sequences.
    """
    if limits.step_tokens < limits.sequences:
        raise KvtuneError(
            f"a step of {limits.step_tokens} tokens cannot give {limits.sequences} sequences one "
            "each",
            hint="raise --max-batched-tokens or lower --max-sequences.",
        )
    asked = min(limits.step_tokens, shape.max_context)
    chosen = memory_budget(shape, gpu, memory_bytes, context_tokens=asked, weights=weights)
    parts = fixed_parts(
        shape, gpu, chosen.weight_format, asked, limits.sequences, limits.step_tokens
    )
    fixed = add(*parts)
    left, low, high = (max(memory_bytes - end, 0) for end in (fixed.value, fixed.high, fixed.low))
    if left < shape.kv_bytes(block_tokens):
        raise KvtuneError(
            f"nothing of {format_bytes(memory_bytes)} is left for the cache when steps hold "
            f"{limits.step_tokens} tokens of {limits.sequences} sequences",
            hint="lower --max-batched-tokens or --max-sequences, or raise --mem.",
        )
    cache = Estimate(left, low, high, "B", "assumed")
    return Server(shape, gpu, chosen.weight_format, cache, limits, block_tokens, host_bytes)


def serve(
    server: Server,
    requests: Requests,
    policy: Policy | None,
    goals: Goals,
    ends: tuple[End, ...] = ("value", "low", "high"),
) -> Served:
    """Serve requests under a policy, with likely times and with those at both ends.

    Args:
        server: model, card and engine.
        requests: that arrive.
        policy: for the model; None for the uncompressed cache.
        goals: that goodput is counted under.
        ends: of the times' intervals to run with; ``value`` among them.

    Raises:
        KvtuneError: the policy is for another shape, or cannot be costed on this one.
    """
    shape, limits = server.shape, server.limits
    prompts = _possible(requests, shape.max_context)
    longest_output = min(int(requests.output_tokens.max()), shape.max_context)
    held = footprint(shape, policy, prompts, longest_output)
    load = Load(
        sequences=limits.sequences,
        prompts=(int(prompts.min()), int(prompts.max())),
        output_tokens=longest_output,
        step_tokens=limits.step_tokens,
        block_bytes=server.block_tokens * held.token,
    )
    times = step_times(shape, server.gpu, server.weights, policy, load)

    def run(end: End) -> Record:
        memory = Memory(
            held,
            server.block_tokens,
            int(server.cache.value) // load.block_bytes,
            server.host_bytes // load.block_bytes,
        )
        scheduler = Scheduler(memory, times[end], limits)
        return Engine(requests, scheduler, shape.max_context).run()

    name = policy.name if policy else "full cache"
    return served(name, {end: run(end) for end in ends}, goals, times["value"].tier)


def _possible(requests: Requests, longest: int) -> NDArray[np.int64]:
    """Prompts that the model takes at all; the others are refused when they arrive."""
    fitting = requests.prompt_tokens[requests.prompt_tokens < longest]
    if not len(fitting):
        raise KvtuneError(
            f"no prompt is shorter than the {longest} tokens that the model takes",
            hint="shorten them with --prompt, or in the file of --arrivals.",
        )
    return fitting
