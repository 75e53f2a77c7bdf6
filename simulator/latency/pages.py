"""Attention over pages of several formats, from a card's measured kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.format import find_format
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import priors
from kvtune.simulator.latency.kernels import FloatArray, Kernels


def paged_attention(
    kernels: Kernels,
    shape: ModelShape,
    batch: FloatArray,
    cache: Mapping[str, FloatArray],
    end: str = "value",
) -> FloatArray:
    """Attention of all layers over pages of several formats.

    Each format's part takes its share of the time that all bytes would take in that format.

    Args:
        kernels: of the card, of which pages of some format were measured.
        shape: the model.
        batch: sequences.
        cache: bytes a sequence over all layers by format, of the same shape as ``batch``.
        end: of the interval, which formats have that were not measured on the card.
    """
    used = {name: size for name, size in cache.items() if np.any(size > 0)}
    if not used:  # the kernel runs over an empty cache too
        used = {"bf16": np.zeros(np.shape(batch))}
    # In numbers held, not bytes: a sequence's tokens are the sum over its formats. Above zero, so
    # that an empty cache takes what the kernel does for nothing.
    bits = {name: find_format(name).bits for name in used}
    numbers = {name: np.maximum(size * 8 / bits[name], 1e-9) for name, size in used.items()}
    total = np.sum(list(numbers.values()), axis=0)
    parts_s = [
        numbers[name] / total
        * _seconds(kernels, name, batch, total * bits[name] / 8 / shape.layers, end)
        for name in used
    ]  # fmt: skip
    return np.asarray(shape.layers * np.sum(parts_s, axis=0))


def _seconds(
    kernels: Kernels, name: str, batch: FloatArray, layer_bytes: FloatArray, end: str
) -> FloatArray:
    """One layer's attention over pages of a format, by the bytes that a sequence holds.

    One that was not measured on the card takes as long as so many bytes of the measured format of
    the nearest number of bits as both were seen to take on another.
    """
    near = min(kernels.paged_formats, key=lambda known: (known != name, _apart(known, name), known))
    if near != name:
        layer_bytes = layer_bytes * priors.pages_as(name, near, end)
    return kernels.paged(near, batch, layer_bytes)


def _apart(known: str, name: str) -> float:
    """How far two formats' bits are apart."""
    return abs(math.log2(find_format(known).bits / find_format(name).bits))


def in_16_bits(batch: FloatArray, cache: Mapping[str, FloatArray]) -> NDArray[np.bool_]:
    """Where nothing lies in another format than bf16, of the shape of ``batch``."""
    narrow = [size > 0 for name, size in cache.items() if name != "bf16"]
    return ~np.asarray(np.any([np.zeros(np.shape(batch), bool), *narrow], axis=0))


def narrow_pages(
    kernels: Kernels, shape: ModelShape, cache: Mapping[str, FloatArray], end: str
) -> FloatArray:
    """How many times as long attention takes for its bytes, where heads are narrower."""
    if shape.head_dim >= kernels.heads()[2]:
        return np.ones(())
    numbers = {
        name: np.maximum(size / find_format(name).bits, 1e-9) for name, size in cache.items()
    }
    wide = numbers.get("bf16", np.zeros(())) / np.sum(list(numbers.values()), axis=0)
    return np.asarray(wide + (1 - wide) * getattr(priors.NARROW_PAGES, end))
