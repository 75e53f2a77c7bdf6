"""What vLLM's weights take of a GPU: their bytes as loaded, padded and allocated.

Four things come on top of a checkpoint's bytes. Rotary embeddings are a table of cosines and sines
over all positions. torch's allocator hands out blocks above 10 MiB in steps of 2 MiB and only
splits off what is left where that is more than 1 MiB. Experts in MXFP4 are padded to the tiles of
the kernel that a card has, and their biases kept in float32. On logs of vLLM that print what
loading took, this is within 0.03 GiB (``benchmarks/engine_tokens.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvtune.common.estimate import Estimate
from kvtune.common.units import MIB
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.weights import WeightFormat, bits_per_weight, weight_bytes

_LARGE = 10 * MIB  # from here on torch's allocator asks for blocks in steps of ...
_STEP = 2 * MIB
_SPLIT = MIB  # and gives back what is left of one where it is more than this


@dataclass(frozen=True)
class _Matrix:
    """Matrices of one size, each allocated by itself as vLLM merges them."""

    number: int
    parameters: int
    quantised: bool


def engine_weights(
    shape: ModelShape, local: ModelShape, weight_format: WeightFormat, gpu: GpuProfile
) -> Estimate:
    """Bytes of the weights on one GPU, as "Model loading took" has them.

    Args:
        shape: the whole model.
        local: one GPU's share.
        weight_format: as the engine holds the weights.
        gpu: the card, whose kernels decide the padding.
    """
    stored = weight_bytes(local, weight_format)
    bits = bits_per_weight(local, weight_format)
    slack = sum(
        each.number * _slack(each.parameters * (bits if each.quantised else 16.0) / 8)
        for each in _matrices(local)
    )
    more = _rotary_bytes(shape) + slack + _expert_padding(shape, local, weight_format, gpu)
    return Estimate(
        stored.value + more, stored.low + more, stored.high + more, "B",
        "fitted" if stored.tier == "exact" else stored.tier,
    )  # fmt: skip


def _matrices(local: ModelShape) -> Iterator[_Matrix]:
    """Matrices of attention, feed-forward blocks and experts; those of unknown shapes are left out.

    Queries, keys and values are one matrix, gate and up another.
    """
    hidden, experts = local.hidden_size, local.experts
    attends = sum(layer.elements_per_token > 0 for layer in local.layer_caches)
    if local.latent is None:
        queries = local.query_heads * local.head_dim
        keys = 2 * local.kv_heads * local.head_dim
        yield _Matrix(attends, (queries + keys) * hidden, True)
        yield _Matrix(attends, queries * hidden, True)
    dense = experts.dense_layers if experts else local.layers
    yield _Matrix(dense, 2 * local.intermediate_size * hidden, True)
    yield _Matrix(dense, local.intermediate_size * hidden, True)
    tables = 1 if local.tied_embeddings else 2
    yield _Matrix(tables, local.vocab_size * hidden, False)
    if experts is not None:
        whole = experts.count * experts.intermediate_size * hidden
        yield _Matrix(local.layers - experts.dense_layers, 2 * whole, True)
        yield _Matrix(local.layers - experts.dense_layers, whole, True)


def _slack(size: float) -> float:
    """Bytes that torch's allocator keeps with a tensor beyond its own."""
    left = -size % _STEP
    return left if size >= _LARGE and left <= _SPLIT else 0.0


def _rotary_bytes(shape: ModelShape) -> float:
    """Tables in 16 bits, with a cosine or sine for each number of a head and each position."""
    if shape.rotary_elements is not None:
        return 2.0 * shape.rotary_elements
    width = shape.latent.rope_dim if shape.latent else shape.head_dim
    return 2.0 * shape.max_context * width


def _expert_padding(
    shape: ModelShape, local: ModelShape, weight_format: WeightFormat, gpu: GpuProfile
) -> float:
    """Bytes that experts in MXFP4 take beyond their own, by the kernel that the card has."""
    experts = local.experts
    if experts is None or not _is_mxfp4(shape, weight_format):
        return 0.0
    layers, hidden = shape.layers - experts.dense_layers, shape.hidden_size
    wide, tall, scaled = _padded_sizes(experts.intermediate_size, hidden, gpu)
    numbers = 3 * layers * experts.count
    own = experts.intermediate_size * hidden
    biases = layers * experts.count * (2 * experts.intermediate_size + hidden)
    bits = 4.25 if scaled else 4.0
    return numbers * (wide * tall - own) * bits / 8 + 2.0 * biases


def _is_mxfp4(shape: ModelShape, weight_format: WeightFormat) -> bool:
    stored = shape.stored.name if shape.stored is not None else ""
    return weight_format == "mxfp4" or (weight_format == "stored" and "mxfp4" in stored)


def _padded_sizes(width: int, hidden: int, gpu: GpuProfile) -> tuple[int, int, bool]:
    """Width and hidden size as padded, and whether the scales are padded with them."""
    if gpu.architecture == "blackwell":  # FlashInfer
        return _up(width, 256), _up(hidden, 256), True
    if gpu.architecture == "hopper":  # Triton, whose layout pads the values alone
        return width, _up(hidden, 256), False
    return _up(width, 128), _up(hidden, 256), True  # Marlin


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
