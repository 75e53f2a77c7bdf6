"""The device memory of a decode loop, from what a measured profile says of everything else."""

from __future__ import annotations

from kvtune.common.estimate import Estimate
from kvtune.common.units import MIB
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.measured import MeasuredProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.weights import WeightFormat, weight_bytes

_LOGITS_ROW_BYTES = 2  # bf16 logits of one sequence and one word
_SEGMENT_BYTES = 2 * MIB  # the allocator rounds what it asks the device for up to these


def decode_peak_bytes(
    shape: ModelShape,
    gpu: GpuProfile,
    measured: MeasuredProfile,
    batch: int,
    context_tokens: int,
    weight_format: WeightFormat = "bf16",
) -> Estimate:
    """Memory of the device while a full bf16 cache is decoded from, prefill excluded, in bytes.

    Args:
        shape: the model.
        gpu: gives the context where it was not measured.
        measured: profile of the card.
        batch: sequences.
        context_tokens: of each.
        weight_format: of the matrices.
    """
    cache = batch * shape.kv_bytes(context_tokens)
    tensors = 2 * shape.layers  # keys and values of each layer are segments of their own
    rounded = tensors * -(-(cache // tensors) // _SEGMENT_BYTES) * _SEGMENT_BYTES
    weights = weight_bytes(shape, weight_format)
    fixed = sum(measured.bytes_of(name) or 0 for name in ("libraries", "workspace"))
    fixed += measured.bytes_of("context") or gpu.context_bytes
    activations = _LOGITS_ROW_BYTES * batch * shape.vocab_size
    value = weights.value + rounded + fixed + activations
    margin = max(75 * MIB, 0.005 * value)
    return Estimate(value, value - margin, value + margin, "B", "fitted")
