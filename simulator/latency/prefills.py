"""Prefills put together from a card's measured kernels, and those of kvtune's own runtime."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import TIERS, Answer, answer_of_tier
from kvtune.simulator.latency.kernels import FloatArray, Kernels
from kvtune.simulator.latency.learned import by_model, by_width
from kvtune.simulator.latency.parts import layer_rest, matrix_products
from kvtune.simulator.latency.terms import pairs
from kvtune.simulator.latency.transfer import Tables

_MOST_ROWS = 8192.0  # element-wise ops were measured up to here


class Prefills(NamedTuple):
    """What one model's prefills say.

    Args:
        shape: the model.
        prompts: tokens of a prompt, ascending.
        ratios: how many times as long a prefill takes as its parts, at each.
    """

    shape: ModelShape
    prompts: FloatArray
    ratios: FloatArray


def measured_prefills(
    tables: Tables, shape: ModelShape, prompt: FloatArray, batch: FloatArray
) -> Answer:
    """Prefills in bf16 from measured kernels, one prompt after another's attention."""
    kernels, layers = tables.kernels, shape.layers
    tokens = prompt * batch
    known = kernels.heads()
    scale = shape.query_heads * shape.head_dim / (known[0] * known[2])
    attention = kernels.by_length("attention_prefill", "bf16", prompt) * batch * scale
    attention = attention * pairs(shape, prompt) / (layers * prompt * (prompt + 1) / 2)
    value = layers * (attention + matrix_products(kernels, shape, tokens))
    value = value + layers * layer_rest(kernels, shape, np.minimum(tokens, _MOST_ROWS)) * (
        np.maximum(tokens, _MOST_ROWS) / _MOST_ROWS
    )
    value = value + kernels.linear(shape.vocab_size, shape.hidden_size, batch)
    tier = TIERS.index("fitted" if tables.tier == "measured" else tables.tier)
    tiers = np.full(np.shape(value), tier, dtype=np.intp)
    return answer_of_tier(value, value, value, tiers)


def runtime_prefills(
    tables: Tables, shape: ModelShape, prompt: FloatArray, batch: FloatArray
) -> Answer | None:
    """Prefills of the runtime, uncompressed, in bf16; None where none was measured.

    Args:
        tables: kernel times of the card.
        shape: a shape that they cover.
        prompt: tokens of each.
        batch: prompts, of the same shape as ``prompt``.
    """
    known = learned_prefills(tables.whole)
    if not known:
        return None
    ratios = [np.interp(prompt, each.prompts, each.ratios) for each in known]
    ratio = by_width(shape, known, ratios)
    alone = measured_prefills(tables, shape, prompt, batch)
    return Answer(ratio * alone.value, ratio * alone.low, ratio * alone.high, alone.tiers)


@functools.lru_cache(maxsize=32)
def learned_prefills(kernels: Kernels) -> tuple[Prefills, ...]:
    """Of each measured model, the narrowest first."""
    tables = Tables(kernels, "measured", "")
    found = []
    for shape, rows in by_model(kernels, "runtime_prefill"):
        rows.sort(key=lambda row: row.point.length)
        prompt, batch = (
            np.array([float(getattr(row.point, name)) for row in rows])
            for name in ("length", "batch")
        )
        alone = measured_prefills(tables, shape, prompt, batch).value
        found.append(Prefills(shape, prompt, np.array([row.seconds for row in rows]) / alone))
    return tuple(found)
