"""Weight formats: what a parameter costs in each, and which parameters stay at 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kvtune.common.errors import KvtuneError, check_alone, nearest
from kvtune.common.estimate import Estimate, Tier, exact
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.parameter_counts import StoredWeights
from kvtune.profiles.shape import ModelShape

KernelFormat = Literal["bf16", "fp8", "int8", "int4"]
WeightFormat = Literal[
    "bf16", "fp8", "int8", "int4",
    "stored",  # as the checkpoint holds them, where it is already quantised
    "awq", "gptq", "mxfp4", "nvfp4", "nf4", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m",
]  # fmt: skip
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)


@dataclass(frozen=True)
class _Storage:
    """How a matrix is stored: payload bits, then what a group of weights shares.

    Args:
        bits: payload bits a weight.
        group_bits: scale and zero point of one group, bits.
        group: weights a group; None for one group an output channel.
        kernel: the format whose kernels' speed is taken for it.
        everything: whether embedding and output matrix are stored so too, as in GGUF files.
        experts_only: whether a mixture's attention stays at 16 bits, as in gpt-oss.
    """

    bits: float
    group_bits: int = 0
    group: int | None = None
    kernel: KernelFormat = "int4"
    everything: bool = False
    experts_only: bool = False


# Only the matrices of attention, feed-forward and experts are quantised. Embedding, output matrix,
# norms, biases, routers and vision towers stay at 16 bits, as in the GPTQ, AWQ and fp8
# checkpoints that vLLM and SGLang load. The mixed GGUF types: bits a weight over a whole model
# (llama.cpp, tools/quantize/README.md, Llama 3.1 8B).
_STORAGE: dict[str, _Storage] = {
    "bf16": _Storage(16, kernel="bf16"),
    "fp8": _Storage(8, group_bits=32, kernel="fp8"),  # one fp32 scale an output channel
    "int8": _Storage(8, group_bits=16, kernel="int8"),  # one fp16 scale an output channel
    "int4": _Storage(4, group_bits=32, group=128),  # fp16 scale and zero point a group: 4.25 bits
    "awq": _Storage(4, group_bits=20, group=128),  # fp16 scale, 4-bit zero point
    "gptq": _Storage(4, group_bits=20, group=128),
    "mxfp4": _Storage(4, group_bits=8, group=32, experts_only=True),
    "nvfp4": _Storage(4, group_bits=8, group=16),
    "nf4": _Storage(4, group_bits=32, group=64),
    "q8_0": _Storage(8, group_bits=16, group=32, kernel="int8", everything=True),
    "q6_k": _Storage(6.5625, kernel="int8", everything=True),
    "q5_k_m": _Storage(5.70, everything=True),
    "q4_k_m": _Storage(4.89, everything=True),
    "q4_0": _Storage(4.66, everything=True),
    "q3_k_m": _Storage(4.00, everything=True),
}


def check_format(name: str) -> WeightFormat:
    """``name`` if it is a weight format.

    Raises:
        KvtuneError: it is not.
    """
    for known in WEIGHT_FORMATS:
        if name.lower() == known:
            return known
    raise KvtuneError(f"{name!r} is no weight format. {nearest(name, WEIGHT_FORMATS)}")


def listed_formats(asked: str, shape: ModelShape, gpu: GpuProfile) -> tuple[str, ...]:
    """The formats that ``bf16,int4``, ``any`` or ``auto`` names, largest weights first.

    ``any`` is 16 bits, the 8-bit format that the card computes in, and int4; of a checkpoint that
    is already quantised its own. ``auto`` stays one word: which it is depends on the memory.

    Raises:
        KvtuneError: one is unknown, something empty is listed, or a word for several is not alone.
    """
    check_alone(asked, "--weights", ("any", "auto"))
    words = [word.strip().lower() for word in asked.split(",")]
    if words == ["any"]:
        wide, *narrower = formats_by_width(shape, gpu)
        return (wide, *narrower[:1], *narrower[2:])
    if words == ["auto"]:
        return ("auto",)
    formats = {check_format(word) for word in words}
    return tuple(sorted(formats, key=lambda each: (-weight_bytes(shape, each).value, each)))


def bits_per_weight(shape: ModelShape, weight_format: WeightFormat) -> float:
    """Bits of one quantised weight with its share of scales and zero points."""
    if weight_format == "stored":
        return _stored(shape).bits
    storage = _STORAGE[weight_format]
    return storage.bits + storage.group_bits / (storage.group or shape.hidden_size)


def kernel_format(shape: ModelShape, weight_format: WeightFormat) -> KernelFormat:
    """The format whose kernels' speed is taken; of a stored one the nearest that is no narrower."""
    if weight_format != "stored":
        return _STORAGE[weight_format].kernel
    stored = _stored(shape)
    if stored.bits > 9:
        return "bf16"
    if stored.bits > 6:
        return "fp8" if "fp8" in stored.name or "float" in stored.name else "int8"
    return "int4"


def _stored(shape: ModelShape) -> StoredWeights:
    if shape.stored is None:
        raise KvtuneError(
            f"the weights of {shape.name} are not stored quantised",
            hint="--weights bf16, fp8, int8 or int4.",
        )
    return shape.stored


def format_name(shape: ModelShape, weight_format: WeightFormat) -> str:
    """What people call the format: of stored weights the checkpoint's own."""
    return _stored(shape).name if weight_format == "stored" else weight_format


def matrix_bytes(shape: ModelShape, weight_format: WeightFormat, parameters: float) -> float:
    """Bytes of so many parameters of the matrices that the format quantises."""
    return parameters * bits_per_weight(shape, weight_format) / 8


def weight_bytes(shape: ModelShape, weight_format: WeightFormat) -> Estimate:
    """Bytes of all weights: exact for bf16 and for files that were read.

    Packing and padding differ a little for the others.
    """
    if weight_format == "stored":
        stored = _stored(shape)
        tier: Tier = "exact" if stored.low == stored.high else "assumed"
        return Estimate(stored.bytes, stored.low, stored.high, "B", tier)
    counts = shape.parameter_counts()
    quantised, wide = counts.matrices, counts.sixteen_bit
    if _STORAGE[weight_format].everything:
        quantised, wide = counts.matrices + counts.embedding + counts.head, counts.small
        wide += counts.other
    if _STORAGE[weight_format].experts_only and counts.experts:
        quantised = counts.experts
        wide += counts.attention + counts.feed_forward
    size = 2 * wide + matrix_bytes(shape, weight_format, quantised)
    if weight_format == "bf16" and not counts.unknown:
        return exact(int(size), "B")
    spread = 0.0 if weight_format == "bf16" else 1.0
    low, high = (1 - 0.02 * spread) * size, (1 + 0.03 * spread) * size + 2 * counts.unknown
    return Estimate(size, low, high, "B", "assumed")


def formats_by_width(shape: ModelShape, gpu: GpuProfile) -> tuple[WeightFormat, ...]:
    """Formats to try, widest first: of the two 8-bit ones the one that the card computes in.

    A checkpoint that is already quantised is loaded as it is.
    """
    if shape.stored is not None:
        return ("stored",)
    eight: tuple[WeightFormat, ...] = ("fp8", "int8") if gpu.fp8 else ("int8", "fp8")
    return ("bf16", *eight, "int4")
