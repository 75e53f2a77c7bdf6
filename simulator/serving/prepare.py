"""A server under a policy: what its sequences take, in bytes and in seconds, by whose kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.policies.policy import Policy
from kvtune.policies.servable import LEFT_TO_ANSWERS, check_servable
from kvtune.simulator.latency.stacks import (
    KV_BYTES,
    StackSetting,
    front_end,
    interval_of,
    on_card,
    stack_model,
)
from kvtune.simulator.latency.sums import sums_over_gpus
from kvtune.simulator.serving.footprint import footprint, whole_footprint
from kvtune.simulator.serving.requests import Requests
from kvtune.simulator.serving.server import Prepared, Server
from kvtune.simulator.serving.stack_times import PlannedTimes, StackGrids, StackTimes
from kvtune.simulator.serving.step_times import End, EngineTimes
from kvtune.simulator.serving.times import Load, step_times


def prepare(server: Server, requests: Requests, policy: Policy | None) -> Prepared:
    """What the requests' sequences take under a policy, in bytes and in seconds.

    Args:
        server: model, card and engine.
        requests: that will arrive.
        policy: for the model; None for the uncompressed cache.

    Raises:
        KvtuneError: the policy is for another shape, or cannot be costed on this one, on several
            cards or under this stack.
    """
    if policy is not None and server.gpus > 1:
        raise KvtuneError(
            "a policy can be costed on one GPU only, as yet",
            hint="leave out --gpus, or --policy.",
        )
    shape, limits = server.local, server.limits
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
    if server.setting is not None:
        return _of_stack(server, server.setting, load, prompts, policy)
    sums = partial(sums_over_gpus, server.shape, server.gpu, server.gpus)
    times = step_times(shape, server.gpu, server.weights, policy, load, sums)
    return Prepared(policy.name if policy else "full cache", server, held, times)


def _of_stack(
    server: Server, setting: StackSetting, load: Load, prompts: NDArray[np.int64],
    policy: Policy | None,
) -> Prepared:  # fmt: skip
    """A stack's own cache, or a policy that kvtune's plugin runs in it."""
    if policy is not None:
        _check_planned(server, setting, policy)
    if server.host_bytes:
        raise KvtuneError(
            f"copies to the host are not in {setting.stack}'s tables, and would cost nothing",
            hint="leave out --host-mem (who must leave is then read again), or --stack.",
        )
    model, card = stack_model(server.shape, server.gpu, setting)
    factor, tier = interval_of(card, server.gpu, server.shape)
    longest = load.prompts[1] + load.output_tokens
    grids = StackGrids(model, load.sequences, longest, load.step_tokens)
    scaled, front = on_card(model, card, server.gpu), front_end(setting.stack, server.shape)
    if policy is None:
        times = StackTimes(scaled, grids, tier)
        held = whole_footprint(server.local, prompts, KV_BYTES[setting.kv_format])
        return Prepared("full cache", server, held, _ends(times, factor), front)
    own = step_times(server.local, server.gpu, server.weights, policy, load)["value"]
    limits = server.limits
    left = LEFT_TO_ANSWERS if limits.left_to_answers is None else limits.left_to_answers
    return Prepared(
        policy.name, server, footprint(server.local, policy, prompts, load.output_tokens),
        _ends(PlannedTimes(scaled, grids, own.tier, own), factor), front,
        replace(limits, reading="whole", left_to_answers=left),
    )  # fmt: skip


def _ends(times: StackTimes, factor: float) -> dict[End, EngineTimes]:
    return {"value": times, "low": times.scaled(1 / factor), "high": times.scaled(factor)}


def _check_planned(server: Server, setting: StackSetting, policy: Policy) -> None:
    """Refuse policies under stacks that kvtune has no plugin for, and those that it refuses."""
    if setting.stack != "vllm" or setting.kv_format != "bfloat16":
        raise KvtuneError(
            f"a policy is served by kvtune's plugin in vLLM, not by {setting.stack} over "
            f"{setting.kv_format}",
            hint="--stack vllm without --kv-cache-dtype; or leave out --policy, or --stack.",
        )
    check_servable(policy, server.shape.head_dim)


def _possible(requests: Requests, longest: int) -> NDArray[np.int64]:
    """Prompts that the model takes at all; the others are refused when they arrive."""
    fitting = requests.prompt_tokens[requests.prompt_tokens < longest]
    if not len(fitting):
        raise KvtuneError(
            f"no prompt is shorter than the {longest} tokens that the model takes",
            hint="shorten them with --prompt, or in the file of --arrivals.",
        )
    return fitting
