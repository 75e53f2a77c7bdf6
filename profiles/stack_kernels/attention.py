"""Attention of a layer by the stacks' tables, for heads, windows and formats of the cache."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import StackTables, Table
from kvtune.profiles.stack_kernels.grid import Features, FloatArray, GeometryGrid, fit_grids

Kind = Literal["generation", "context"]


class Heads(NamedTuple):
    """Heads of one GPU: query heads, KV heads, and their width."""

    query: int
    kv: int
    width: int


def attention_s(
    tables: StackTables,
    kind: Kind,
    heads: Heads,
    window: int | None,
    kv_format: str,
    batch: npt.ArrayLike,
    length: npt.ArrayLike,
) -> FloatArray:
    """Seconds of one layer's attention of a decode step, or over whole prompts.

    Args:
        tables: of the stack.
        kind: ``generation`` or ``context``.
        heads: of one GPU.
        window: tokens that the layer sees, None for all.
        kv_format: ``bfloat16`` or ``fp8``.
        batch: sequences.
        length: tokens in each one's cache, or of each prompt.
    """
    family = _family(tables, kind, heads.width, window or 0, kv_format)
    seen = np.asarray(length, np.float64)
    if not family:
        if window:  # a window that was not measured: as a shorter prompt or cache
            shorter = np.minimum(seen, window)
            whole = attention_s(tables, kind, heads, None, kv_format, batch, shorter)
            return whole * (1 if kind == "generation" else np.maximum(seen / shorter, 1))
        raise KvtuneError(
            f"{tables.stack} on {tables.system} has no measured attention of heads of "
            f"{heads.width} over {kv_format}"
        )
    near = min(family, key=lambda one: _distance(one, heads))
    work = heads.kv / near.kv if kind == "generation" else heads.query / near.query
    wider = heads.width / near.width
    if kind == "generation":
        return family[near].at(batch, np.maximum(seen * work * wider, 1.0))
    return family[near].at(batch, seen) * work * wider


def attention_features(kind: Kind, window: int) -> Features:
    """Terms of the fit: a floor, what is read or multiplied, and tokens that are written."""

    def terms(batch: FloatArray, length: FloatArray) -> FloatArray:
        seen = np.minimum(length, window) if window else length
        if kind == "generation":
            return np.stack([np.ones_like(seen), batch * seen, batch], axis=-1)
        pairs = batch * (seen * (seen + 1) / 2 + (length - seen) * seen)
        return np.stack([np.ones_like(seen), pairs, batch * length], axis=-1)

    return terms


def attention_points(
    table: Table, kind: Kind
) -> dict[tuple[int, int], dict[tuple[int, int], float]]:
    """Seconds by batch and length of each pair of query and KV heads."""
    columns = table.columns
    length = columns["step"] + 1 if kind == "generation" else columns["isl"]
    found: dict[tuple[int, int], dict[tuple[int, int], float]] = defaultdict(dict)
    rows = zip(
        columns["num_heads"].tolist(), columns["num_key_value_heads"].tolist(),
        columns["batch_size"].tolist(), length.tolist(), columns["latency"].tolist(), strict=True,
    )  # fmt: skip
    for query, kv, batch, tokens, milliseconds in rows:
        found[query, kv or query].setdefault((batch, tokens), milliseconds * 1e-3)
    return found


def _distance(one: Heads, wanted: Heads) -> float:
    """Unlikeness of two geometries: KV heads weigh more than query heads, width most."""
    logs = np.abs(np.log(np.array(one) / np.array(wanted)))
    return float(logs @ (1.0, 2.0, 4.0))


@functools.lru_cache(maxsize=64)
def attention_table(tables: StackTables, kind: Kind, width: int) -> Table | None:
    """What was measured of heads of a width; None where nothing was."""
    return tables.read("attention", f"{kind}_attention_perf", {"head_dim": width})


@functools.lru_cache(maxsize=256)
def _family(
    tables: StackTables, kind: Kind, width: int, window: int, kv_format: str
) -> dict[Heads, GeometryGrid]:
    """Grids of every pair of heads; of the nearest width where this one was not measured."""
    for wide in sorted({width, 64, 128, 192, 256}, key=lambda one: abs(np.log(one / width))):
        table = attention_table(tables, kind, int(wide))
        rows = table and table.where(window_size=window, kv_cache_dtype=kv_format)
        if rows is None or not len(rows):
            continue
        points = attention_points(rows.of_most_used_kernel(), kind)
        grids = fit_grids(list(points.values()), attention_features(kind, window))
        return {
            Heads(*pair, int(wide)): grid
            for pair, grid in zip(points, grids, strict=True)
            if grid is not None
        }
    return {}
