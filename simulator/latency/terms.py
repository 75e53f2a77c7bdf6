"""The parts of a decode step and of a prefill, each with its interval; arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.policies.format import find_format
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import priors
from kvtune.simulator.latency.priors import FloatArray, Prior
from kvtune.simulator.memory.weights import (
    KernelFormat,
    WeightFormat,
    bits_per_weight,
    kernel_format,
    matrix_bytes,
)


class Term(NamedTuple):
    """Seconds of one part: likely, and the ends of its 10-90 % interval."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


def floor(prior: Prior, times: npt.ArrayLike = 1.0) -> Term:
    """A prior in seconds, so many times."""
    count = np.asarray(times, dtype=np.float64)
    return Term(prior.value * count, prior.low * count, prior.high * count)


def layer_floor(shape: ModelShape) -> Prior:
    """What a layer's kernels other than attention take however little they move, seconds."""
    plain = priors.OTHER_KERNELS_S
    if shape.experts is None:
        return plain
    return Prior(*(a + b for a, b in zip(plain, priors.ROUTING_KERNELS_S, strict=True)))


def cache_read(gpu: GpuProfile, sequences: FloatArray, cache: dict[str, FloatArray]) -> Term:
    """Reading the batch's cache: bytes of each format at the efficiency of that format."""

    def seconds(end: str, efficiency: float) -> FloatArray:
        moved = [size / priors.cache_factor(name, end) for name, size in cache.items()]
        total = np.sum(moved, axis=0) * sequences
        return np.asarray(total / (efficiency * gpu.bandwidth_bytes_per_s))

    achieved = priors.ATTENTION_EFFICIENCY
    return Term(
        seconds("value", achieved.value),
        seconds("high", achieved.high),
        seconds("low", achieved.low),
    )


def decode_attention(
    shape: ModelShape, gpu: GpuProfile, sequences: FloatArray, cache: dict[str, FloatArray]
) -> Term:
    """Attention's products over the cached numbers; above the bytes' time for latents only."""
    elements = (
        np.sum([size * 8 / find_format(name).bits for name, size in cache.items()], axis=0)
        * sequences
    )
    operations = elements * _operations_per_element(shape)
    return _over_rate(operations, gpu.bf16_flop_per_s, priors.ATTENTION_COMPUTE)


def matrices(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    tokens: FloatArray,
    logits: FloatArray,
) -> Term:
    """All matrix products of ``tokens`` tokens, ``logits`` of which reach the output matrix."""
    read = _weights_read(shape, gpu, weight_format, tokens)
    head = shape.vocab_size * shape.hidden_size
    body = 2.0 * (shape.active_parameters - head) * tokens
    body_s = _over_rate(
        body,
        matrix_rate(gpu, kernel_format(shape, weight_format)),
        matrix_efficiency(gpu, kernel_format(shape, weight_format)),
    )
    head_s = _over_rate(2.0 * head * logits, gpu.bf16_flop_per_s, priors.GEMM_EFFICIENCY)
    compute = Term(*(a + b for a, b in zip(body_s, head_s, strict=True)))
    return larger(read, compute)


def prompt_attention(
    shape: ModelShape, gpu: GpuProfile, prompt: FloatArray, sequences: FloatArray
) -> Term:
    """Causal attention over whole prompts; sliding layers see no more than their window."""
    key_width, value_width = shape.head_dim, shape.head_dim
    if shape.latent is not None:
        key_width = shape.latent.nope_dim + shape.latent.rope_dim
        value_width = shape.latent.value_dim
    operations = (
        2.0 * shape.query_heads * (key_width + value_width) * pairs(shape, prompt) * sequences
    )
    return _over_rate(operations, gpu.bf16_flop_per_s, priors.ATTENTION_COMPUTE)


def pairs(shape: ModelShape, prompt: FloatArray) -> FloatArray:
    """Query and key pairs of one head over all layers; sliding layers see only their window."""
    total_pairs = np.zeros(np.shape(prompt), dtype=np.float64)
    windows = [c.window for c in shape.layer_caches if c.kv_heads]
    for window in dict.fromkeys(windows):
        seen = prompt if window is None else np.minimum(prompt, window)
        count = windows.count(window)
        total_pairs = total_pairs + count * (seen * (seen + 1) / 2 + (prompt - seen) * seen)
    return total_pairs


def larger(first: Term, second: Term) -> Term:
    """The slower of two things that overlap."""
    return Term(*(np.maximum(a, b) for a, b in zip(first, second, strict=True)))


