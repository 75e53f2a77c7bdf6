"""Attention over pages of several formats, from a card's measured kernels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvtune.policies.format import find_format
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import priors
from kvtune.simulator.latency.kernels import FloatArray, Kernels


def paged_attention(
    kernels: Kernels, shape: ModelShape, batch: FloatArray, cache: Mapping[str, FloatArray]
) -> FloatArray | None:
    """Attention of all layers over pages of several formats; None where one was not measured.

    Each format's part takes its share of the time that all bytes would take in that format.

    Args:
        kernels: of the card.
        shape: the model.
        batch: sequences.
        cache: bytes a sequence over all layers by format, of the same shape as ``batch``.
    """
    used = {name: size for name, size in cache.items() if np.any(size > 0)}
    if not used:  # the kernel runs over an empty cache too
        used = {"bf16": np.zeros(np.shape(batch))}
    if not all(kernels.has_paged(name) for name in used):
        return None
    # In numbers held, not bytes: a sequence's tokens are the sum over its formats. Above zero, so
    # that an empty cache takes what the kernel does for nothing.
    bits = {name: find_format(name).bits for name in used}
    numbers = {name: np.maximum(size * 8 / bits[name], 1e-9) for name, size in used.items()}
    total = np.sum(list(numbers.values()), axis=0)
    parts_s = [
        numbers[name] / total
        * kernels.paged(name, batch, total * bits[name] / 8 / shape.layers)
        for name in used
    ]  # fmt: skip
    return np.asarray(shape.layers * np.sum(parts_s, axis=0))


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
