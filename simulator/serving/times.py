"""What requests meet under a policy: the latency model on the grids that an engine reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Tier
from kvtune.policies.policy import Policy
from kvtune.policies.servable import LEFT_TO_ANSWERS
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import TIERS, Times, least_certain
from kvtune.simulator.latency.compression import compression
from kvtune.simulator.latency.copies import transfer
from kvtune.simulator.latency.stacks import (
    KV_BYTES,
    StackSetting,
    front_end,
    interval_of,
    on_card,
    stack_model,
)
from kvtune.simulator.latency.steps import decode_steps, prefill, prefills
from kvtune.simulator.latency.sums import sums_over_gpus
from kvtune.simulator.memory.policy_bytes import bytes_read_by_format
from kvtune.simulator.memory.weights import WeightFormat
from kvtune.simulator.serving.beside_kernels import beside_kernels, plus
from kvtune.simulator.serving.footprint import footprint, whole_footprint
from kvtune.simulator.serving.requests import Requests, possible_prompts
from kvtune.simulator.serving.server import Prepared, Server, check_planned
from kvtune.simulator.serving.stack_times import PlannedTimes, StackGrids, StackTimes
from kvtune.simulator.serving.step_times import Curve, End, EngineTimes, StepTimes

PROMPTS, GENERATED, PASSES, COMPRESSIONS = 17, 9, 1025, 33  # points of the grids


@dataclass(frozen=True)
class Load:
    """What the grids must cover.

    Args:
        sequences: the most at once.
        prompts: shortest and longest prompt, tokens.
        output_tokens: of the longest answer.
        step_tokens: the most new tokens of a step.
        block_bytes: of one block of cache.
    """

    sequences: int
    prompts: tuple[int, int]
    output_tokens: int
    step_tokens: int
    block_bytes: int


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
    prompts = possible_prompts(requests, shape.max_context)
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
    name = policy.name if policy else "full cache"
    return Prepared(name, server, held, times, tiers=times["value"].tiers)


def _of_stack(
    server: Server, setting: StackSetting, load: Load, prompts: NDArray[np.int64],
    policy: Policy | None,
) -> Prepared:  # fmt: skip
    """A stack's own cache, or a policy that kvtune's plugin runs in it."""
    if policy is not None:
        check_planned(server, setting, policy)
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
        ends = _ends(times, factor)
        return Prepared("full cache", server, held, ends, front, tiers={"all steps": tier})
    own = step_times(server.local, server.gpu, server.weights, policy, load)["value"]
    limits = server.limits
    left = LEFT_TO_ANSWERS if limits.left_to_answers is None else limits.left_to_answers
    of_parts = own.tiers | {"matrices and reading": tier}
    del of_parts["reading prompts"]  # of kvtune's own passes, which the stack does not take
    times = PlannedTimes(scaled, grids, least_certain(*of_parts.values()), own)
    return Prepared(
        policy.name, server, footprint(server.local, policy, prompts, load.output_tokens),
        _ends(times, factor), front, replace(limits, reading="whole", left_to_answers=left),
        of_parts,
    )  # fmt: skip


def _ends(times: StackTimes, factor: float) -> dict[End, EngineTimes]:
    return {"value": times, "low": times.scaled(1 / factor), "high": times.scaled(factor)}


def step_times(
    shape: ModelShape,
    gpu: GpuProfile,
    weights: WeightFormat,
    policy: Policy | None,
    load: Load,
    sums: Callable[[npt.ArrayLike], Times] | None = None,
) -> dict[End, StepTimes]:
    """The likely times and both ends of their intervals.

    Args:
        shape: the model, or one card's share of it.
        gpu: the card.
        weights: format of the matrices.
        policy: for the shape; None for the uncompressed cache.
        load: what may occur.
        sums: over the cards that share each layer, of a pass over so many tokens; None for one
            card.
    """
    prompts = np.linspace(*load.prompts, PROMPTS if load.prompts[1] > load.prompts[0] else 1)
    generated = np.linspace(0, load.output_tokens, GENERATED)
    longest = max(load.prompts[1] + load.output_tokens, load.step_tokens + load.sequences)
    tokens = np.linspace(1, max(longest, 2), PASSES)
    batch = np.arange(1, load.sequences + 1)
    decode = _decoding(shape, gpu, weights, policy, batch, prompts, generated)
    empty = decode_steps(shape, gpu, weights, batch, 0.0, "runtime")
    passes = prefills(shape, gpu, weights, tokens, execution="runtime")
    if sums is not None:
        decode = plus(decode, sums(batch[:, None, None]))
        empty, passes = plus(empty, sums(batch)), plus(passes, sums(tokens))
    squeezed = _compressing(shape, gpu, weights, policy, load.prompts)
    copy = transfer(gpu, load.block_bytes * np.array([0.0, 1024.0]), "device_to_host")
    parts = (decode, empty, passes, squeezed, copy)
    tiers: dict[str, Tier] = {
        "decode steps": least_certain(decode.tier, empty.tier),
        "reading prompts": passes.tier,
        **({"compressing": squeezed.tier} if policy else {}),
    }

    def at_end(end: End) -> StepTimes:
        table, nothing, whole, after, copied = (getattr(part, f"{end}_s") for part in parts)
        return StepTimes(
            prompts=Curve(*load.prompts, prompts),
            generated=Curve(0, load.output_tokens, generated),
            decode=[table[0].tolist(), *table.tolist()],
            empty=[0.0, *nothing.tolist()],
            whole_pass=Curve(1, tokens[-1], whole),
            compute=Curve(0, tokens[-1], _compute_bound(tokens, whole)),
            compressing=Curve(*load.prompts, after),
            copy_s=(float(copied[0]), float(copied[1] - copied[0]) / 1024),
            tier=least_certain(*tiers.values()),
            tiers=tiers,
        )

    return {end: at_end(end) for end in ("value", "low", "high")}


def _decoding(
    shape: ModelShape,
    gpu: GpuProfile,
    weights: WeightFormat,
    policy: Policy | None,
    batch: NDArray[np.int64],
    prompts: NDArray[np.float64],
    generated: NDArray[np.float64],
) -> Times:
    """Decode steps with all that a policy adds to them, ``[sequences, prompts, generated]``."""
    sequences = batch[:, None, None]
    grown = np.array(
        [[shape.kv_bytes(int(p + g)) - shape.kv_bytes(int(p)) for g in generated] for p in prompts]
    )
    read: list[dict[str, float]] = [
        {"bf16": shape.kv_bytes(int(p))}
        if policy is None
        else dict(bytes_read_by_format(policy, shape, int(p)))
        for p in prompts
    ]
    by_format = {
        name: np.array([each.get(name, 0.0) for each in read])[:, None] + grown * (name == "bf16")
        for name in dict.fromkeys(["bf16", *(name for each in read for name in each)])
    }
    steps = decode_steps(shape, gpu, weights, sequences, by_format, "runtime")
    return steps if policy is None else beside_kernels(steps, shape, gpu, policy, prompts)


def _compressing(
    shape: ModelShape,
    gpu: GpuProfile,
    weights: WeightFormat,
    policy: Policy | None,
    prompts: tuple[int, int],
) -> Times:
    """Compressing a prompt, at evenly spaced lengths."""
    if policy is None:
        nothing = np.zeros(2)
        return Times(nothing, nothing, nothing, TIERS[0])
    lengths = np.linspace(*prompts, COMPRESSIONS).astype(int).tolist()
    found = [
        compression(policy, shape, gpu, length, prefill(shape, gpu, weights, length, 1, "runtime"))
        for length in lengths
    ]
    value, low, high = (
        np.array([getattr(each, end) for each in found]) for end in ("value", "low", "high")
    )
    known = [each.tier for each in found if each.tier in TIERS]
    return Times(value, low, high, max(known, key=TIERS.index, default=TIERS[0]))


def _compute_bound(
    tokens: NDArray[np.float64], seconds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Seconds of passes as if the shortest were as efficient as the best, from 0 tokens on."""
    best = int(np.argmin(seconds / tokens))
    line = tokens * seconds[best] / tokens[best]
    bound = np.where(np.arange(len(tokens)) < best, line, seconds)
    even = np.linspace(0, tokens[-1], len(tokens))
    return np.asarray(np.interp(even, [0, *tokens], [0, *bound]))
