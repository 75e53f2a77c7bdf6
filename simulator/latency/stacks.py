"""A model by the kernels of a serving stack: whose tables, and what they do not hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Tier
from kvtune.profiles.elsewhere import SYSTEM_OF_CARD, Stack, require_systems_folder
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.stack_kernels.tables import ServingTables
from kvtune.simulator.latency.front_end import FrontEnd
from kvtune.simulator.latency.serving_kernels import ServingModel
from kvtune.simulator.latency.stack_overheads import Overheads
from kvtune.simulator.memory.weights import WeightFormat

# Half of the 80 % interval as a factor: of whole serving runs with their model and system left out,
# a token and a first token; the same of models with latent attention, whose runs nothing was fitted
# on; and of decode attention of systems whose chip was left out whole.
STEP_FACTOR, _LATENT_STEP_FACTOR = 1.21, 1.37
_FIRST_TOKEN_FACTOR, _LATENT_FIRST_TOKEN_FACTOR = 1.55, 3.03
TRANSFER_FACTOR = 1.45

# Fitted on the whole serving runs of aiconfigurator-core 0.12.0 (benchmarks/hardware_runs.py;
# benchmarks/results/hardware-runs.json, "parameters").
OVERHEADS: dict[Stack, Overheads] = {
    "vllm": Overheads(2.5e-6, 0.14e-3, 6.5e-6, 1.01, 1.15, 0.54e-3),
    "sglang": Overheads(1.8e-6, 0.34e-3, 18.0e-6, 1.03, 1.03, 0.4e-3),
    "trtllm": Overheads(1.1e-6, 0.3e-3, 12.0e-6, 0.953, 1.06, 0.37e-3),
}
_FRONT_ENDS: dict[Stack, FrontEnd] = {
    "vllm": FrontEnd(14.0e-3, 4.6e-6, 1.2, 0.21e-3),
    "sglang": FrontEnd(20.0e-3, 3.0e-6, 1.0, 0.073e-3),
    "trtllm": FrontEnd(23.0e-3, 2.5e-6, 1.4, 0.12e-3),
}


def front_end(stack: Stack, shape: ModelShape) -> FrontEnd:
    """What a first token takes beside the engine's steps, with its interval."""
    latent = shape.latent is not None
    within = _LATENT_FIRST_TOKEN_FACTOR if latent else _FIRST_TOKEN_FACTOR
    return replace(_FRONT_ENDS[stack], within=within)


KvFormat = Literal["bfloat16", "fp8"]
KV_BYTES: dict[KvFormat, int] = {"bfloat16": 2, "fp8": 1}
"""Bytes of a cached number, by the tables' name of its format."""


@dataclass(frozen=True)
class StackSetting:
    """How a stack serves a model.

    Args:
        stack: whose kernels.
        weights: format of the matrices.
        gpus: that share each layer.
        kv_format: of the cache.
        expert_parallel: groups of GPUs that have routed experts of their own.
    """

    stack: Stack
    weights: WeightFormat
    gpus: int = 1
    kv_format: KvFormat = "bfloat16"
    expert_parallel: int = 1


def stack_model(
    shape: ModelShape, gpu: GpuProfile, setting: StackSetting
) -> tuple[ServingModel, GpuProfile]:
    """A model over its whole cache, and the measured card that its times are of.

    Args:
        shape: the whole model.
        gpu: the card; the most alike of those that were measured stands in for it.
        setting: how it is served.

    Raises:
        KvtuneError: the tables have no such card, format or kind of attention.
    """
    card = nearest_measured(gpu)
    tables = ServingTables(require_systems_folder(), SYSTEM_OF_CARD[card.slug], setting.stack)
    matrices, experts = table_formats(tables, shape, setting.weights)
    model = ServingModel(
        tables, shape, setting.gpus, matrices, experts, setting.kv_format,
        card.bandwidth_bytes_per_s, OVERHEADS[setting.stack], setting.expert_parallel,
    )  # fmt: skip
    return model, card


