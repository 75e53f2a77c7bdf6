"""How long it takes to compress a prompt: signals, choice, moving and quantising, layer by layer.

Methods declare their work; it is timed as plain kernels would take it, at the datasheet tier, since
runtimes differ in how much of it they fuse: what they move and multiply, or what the host needs to
start so many kernels, whichever is longer. Quantising is read from measured kernels where a card
has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.estimate import Estimate, Tier
from kvtune.policies.method import Method
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.policies.work import LayerShape, Work, work_of_signals
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import Times, within
from kvtune.simulator.latency.transfer import tables_for

Overhead = Literal["score_topk", "compact", "gather_pages", "quantise", "dequantise"]

# Passes over a layer's cache that each op makes as plain kernels, and the share of the bandwidth
# that such kernels get: the datasheet tier. Measured on Hopper they are within a factor of two.
_PASSES: dict[str, float] = {
    "score_topk": 2.0,
    "compact": 0.5,
    "gather_pages": 2.0,
    "quantise": 6.0,
    "dequantise": 4.0,
}
_BANDWIDTH_SHARE = 0.5
_FLOOR_S = 20e-6
_OVERHEAD_FACTOR = 2.0


@dataclass(frozen=True)
class Rates:
    """What kernels that nobody tuned get of a card, and what the host takes to start them.

    Args:
        bandwidth: share of the card's memory bandwidth.
        compute: share of its bf16 rate, by products.
        softmax: share of its bf16 rate, by products that go through an exponential one by one.
        launch_s: that the host takes to have torch start one kernel.
    """

    bandwidth: float
    compute: float
    softmax: float
    launch_s: float


RATES = Rates(bandwidth=0.16, compute=0.028, softmax=0.148, launch_s=1.4e-5)
"""Fitted by ``benchmarks/compressing_fit.py`` on what ten methods took of SmolLM2's shape, whose
rows wait for the host more than for the card, and of eight layers of Llama-3.1-8B's on an H200
(``benchmarks/compressing.py``), and on two prefills under plans: 82 ms a prompt of an 8B shape,
half of whose layers needed column sums, and 20 ms of SmolLM2-135M, all of whose layers did."""
_STORE_LAUNCHES = 15
"""Kernels of a layer that put what is kept into pages."""
_FACTOR = 2.5  # within it are most methods that were left out of the fit of these rates


def compression(
    policy: Policy,
    shape: ModelShape,
    gpu: GpuProfile,
    prompt_tokens: int,
    prefill: Estimate,
    batch: int = 1,
    rates: Rates = RATES,
) -> Estimate:
    """Seconds beside the prefill until the caches of all prompts are compressed.

    Args:
        policy: for the shape.
        shape: the model.
        gpu: the card.
        prompt_tokens: P of each.
        prefill: of all prompts; methods that read them again pay it again.
        batch: prompts.
        rates: of kernels and the host.
    """
    layer = LayerShape(prompt_tokens, shape.query_heads, shape.kv_heads, shape.head_dim)
    alike = Counter(frozenset(options) for options in policy.heads)
    in_order = {frozenset(options): tuple(dict.fromkeys(options)) for options in policy.heads}
    asked = policy.allocator.needs
    works = [(_work(in_order[kinds], layer, asked), count) for kinds, count in alike.items()]
    chosen = batch * sum(count * _seconds(work, gpu, rates) for work, count in works)
    again = max((work.passes for work, _ in works), default=0.0)
    low, value, high, tier = _quantising(policy, shape, gpu, prompt_tokens)
    return Estimate(
        chosen + batch * value + again * prefill.value,
        chosen / _FACTOR + batch * low + again * prefill.low,
        chosen * _FACTOR + batch * high + again * prefill.high,
        "s",
        "datasheet" if chosen else tier,
    )


def _work(options: Sequence[Option], layer: LayerShape, asked: Needs) -> Work:
    """One layer's: signals once for all that read them, the choice once a method.

    ``asked`` is what the allocator reads itself.
    """
    evicting: dict[Method, int] = {}  # the most that a head of each method keeps
    for option in options:
        budget = option.budget.resolve(layer.prompt_tokens)
        if budget < layer.prompt_tokens:
            evicting[option.method] = max(budget, evicting.get(option.method, 0))
    if not evicting:
        return Work()
    needs = reduce(or_, (method.needs for method in evicting), asked)
    total = work_of_signals(needs, layer)
    for method, budget in evicting.items():
        total += method.work(layer, budget) - work_of_signals(method.needs, layer)
    return total


def _seconds(work: Work, gpu: GpuProfile, rates: Rates) -> float:
    """Of one layer of one prompt; the host's share is per prompt, also of prompts read together."""
    if not work.launches:
        return 0.0
    read = work.moved_bytes / (rates.bandwidth * gpu.bandwidth_bytes_per_s)
    products = max(read, work.flops / (rates.compute * gpu.bf16_flop_per_s))
    device = products + work.softmax_flops / (rates.softmax * gpu.bf16_flop_per_s)
    return max(device, rates.launch_s * (work.launches + _STORE_LAUNCHES))


def _quantising(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, prompt_tokens: int
) -> tuple[float, float, float, Tier]:
    """Seconds, low to high, that writing narrow codes takes; by the tokens kept in them."""
    kept = zip(policy.options(), policy.budgets(prompt_tokens).flat, strict=True)
    narrow = sum(int(n) for option, n in kept if {"bf16"} != {option.keys.name, option.values.name})
    if not narrow:
        return 0.0, 0.0, 0.0, "exact"
    tokens = narrow / (policy.layers * policy.kv_heads)
    times = policy_overhead(shape, gpu, "quantise", tokens, "int4").at()
    return times.low, times.value, times.high, times.tier


def policy_overhead(
    shape: ModelShape,
    gpu: GpuProfile,
    kind: Overhead,
    tokens: npt.ArrayLike,
    number_format: str = "bf16",
) -> Times:
    """Seconds that one overhead takes over all layers of one sequence.

    Args:
        shape: the model.
        gpu: the card.
        kind: what is done to each layer's cache.
        tokens: that the layer holds before it is done.
        number_format: what is quantised to or from: ``fp8``, ``int8``, ``int4``.

    Raises:
        KvtuneError: no such overhead; nothing is known of the format on a measured card.
    """
    if kind not in _PASSES:
        raise KvtuneError(f"{kind!r} is no overhead. {nearest(kind, _PASSES)}")
    held = np.asarray(tokens, dtype=np.float64)
    layer = 2.0 * shape.elements_per_token_layer * held
    tables = tables_for(gpu)
    if tables is None or not tables.kernels.has(kind):
        seconds = _FLOOR_S + _PASSES[kind] * layer / (_BANDWIDTH_SHARE * gpu.bandwidth_bytes_per_s)
        return within(shape.layers * seconds, _OVERHEAD_FACTOR)
    heads = tables.kernels.heads()
    same = shape.elements_per_token_layer / (2.0 * heads[1] * heads[2])
    both = 1 if kind == "score_topk" else 2  # keys are scored; keys and values are moved
    one = tables.kernels.by_length(kind, number_format, held * same)
    return tables.times(shape.layers * both * one)
