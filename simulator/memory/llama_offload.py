"""Which layers llama.cpp puts on the GPU, and what of weights and cache stays on the host.

``-ngl N`` counts the output matrix as a layer of its own, behind all others. Since December 2025 it
goes to the GPU first and layers follow from the last on; before, it went there last. The embedding
always stays on the host, and a tied output matrix on the GPU is a copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.estimate import Estimate
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.weights import WeightFormat, weight_bytes

_OUTPUT_FIRST = 7407  # github.com/ggml-org/llama.cpp/pull/16653
_UNEVEN = 0.06  # by which layers of a file with mixed types differ from their average


@dataclass(frozen=True)
class Offload:
    """The share of a model that is on the GPU.

    Args:
        layers: of the model.
        first: number of the first layer on the GPU; all behind it are there too.
        output: whether the output matrix is there.
        cache: whether the cache of those layers is there.
    """

    layers: int
    first: int
    output: bool
    cache: bool = True

    @property
    def whole(self) -> bool:
        """Whether nothing but the embedding is on the host."""
        return self.first == 0 and self.output and self.cache

    @property
    def share(self) -> float:
        """The share of layers on the GPU."""
        return (self.layers - self.first) / self.layers

    def holds_cache(self, layer: int) -> bool:
        """Whether the cache of a layer is on the GPU."""
        return self.cache and layer >= self.first


def offload_of(layers: int, gpu_layers: int | None, cache: bool, build: int) -> Offload:
    """What ``-ngl`` puts on the GPU; everything where it is not given.

    Args:
        layers: of the model.
        gpu_layers: the number that was given.
        cache: whether caches follow their layers, as without ``-nkvo``.
        build: of llama.cpp.
    """
    if gpu_layers is None or gpu_layers > layers:
        return Offload(layers, 0, True, cache)
    if build < _OUTPUT_FIRST:
        return Offload(layers, layers - gpu_layers, False, cache)
    return Offload(layers, layers + 1 - max(1, gpu_layers), gpu_layers > 0, cache)


def split_weights(
    shape: ModelShape, weight_format: WeightFormat, offload: Offload
) -> tuple[Estimate, Estimate]:
    """Bytes of the weights on the GPU and on the host."""
    whole, counts = weight_bytes(shape, weight_format), shape.parameter_counts()
    in_bits, out_bits = _table_bits(shape, weight_format)
    if shape.tied_embeddings:
        in_bits = out_bits
    embedding = in_bits / 8 * counts.embedding
    output = out_bits / 8 * shape.vocab_size * shape.hidden_size
    own = 0.0 if shape.tied_embeddings else output  # of the file's bytes; else a copy
    repeating = max(0.0, whole.value - embedding - own)
    device = offload.share * repeating + (output if offload.output else 0.0)
    host = embedding + (1 - offload.share) * repeating + (0.0 if offload.output else own)
    low, high = whole.low / whole.value, whole.high / whole.value
    if whole.low != whole.high or weight_format != "bf16":
        # Types of a file differ between matrices: embeddings may have more bits or fewer.
        low, high = low - 0.1 * embedding / whole.value, high + 0.4 * embedding / whole.value
    uneven = _UNEVEN if 0 < offload.share < 1 and weight_format != "bf16" else 0.0
    return (
        _estimate(device, low - uneven, high + uneven), _estimate(host, low - uneven, high + uneven)
    )  # fmt: skip


def _table_bits(shape: ModelShape, weight_format: WeightFormat) -> tuple[float, float]:
    """Bits of a number of the embedding and of the output matrix.

    Files of k-quants keep the output matrix in six bits at least, and the embedding in the type
    that they are named by; of others the average is taken.
    """
    name = shape.stored.name if weight_format == "stored" and shape.stored else weight_format
    found = next((bits for key, bits in _NAMED_BITS if name.lower().startswith(key)), None)
    if found is not None:
        return found, max(found, 6.5625)
    average = 8 * weight_bytes(shape, weight_format).value / max(1, shape.parameter_counts().total)
    return (16.0, 16.0) if weight_format == "bf16" else (average, average)


_NAMED_BITS = (
    ("q8_0", 8.5), ("q6_k", 6.5625), ("q5_k", 5.5), ("q4_k", 4.5), ("q4_0", 4.5), ("q3_k", 3.4375)
)  # fmt: skip


def _estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low * value, high * value, "B", "assumed")


def layer_bytes(shape: ModelShape, weight_format: WeightFormat) -> float:
    """Bytes of one layer's matrices, on average."""
    counts = shape.parameter_counts()
    size = weight_bytes(shape, weight_format).value
    return size * counts.matrices / max(1, counts.total) / shape.layers
