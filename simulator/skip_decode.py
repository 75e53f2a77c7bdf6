"""What SkipDecode's schedule costs: bytes of the cache, and a step through fewer layers.

Costs alone: what leaving out layers does to answers is not predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.skip_decode import SkipDecode
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.steps import decode_step
from kvtune.simulator.memory.weights import WeightFormat


@dataclass(frozen=True)
class SkipCost:
    """A schedule beside the model that runs all of its layers.

    Args:
        cache_bytes: of one sequence's bf16 cache at the end.
        full_cache_bytes: the same of all layers.
        step: of the last token's decode step of the batch, seconds.
        full_step: the same through all layers.
        mean_layers: that a generated token runs.
    """

    cache_bytes: int
    full_cache_bytes: int
    step: Estimate
    full_step: Estimate
    mean_layers: float


def skip_cost(
    schedule: SkipDecode,
    shape: ModelShape,
    gpu: GpuProfile,
    prompt_tokens: int,
    generated: int,
    *,
    batch: int = 1,
    weights: WeightFormat = "bf16",
) -> SkipCost:
    """What the schedule takes when so many tokens have been generated.

    Raises:
        KvtuneError: a schedule of another number of layers, layers that are not all alike, or
            nothing generated.
    """
    tokens = prompt_tokens + generated
    if schedule.layers != shape.layers:
        raise KvtuneError(f"{shape.name} has {shape.layers} layers, the schedule {schedule.layers}")
    if not shape.keeps_all(tokens):
        raise KvtuneError(f"{shape.name} has layers that do not cache every token")
    if generated < 1:
        raise KvtuneError("a schedule of layers begins with the first generated token")
    layer = shape.kv_bytes(tokens) // (shape.layers * tokens)
    layers = schedule.count(generated - 1)
    short = replace(shape, layers=layers, windows=shape.windows[:layers])
    read = layers * layer * tokens

    def step(of: ModelShape, size: int) -> Estimate:
        return decode_step(of, gpu, weights, batch, size, "runtime")

    return SkipCost(
        cache_bytes=layer * schedule.cached_tokens(prompt_tokens, generated),
        full_cache_bytes=shape.kv_bytes(tokens),
        step=step(short, read),
        full_step=step(shape, shape.kv_bytes(tokens)),
        mean_layers=sum(map(schedule.count, range(generated))) / generated,
    )