def on_card(model: ServingModel, card: GpuProfile, gpu: GpuProfile) -> ServingModel:
    """A model on a card that was not measured: by the ratios of bandwidths and of bf16 rates."""
    over = model.overheads
    scaled = replace(
        over,
        kernels=over.kernels * card.bandwidth_bytes_per_s / gpu.bandwidth_bytes_per_s,
        reading=over.reading * card.bf16_flop_per_s / gpu.bf16_flop_per_s,
    )
    return replace(model, overheads=scaled)


def interval_of(card: GpuProfile, gpu: GpuProfile, shape: ModelShape) -> tuple[float, Tier]:
    """Half of the 80 % interval as a factor, and the tier: the card's own times or transferred."""
    factor = STEP_FACTOR if shape.latent is None else _LATENT_STEP_FACTOR
    if card == gpu:
        return factor, "measured elsewhere"
    return float(np.exp(np.hypot(np.log(factor), np.log(TRANSFER_FACTOR)))), "transferred"


def nearest_measured(gpu: GpuProfile) -> GpuProfile:
    """The card itself where the tables have it, else the most alike: architecture, then rates.

    Raises:
        KvtuneError: another vendor's card than any that was measured.
    """
    cards = [find_gpu(slug) for slug in SYSTEM_OF_CARD]
    alike = [card for card in cards if card.vendor == gpu.vendor]
    if not alike:
        raise KvtuneError(
            f"no serving stack's kernels were measured on cards of {gpu.vendor}",
            hint="leave --stack out: kvtune's own model answers from the datasheet.",
        )
    return min(alike, key=lambda card: unlike(card, gpu))


def unlike(card: GpuProfile, gpu: GpuProfile) -> float:
    """How different two cards are."""
    if card.slug == gpu.slug:
        return -1.0
    rates = np.log(
        [
            card.bandwidth_bytes_per_s / gpu.bandwidth_bytes_per_s,
            card.bf16_flop_per_s / gpu.bf16_flop_per_s,
        ]
    )
    other = (card.architecture != gpu.architecture) + (card.memory_kind != gpu.memory_kind)
    return float(np.sum(np.abs(rates)) + 2 * other)


_MATRICES = {
    "bf16": ("bfloat16",), "fp8": ("fp8", "fp8_block"), "int4": ("int4_wo",),
    "nvfp4": ("nvfp4",), "mxfp4": ("bfloat16",),
}  # fmt: skip
_EXPERTS = {**_MATRICES, "mxfp4": ("w4a8_mxfp4_mxfp8", "w4a16_mxfp4")}
_ALIKE = {"awq": "int4", "gptq": "int4"}


def table_formats(
    tables: ServingTables, shape: ModelShape, weights: WeightFormat
) -> tuple[str, str]:
    """The tables' names of the format of matrices and of routed experts, the first measured.

    Raises:
        KvtuneError: none of them was.
    """
    name = _stored_as(shape) if weights == "stored" else _ALIKE.get(weights, weights)
    measured = tables.matrix_formats()
    matrices = [each for each in _MATRICES.get(name, ()) if each in measured]
    if not matrices:
        raise KvtuneError(
            f"{tables.stack} on {tables.system} has no measured matrices in {name}",
            hint=f"measured: {', '.join(sorted(measured)) or 'none'}; --weights chooses one.",
        )
    if shape.experts is None:
        return matrices[0], matrices[0]
    found = [each for each in _EXPERTS[name] if tables.has_experts(each)]
    return matrices[0], (found or matrices)[0]


def _stored_as(shape: ModelShape) -> str:
    """The format whose kernels run a checkpoint that is already quantised."""
    name = shape.stored.name.lower() if shape.stored else ""
    for part, alike in (
        ("nvfp4", "nvfp4"), ("float4", "nvfp4"), ("mxfp4", "mxfp4"), ("fp8", "fp8"),
        ("float8", "fp8"), ("int4", "int4"),
    ):  # fmt: skip
        if part in name:
            return alike
    return name or "a format that is not known"
