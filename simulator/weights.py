"""Weight formats: what a parameter costs in each, and which parameters stay at 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.estimate import Estimate, exact
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape

WeightFormat = Literal["bf16", "fp8", "int8", "int4"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)


@dataclass(frozen=True)
class _Storage:
    """How a matrix is stored: payload bits, then what a group of weights shares.

    Args:
        bits: payload bits a weight.
        group_bits: scale and zero point of one group, bits.
        group: weights a group; None for one group an output channel.
    """

    bits: int
    group_bits: int = 0
    group: int | None = None


# Only the matrices of attention, feed-forward and experts are quantised. Embedding, output matrix,
# norms, biases, routers and vision towers stay at 16 bits, as in the GPTQ, AWQ and fp8
# checkpoints that vLLM and SGLang load.
_STORAGE: dict[WeightFormat, _Storage] = {
    "bf16": _Storage(16),
    "fp8": _Storage(8, group_bits=32),  # one fp32 scale an output channel
    "int8": _Storage(8, group_bits=16),  # one fp16 scale an output channel
    "int4": _Storage(4, group_bits=32, group=128),  # fp16 scale and zero point a group: 4.25 bits
}


def check_format(name: str) -> WeightFormat:
    """``name`` if it is a weight format.

    Raises:
        KvtuneError: it is not.
    """
    for known in WEIGHT_FORMATS:
        if name == known:
            return known
    raise KvtuneError(f"{name!r} is no weight format. {nearest(name, WEIGHT_FORMATS)}")


def bits_per_weight(shape: ModelShape, weight_format: WeightFormat) -> float:
    """Bits of one quantised weight with its share of scales and zero points."""
    storage = _STORAGE[weight_format]
    return storage.bits + storage.group_bits / (storage.group or shape.hidden_size)


def matrix_bytes(shape: ModelShape, weight_format: WeightFormat, parameters: float) -> float:
    """Bytes of so many parameters of the matrices that the format quantises."""
    return parameters * bits_per_weight(shape, weight_format) / 8


def weight_bytes(shape: ModelShape, weight_format: WeightFormat) -> Estimate:
    """Bytes of all weights: exact for bf16; packing and padding differ a little for the others."""
    counts = shape.parameter_counts()
    size = 2 * counts.sixteen_bit + matrix_bytes(shape, weight_format, counts.matrices)
    if weight_format == "bf16":
        return exact(int(size), "B")
    return Estimate(size, 0.98 * size, 1.03 * size, "B", "assumed")


def formats_by_width(gpu: GpuProfile) -> tuple[WeightFormat, ...]:
    """Formats to try, widest first: of the two 8-bit ones the one that the card computes in."""
    eight: tuple[WeightFormat, ...] = ("fp8", "int8") if gpu.fp8 else ("int8", "fp8")
    return ("bf16", *eight, "int4")
