"""Steps and prefills of a model on one or several GPUs, by the kernels of a serving stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, Tier
from kvtune.profiles.elsewhere import SYSTEM_OF_CARD, Stack, require_systems_folder
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import split_over
from kvtune.simulator.latency.elsewhere import ServingTables
from kvtune.simulator.latency.serving_kernels import Overheads, ServingModel
from kvtune.simulator.latency.sums import sums_over_gpus
from kvtune.simulator.memory.budget import MemoryBudget

StackChoice = Literal["kvtune", "vllm", "sglang", "trtllm"]

# Fitted on the whole serving runs of aiconfigurator-core 0.12.0 (benchmarks/hardware_tables.py;
# benchmarks/results/hardware-tables.json, "parameters" of each stack's "tpot").
OVERHEADS: dict[Stack, Overheads] = {
    "vllm": Overheads(layer_s=14.9e-6, step_s=0.285e-3, sequence_s=4.4e-6),
    "sglang": Overheads(layer_s=7.9e-6, step_s=0.67e-3, sequence_s=24.2e-6),
    "trtllm": Overheads(layer_s=2.0e-6, step_s=0.22e-3, sequence_s=4.5e-6),
}
# Half of the 80 % interval as a factor: of those runs with their model and system left out; and of
# decode attention of systems whose chip was left out whole.
STEP_FACTOR = 1.51
TRANSFER_FACTOR = 1.45

_MATRIX_FORMATS = {"bf16": ("bfloat16",), "fp8": ("fp8", "fp8_block"), "int4": ("int4_wo",)}


@dataclass(frozen=True)
class Deployment:
    """A model on GPUs that share each layer.

    Args:
        shape: the whole model.
        gpu: one of the cards.
        gpus: how many.
        stack: whose kernels; ``kvtune`` for our own or the datasheet's.
    """

    shape: ModelShape
    gpu: GpuProfile
    gpus: int = 1
    stack: StackChoice = "kvtune"

    @property
    def local(self) -> ModelShape:
        """One GPU's share."""
        return split_over(self.shape, self.gpus)

    def times(
        self,
        step: Estimate,
        prefill: Estimate,
        budget: MemoryBudget,
        generated: int,
        read_tokens: int | None = None,
    ) -> tuple[Estimate, Estimate]:
        """A decode step and a prefill of all GPUs together over the uncompressed bf16 cache.

        Args:
            step: of one GPU's share alone, by kvtune's own model.
            prefill: likewise.
            budget: of one GPU's share.
            generated: tokens that each sequence generates.
            read_tokens: of a prompt that the prefill reads; all of them unless given.
        """
        tokens, batch = budget.context_tokens, budget.batch
        if self.stack == "kvtune":
            return self._summed(step, batch), self._summed(prefill, read_tokens or tokens)
        return self._served(self.stack, budget, tokens + generated)

    def _summed(self, alone: Estimate, rows: int) -> Estimate:
        """With two sums over the GPUs a layer."""
        if self.gpus == 1:
            return alone
        sums = sums_over_gpus(self.shape, self.gpu, self.gpus, rows).at()
        value, low, high = (getattr(alone, e) + getattr(sums, e) for e in ("value", "low", "high"))
        return Estimate(value, low, high, "s", "datasheet")

    def _served(self, stack: Stack, budget: MemoryBudget, held: int) -> tuple[Estimate, Estimate]:
        """A step at the longest cache, and a prefill, from the stack's tables."""
        card = nearest_measured(self.gpu)
        tables = ServingTables(require_systems_folder(), SYSTEM_OF_CARD[card.slug], stack)
        model = ServingModel(
            tables=tables,
            shape=self.shape,
            gpus=self.gpus,
            matrix_format=_format(tables, budget.weight_format),
            expert_format=_format(tables, budget.weight_format),
            kv_format="bfloat16",
            bandwidth_bytes_per_s=card.bandwidth_bytes_per_s,
            overheads=OVERHEADS[stack],
        )
        step = float(model.decode(budget.batch, held))
        first = float(model.prefill(budget.context_tokens))
        if card == self.gpu:
            return (
                _within(step, STEP_FACTOR, "measured elsewhere"),
                _within(first, STEP_FACTOR, "measured elsewhere"),
            )
        slower = card.bandwidth_bytes_per_s / self.gpu.bandwidth_bytes_per_s
        computing = card.bf16_flop_per_s / self.gpu.bf16_flop_per_s
        shortest = float(model.decode(1, 1))
        weights = min(shortest, _weights_s(self.local, card, budget.weight_format))
        step = step + (slower - 1) * (step - shortest + weights)
        wider = float(np.exp(np.hypot(np.log(STEP_FACTOR), np.log(TRANSFER_FACTOR))))
        return (
            _within(step, wider, "transferred"),
            _within(first * computing, wider, "transferred"),
        )


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
    return min(alike, key=lambda card: _unlike(card, gpu))


def _unlike(card: GpuProfile, gpu: GpuProfile) -> float:
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


def _format(tables: ServingTables, weight_format: str) -> str:
    """The tables' name of a weight format, the first that was measured.

    Raises:
        KvtuneError: none of them was.
    """
    measured = tables.matrix_formats()
    for name in _MATRIX_FORMATS.get(weight_format, ()):
        if name in measured:
            return name
    raise KvtuneError(
        f"{tables.stack} on {tables.system} has no measured matrices in {weight_format}",
        hint=f"measured: {', '.join(sorted(measured)) or 'none'}; --weights chooses one.",
    )


def _weights_s(local: ModelShape, card: GpuProfile, weight_format: str) -> float:
    """Reading one GPU's weights once."""
    width = {"bf16": 2.0, "fp8": 1.0, "int4": 0.53}.get(weight_format, 2.0)
    return width * local.active_parameters / (0.8 * card.bandwidth_bytes_per_s)


def _within(seconds: float, factor: float, tier: Tier) -> Estimate:
    return Estimate(seconds, seconds / factor, seconds * factor, "s", tier)