def total(terms: Sequence[Term]) -> Term:
    """The sum; deviations add in squares, with the unexplained rest among them."""
    value = np.asarray(sum(term.value for term in terms))
    rest = (priors.UNEXPLAINED * value) ** 2
    below = np.sqrt(rest + sum((term.value - term.low) ** 2 for term in terms))
    above = np.sqrt(rest + sum((term.high - term.value) ** 2 for term in terms))
    return Term(value, np.maximum(value - below, 0.0), value + above)


def weight_bytes_read(
    shape: ModelShape, weight_format: WeightFormat, tokens: FloatArray
) -> FloatArray:
    """Bytes of weights that one pass over ``tokens`` tokens reads, experts that are met only."""
    counts = shape.parameter_counts()
    met = counts.attention + counts.feed_forward + counts.experts * _experts_met(shape, tokens)
    head = 2 * shape.vocab_size * shape.hidden_size
    return np.asarray(matrix_bytes(shape, weight_format, 1.0) * met + head + 2 * counts.small)


def matrix_rate(gpu: GpuProfile, weight_format: KernelFormat) -> float:
    """Dense rate that the matrices run at: fp8 where the card has it, else bf16."""
    if weight_format == "fp8" and gpu.fp8_flop_per_s is not None:
        return gpu.fp8_flop_per_s
    return gpu.bf16_flop_per_s


def matrix_efficiency(gpu: GpuProfile, weight_format: WeightFormat) -> Prior:
    """Achieved share of :func:`matrix_rate` in large products."""
    in_fp8 = weight_format == "fp8" and gpu.fp8_flop_per_s is not None
    return priors.GEMM_FP8_EFFICIENCY if in_fp8 else priors.GEMM_EFFICIENCY


WORSE = {"value": "value", "low": "high", "high": "low"}  # a low efficiency makes a high time


def matrices_in_format(
    bf16_s: FloatArray,
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    tokens: FloatArray,
    end: str,
) -> FloatArray:
    """Seconds of all matrices in a narrower format, from those in bf16."""
    if weight_format == "bf16":
        return bf16_s
    factor = getattr(priors.WEIGHT_FORMAT_FACTOR[kernel_format(shape, weight_format)], WORSE[end])
    head = 2.0 * shape.vocab_size * shape.hidden_size
    wide = weight_bytes_read(shape, "bf16", tokens)
    matrices_share = 1 - head / wide
    narrow = bits_per_weight(shape, weight_format) / 16 / factor
    read = bf16_s * (1 - matrices_share + matrices_share * narrow)
    flops = 2.0 * shape.active_parameters * tokens
    matrices = kernel_format(shape, weight_format)
    efficiency = getattr(matrix_efficiency(gpu, matrices), WORSE[end])
    compute = flops / (efficiency * matrix_rate(gpu, matrices))
    return np.asarray(np.maximum(np.minimum(read, bf16_s), compute))


def _weights_read(
    shape: ModelShape, gpu: GpuProfile, weight_format: WeightFormat, tokens: FloatArray
) -> Term:
    """Reading the weights; narrow formats get less of the bandwidth."""
    seconds = weight_bytes_read(shape, weight_format, tokens) / gpu.bandwidth_bytes_per_s
    achieved, factor = (
        priors.GEMV_EFFICIENCY[gpu.memory_kind],
        priors.WEIGHT_FORMAT_FACTOR[kernel_format(shape, weight_format)],
    )
    return Term(
        seconds / (achieved.value * factor.value),
        seconds / (achieved.high * factor.high),
        seconds / (achieved.low * factor.low),
    )


def _experts_met(shape: ModelShape, tokens: FloatArray) -> FloatArray:
    """Share of the routed experts that the tokens visit, routing taken as uniform."""
    if shape.experts is None:
        return np.zeros(np.shape(tokens))
    return np.asarray(1 - (1 - shape.experts.active / shape.experts.count) ** tokens)


def _operations_per_element(shape: ModelShape) -> float:
    """Operations a cached number: 2 a query head of its group; latents serve every head at once."""
    if shape.latent is None:
        return 2.0 * shape.query_heads / max(1, shape.kv_heads)
    width = shape.elements_per_token_layer
    return 2.0 * shape.query_heads * (width + shape.latent.kv_lora_rank) / width


def _over_rate(operations: FloatArray, rate: float, efficiency: Prior) -> Term:
    seconds = np.asarray(operations / rate)
    return Term(seconds / efficiency.value, seconds / efficiency.high, seconds / efficiency.low)
