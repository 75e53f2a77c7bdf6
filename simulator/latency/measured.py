"""Decode steps put together from a card's measured kernels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import priors
from kvtune.simulator.latency.answers import TIERS, Answer, answer_of_tier
from kvtune.simulator.latency.kernels import FloatArray
from kvtune.simulator.latency.pages import in_16_bits, paged_attention
from kvtune.simulator.latency.parts import decode_parts, heads_of, layer_matrices
from kvtune.simulator.latency.terms import WORSE, matrices_in_format
from kvtune.simulator.latency.transfer import Tables
from kvtune.simulator.memory.weights import WeightFormat


def measured_steps(
    tables: Tables,
    gpu: GpuProfile,
    shape: ModelShape,
    weight_format: WeightFormat,
    batch: FloatArray,
    cache: Mapping[str, FloatArray],
) -> Answer:
    """Decode steps through a graph, from measured kernels.

    Other formats than bf16 are read by the paged kernel where it was measured on the card, by the
    format of the nearest bits if not by themselves; else taken as so many bf16 bytes as take as
    long by the priors, as weights of fewer bits are. Both make the answer a fitted one at best.

    Args:
        tables: kernel times of the card.
        gpu: the card.
        shape: a shape that they cover.
        weight_format: of the matrices.
        batch: sequences.
        cache: bytes a sequence over all layers by format, of the same shape as ``batch``.
    """
    plain, pages = in_16_bits(batch, cache), bool(tables.kernels.paged_formats)
    ends = []
    for end in ("value", "low", "high"):
        whole = decode_parts(tables.kernels, shape, batch, _as_bf16_tokens(shape, cache, end))
        matrices = matrices_in_format(whole.matrices, shape, gpu, weight_format, batch, end)
        attention = whole.attention
        if pages and not plain.all():
            paged = paged_attention(tables.kernels, shape, batch, cache, end)
            attention = np.where(plain, attention, paged)
        ends.append(attention + matrices + whole.rest + whole.beside)
    value, low, high = ends
    tiers = np.where(
        plain & (weight_format == "bf16"), _tiers(tables, shape, batch, cache), _narrow(tables)
    )
    return answer_of_tier(value, low, high, tiers)


def _narrow(tables: Tables) -> int:
    """The tier of a step whose cache or weights are narrower than they were measured."""
    return TIERS.index("fitted" if tables.tier == "measured" else tables.tier)


def _as_bf16_tokens(shape: ModelShape, cache: Mapping[str, FloatArray], end: str) -> FloatArray:
    """So many bf16 tokens as take as long to read, by the priors of narrow formats."""
    sizes = [size / priors.cache_factor(name, WORSE[end]) for name, size in cache.items()]
    return np.asarray(np.sum(sizes, axis=0) / shape.kv_bytes_per_token())


def _tiers(
    tables: Tables,
    shape: ModelShape,
    batch: FloatArray,
    cache: Mapping[str, FloatArray],
) -> npt.NDArray[np.intp]:
    """The tier of each step over bf16: its own point, between points, beyond them, or another
    card's."""
    kernels = tables.kernels
    sizes = (*layer_matrices(shape), (shape.vocab_size, shape.hidden_size))
    known = kernels.has_heads(heads_of(shape)) and all(kernels.has_linear(*s) for s in sizes)
    if tables.tier != "measured":
        found = np.full(np.shape(batch), TIERS.index(tables.tier))
    elif not known or any(shape.windows):
        found = np.full(np.shape(batch), TIERS.index("fitted"))
    else:
        tokens = np.sum(list(cache.values()), axis=0) / shape.kv_bytes_per_token()
        points = kernels.attention_points(heads_of(shape))
        batches = np.array(sorted({b for b, _ in points}), dtype=np.float64)
        keys = {float(b) * 2**32 + n for b, n in points}
        exact = np.isin(batch * 2**32 + tokens, np.array(sorted(keys)))
        lengths = np.array(sorted({n for _, n in points}), dtype=np.float64)
        # The largest caches of each batch bound the grid; beyond them a line goes on.
        longest = np.array([max(n for b, n in points if b == one) for one in batches])
        inside = (
            (batch <= batches[-1])
            & (tokens >= lengths[0])
            & (tokens <= np.interp(batch, batches, longest))
        )
        found = np.where(exact, 0, np.where(inside, 1, 2))
    return np.asarray(found, dtype=np.intp)
