"""Steps and prefills of a model on one or several GPUs, by the kernels of a serving stack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, Tier
from kvtune.profiles.elsewhere import SYSTEM_OF_CARD, Stack, require_systems_folder
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import split_over
from kvtune.simulator import latency_priors as priors
from kvtune.simulator.cost import Cost, full_cost, per_second
from kvtune.simulator.elsewhere import ServingTables
from kvtune.simulator.memory import MemoryBudget
from kvtune.simulator.serving_kernels import Overheads, ServingModel

StackChoice = Literal["kvtune", "vllm", "sglang", "trtllm"]

# Fitted on the whole serving runs of aiconfigurator-core 0.12.0 by
# benchmarks/hardware_tables.py --fit; the figures are in benchmarks/results/hardware-tables.json.
OVERHEADS: dict[Stack, Overheads] = {
    "vllm": Overheads(layer_s=8.6e-6, step_s=0.35e-3, sequence_s=3.4e-6),
    "sglang": Overheads(layer_s=5.7e-6, step_s=0.98e-3, sequence_s=23.6e-6),
    "trtllm": Overheads(layer_s=2.0e-6, step_s=0.36e-3, sequence_s=5.1e-6),
}
# Ends of the 80 % interval over the value: of those runs with their model and system left out, and
# more for a card whose system was left out whole.
STEP_INTERVAL: dict[Stack, tuple[float, float]] = {
    "vllm": (0.78, 1.20), "sglang": (0.65, 1.60), "trtllm": (0.76, 1.15),
}  # fmt: skip
TRANSFER_INTERVAL = (0.77, 1.30)

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

    def cost(self, budget: MemoryBudget, generated: int) -> Cost:
        """The uncompressed bf16 cache on one of the GPUs, with the time of all of them.

        Args:
            budget: of one GPU's share.
            generated: tokens that each sequence generates.
        """
        plain = full_cost(self.local, self.gpu, budget, generated)
        tokens, batch = budget.context_tokens, budget.batch
        if self.stack == "kvtune":
            step = self._summed(plain.latency, batch)
            first = self._summed(plain.prefill, tokens)
        else:
            step, first = self._served(self.stack, budget, tokens + generated)
        rate = per_second(step, batch)
        return replace(plain, latency=step, prefill=first, tokens_per_second=rate)

    def _summed(self, alone: Estimate, rows: int) -> Estimate:
        """With two sums over the GPUs a layer."""
        if self.gpus == 1:
            return alone
        moved = 2 * (self.gpus - 1) / self.gpus * 2 * rows * self.shape.hidden_size
        value, low, high = (
            getattr(alone, end)
            + 2
            * self.shape.layers
            * (getattr(priors.SUM_FLOOR_S, end)
               + moved / (self._link * getattr(priors.LINK_SHARE, other)))
            for end, other in (("value", "value"), ("low", "high"), ("high", "low"))
        )  # fmt: skip
        return Estimate(value, low, high, "s", "datasheet")

    @property
    def _link(self) -> float:
        kind = (self.gpu.architecture, self.gpu.memory_kind)
        return priors.LINK_BYTES_PER_S.get(kind, self.gpu.pcie_bytes_per_s)

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
            ends = STEP_INTERVAL[stack]
            return (
                _within(step, ends, "measured elsewhere"),
                _within(first, ends, "measured elsewhere"),
            )
        slower = card.bandwidth_bytes_per_s / self.gpu.bandwidth_bytes_per_s
        computing = card.bf16_flop_per_s / self.gpu.bf16_flop_per_s
        shortest = float(model.decode(1, 1))
        weights = min(shortest, _weights_s(self.local, card, budget.weight_format))
        step = step + (slower - 1) * (step - shortest + weights)
        low, high = STEP_INTERVAL[stack]
        wider = (low * TRANSFER_INTERVAL[0], high * TRANSFER_INTERVAL[1])
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


def _within(seconds: float, ends: tuple[float, float], tier: Tier) -> Estimate:
    low, high = ends
    return Estimate(seconds, low * seconds, high * seconds, "s", tier)
