"""Two plain models of a decode step, to be printed beside ours: a roofline, and a scaled one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import terms
from kvtune.simulator.latency.answers import FloatArray
from kvtune.simulator.memory.weights import WeightFormat, kernel_format


def roofline_decode_steps(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    batch: npt.ArrayLike,
    cache_bytes_per_sequence: npt.ArrayLike,
) -> FloatArray:
    """Pure roofline, seconds: all bytes at the sheet's bandwidth, or all operations at its rate."""
    sequences = np.asarray(batch, dtype=float)
    moved = _bytes_moved(shape, weight_format, sequences, cache_bytes_per_sequence)
    operations = 2.0 * shape.active_parameters * sequences
    return np.maximum(
        moved / gpu.bandwidth_bytes_per_s,
        operations / terms.matrix_rate(gpu, kernel_format(shape, weight_format)),
    )


def scaled_decode_steps(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    batch: npt.ArrayLike,
    cache_bytes_per_sequence: npt.ArrayLike,
) -> FloatArray:
    """All bytes at 0.8 x bandwidth and 3 us an operation, seconds, as serving simulators assume.

    Five operations a layer (query-key-value, attention, output, two of the feed-forward) and one
    output matrix.
    """
    moved = _bytes_moved(shape, weight_format, np.asarray(batch, float), cache_bytes_per_sequence)
    operations = 5 * shape.layers + 1
    return np.asarray(moved / (0.8 * gpu.bandwidth_bytes_per_s) + 3e-6 * operations)


def _bytes_moved(
    shape: ModelShape,
    weight_format: WeightFormat,
    sequences: FloatArray,
    cache_bytes_per_sequence: npt.ArrayLike,
) -> FloatArray:
    """Weights once and every sequence's cache."""
    weights = terms.weight_bytes_read(shape, weight_format, sequences)
    return np.asarray(weights + sequences * np.asarray(cache_bytes_per_sequence, dtype=float))
