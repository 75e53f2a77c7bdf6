"""Kernel times of vLLM, SGLang and TensorRT-LLM from the tables that NVIDIA measured."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import STACKS, Stack, Table, read_table
from kvtune.simulator.latency.table_grid import Features, FloatArray, GeometryGrid, fit_grids


class Heads(NamedTuple):
    """Heads of one GPU: query heads, KV heads, and their width."""

    query: int
    kv: int
    width: int


class ExpertShape(NamedTuple):
    """What decides how long routed experts take."""

    hidden: int
    intermediate: int
    active: int
    experts: int
    tp: int


_UNMEASURED = "--weights chooses another format; without --stack kvtune's own model answers."

# Checkpoints in fp8 have one scale a matrix or one a block, and tables have kernels of both by
# themselves: of vLLM's on an H200 the first take three times as long, on a B200 the second.
_EXPERT_KERNELS = {"fp8": ("fp8", "fp8_block")}


@dataclass(frozen=True)
class Curve:
    """Seconds over one size, straight in the logarithms; beyond the last point in proportion.

    Args:
        log_x: logarithms of the sizes, ascending.
        log_s: logarithms of the seconds, never falling.
    """

    log_x: FloatArray
    log_s: FloatArray

    @classmethod
    def of(cls, sizes: npt.ArrayLike, seconds: npt.ArrayLike) -> Curve:
        """From points in any order; doubled sizes take their median, falls are evened out."""
        x, s = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
        known = np.unique(x)
        logs = np.array([np.log(np.median(s[x == one])) for one in known])
        rising, falling = np.maximum.accumulate(logs), np.minimum.accumulate(logs[::-1])[::-1]
        return cls(np.log(known), (rising + falling) / 2)

    def at(self, sizes: npt.ArrayLike) -> FloatArray:
        """Seconds at these sizes; held below the first point."""
        x = np.log(np.maximum(np.asarray(sizes, np.float64), 1e-9))
        beyond = np.maximum(x - self.log_x[-1], 0.0)
        return np.asarray(np.exp(np.interp(x, self.log_x, self.log_s) + beyond))


@dataclass(frozen=True)
class ServingTables:
    """The tables of one system and stack.

    Args:
        folder: the wheel's ``systems`` folder.
        system: for example ``h200_sxm``.
        stack: whose kernels.
    """

    folder: Path
    system: str
    stack: Stack

    def decode_attention(
        self,
        heads: Heads,
        window: int | None,
        kv_format: str,
        batch: npt.ArrayLike,
        length: npt.ArrayLike,
    ) -> FloatArray:
        """Seconds of one layer's attention of a decode step.

        Args:
            heads: of one GPU.
            window: tokens that the layer sees, None for all.
            kv_format: ``bfloat16`` or ``fp8``.
            batch: sequences.
            length: tokens in each one's cache.
        """
        return self._attention("generation", heads, window, kv_format, batch, length)

    def context_attention(
        self,
        heads: Heads,
        window: int | None,
        kv_format: str,
        batch: npt.ArrayLike,
        prompt: npt.ArrayLike,
    ) -> FloatArray:
        """Seconds of one layer's causal attention over whole prompts."""
        return self._attention("context", heads, window, kv_format, batch, prompt)

    def _attention(
        self,
        kind: str,
        heads: Heads,
        window: int | None,
        kv_format: str,
        batch: npt.ArrayLike,
        length: npt.ArrayLike,
    ) -> FloatArray:
        family = _family(self, kind, heads.width, window or 0, kv_format)
        seen = np.asarray(length, np.float64)
        if not family:
            if window:  # a window that was not measured: as a shorter prompt or cache
                shorter = np.minimum(seen, window)
                whole = self._attention(kind, heads, None, kv_format, batch, shorter)
                return whole * (1 if kind == "generation" else np.maximum(seen / shorter, 1))
            raise KvtuneError(
                f"{self.stack} on {self.system} has no measured attention of heads of "
                f"{heads.width} over {kv_format}"
            )
        near = min(family, key=lambda one: _distance(one, heads))
        work = heads.kv / near.kv if kind == "generation" else heads.query / near.query
        wider = heads.width / near.width
        if kind == "generation":
            return family[near].at(batch, np.maximum(seen * work * wider, 1.0))
        return family[near].at(batch, seen) * work * wider

    def matrix(self, out: int, wide: int, number_format: str, rows: npt.ArrayLike) -> FloatArray:
        """Seconds of ``[rows, wide] x [wide, out]`` in a format of the tables.

        Of all stacks' kernels on the system the fastest: they call the same libraries, and where
        one stack's table is slower, its harness is taken not to have tuned that kernel (vLLM's
        blocks of fp8 on a B200 are 8 times slower in its table, and not in whole runs).
        """
        return _fastest_matrix(self, out, wide, number_format).at(rows)

    def matrix_formats(self) -> set[str]:
        """Formats that matrix products were measured in."""
        return set(_matrices(self))

    def experts(self, shape: ExpertShape, number_format: str, tokens: npt.ArrayLike) -> FloatArray:
        """Seconds of one layer's routed experts on one GPU, by the faster of a format's kernels.

        Those of another stack stand in for a format that this one's table lacks.
        """
        names = _EXPERT_KERNELS.get(number_format, (number_format,))
        for tables in self._own_first():
            curves = [_experts_curve(tables, shape, name) for name in names]
            seconds = [curve.at(tokens) for curve in curves if curve is not None]
            if seconds:
                return np.asarray(np.minimum.reduce(seconds))
        raise KvtuneError(
            f"{self.stack} on {self.system} has no measured experts of this shape in "
            f"{number_format}: {shape}",
            hint=_UNMEASURED,
        )

    def _own_first(self) -> list[ServingTables]:
        """These tables and those of the other stacks on the system."""
        others = (stack for stack in STACKS if stack != self.stack)
        return [self, *(replace(self, stack=stack) for stack in others)]

    def all_reduce(self, gpus: int, numbers: npt.ArrayLike) -> FloatArray:
        """Seconds of a sum over GPUs of so many 16-bit numbers; nothing on one GPU."""
        if gpus == 1:
            return np.zeros(np.shape(numbers))
        return _all_reduce_curve(self, gpus).at(numbers)

    def source(self) -> str:
        """Stack, version and kernel, for people."""
        table = _attention_table(self, "generation", 128)
        return f"{self.stack} {table.version if table else '?'} on {self.system}"


def attention_features(kind: str, window: int) -> Features:
    """Terms of the fit: a floor, what is read or multiplied, and tokens that are written."""

    def terms(batch: FloatArray, length: FloatArray) -> FloatArray:
        seen = np.minimum(length, window) if window else length
        if kind == "generation":
            return np.stack([np.ones_like(seen), batch * seen, batch], axis=-1)
        pairs = batch * (seen * (seen + 1) / 2 + (length - seen) * seen)
        return np.stack([np.ones_like(seen), pairs, batch * length], axis=-1)

    return terms


def attention_points(
    table: Table, kind: str
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
def _attention_table(tables: ServingTables, kind: str, width: int) -> Table | None:
    return read_table(
        tables.folder, tables.system, "attention", tables.stack, f"{kind}_attention_perf",
        {"head_dim": width},
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _family(
    tables: ServingTables, kind: str, width: int, window: int, kv_format: str
) -> dict[Heads, GeometryGrid]:
    """Grids of every pair of heads; of the nearest width where this one was not measured."""
    for wide in sorted({width, 64, 128, 192, 256}, key=lambda one: abs(np.log(one / width))):
        table = _attention_table(tables, kind, int(wide))
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


class _Matrices(NamedTuple):
    """Seconds of matrix products: ``[out, wide, rows]`` with their sizes, logarithms all."""

    out: FloatArray
    wide: FloatArray
    rows: FloatArray
    log_s: FloatArray


@functools.lru_cache(maxsize=16)
def _matrices(tables: ServingTables) -> Mapping[str, _Matrices]:
    table = read_table(tables.folder, tables.system, "gemm", tables.stack, "gemm_perf")
    if table is None:
        return {}
    formats = np.unique(table.columns["gemm_dtype"])
    return {str(one): _matrix_grid(table.where(gemm_dtype=one)) for one in formats}


def _matrix_grid(table: Table) -> _Matrices:
    """A full grid; a product that is missing is scaled from the next measured width."""
    columns = table.fastest_of("n", "k", "m").columns
    axes = [np.unique(columns[name]) for name in ("n", "k", "m")]
    logs = np.full([len(axis) for axis in axes], np.nan)
    places = tuple(
        np.searchsorted(axis, columns[name])
        for axis, name in zip(axes, ("n", "k", "m"), strict=True)
    )
    logs[places] = np.log(columns["latency"] * 1e-3)
    for axis in (2, 1, 0):
        logs = np.apply_along_axis(_fill_line, axis, logs)
    out, wide, rows = (np.log(axis.astype(np.float64)) for axis in axes)
    return _Matrices(out, wide, rows, logs)


def _fill_line(values: FloatArray) -> FloatArray:
    known = ~np.isnan(values)
    if known.all() or not known.any():
        return values
    places = np.arange(len(values))
    return np.interp(places, places[known], values[known])


@functools.lru_cache(maxsize=4096)
def _matrix_curve(tables: ServingTables, out: int, wide: int, number_format: str) -> Curve:
    """Over rows, bilinear in the logarithms of both widths; beyond the grid in proportion."""
    grids = _matrices(tables)
    if number_format not in grids:
        raise KvtuneError(
            f"{tables.stack} on {tables.system} has no measured matrices in {number_format}; "
            f"it has {', '.join(sorted(grids)) or 'none'}",
            hint=_UNMEASURED,
        )
    grid = grids[number_format]
    found, beyond = grid.log_s, 0.0
    for points, size in ((grid.out, out), (grid.wide, wide)):
        asked = np.log(size)
        index = int(np.clip(np.searchsorted(points, asked) - 1, 0, len(points) - 2))
        share = (asked - points[index]) / (points[index + 1] - points[index])
        beyond += max(0.0, asked - points[-1])
        share = float(np.clip(share, 0.0, 1.0))
        found = found[index] * (1 - share) + found[index + 1] * share
    return Curve.of(np.exp(grid.rows), np.exp(found + beyond))


@functools.lru_cache(maxsize=4096)
def _fastest_matrix(tables: ServingTables, out: int, wide: int, number_format: str) -> Curve:
    """The fastest of all stacks' kernels; a format is this stack's own where it has it."""
    own = _matrix_curve(tables, out, wide, number_format)
    others = [
        _matrix_curve(each, out, wide, number_format)
        for each in tables._own_first()[1:]
        if number_format in _matrices(each)
    ]
    rows = np.unique(np.concatenate([own.log_x, *(each.log_x for each in others)]))
    fastest = np.minimum.reduce([each.at(np.exp(rows)) for each in (own, *others)])
    return Curve(rows, np.log(fastest))


@functools.lru_cache(maxsize=512)
def _experts_curve(tables: ServingTables, shape: ExpertShape, number_format: str) -> Curve | None:
    """Of this very mixture, with tokens that crowd on some experts as they do in practice.

    Experts cut into shares; where that was not measured, as many GPUs with whole experts each.
    """
    for shares, whole in ((shape.tp, 1), (1, shape.tp)):
        wanted = {
            "moe_dtype": number_format, "hidden_size": shape.hidden,
            "inter_size": shape.intermediate, "topk": shape.active, "num_experts": shape.experts,
            "moe_tp_size": shares, "moe_ep_size": whole,
        }  # fmt: skip
        place = (tables.folder, tables.system, "moe", tables.stack, "moe_perf")
        rows = read_table(*place, wanted)
        for spread in ("power_law_1.01", "power_law_1.2", "balanced") if rows else ():
            found = rows.where(distribution=spread).fastest_of("num_tokens") if rows else None
            if found is not None and len(found):
                return Curve.of(found.columns["num_tokens"], found.columns["latency"] * 1e-3)
    return None


@functools.lru_cache(maxsize=64)
def _all_reduce_curve(tables: ServingTables, gpus: int) -> Curve:
    """The stack's own sum in a graph, else NCCL's; more GPUs than were measured as the most."""
    own = read_table(
        tables.folder, tables.system, "comm", tables.stack, "custom_allreduce_perf"
    )  # fmt: skip
    if own is not None:
        graphs = [
            name for name in np.unique(own.columns.get("kernel_source", [])) if "graph" in name
        ]
        rows = own.where(kernel_source=graphs[0]) if graphs else own
        size, ranks = "message_size", "num_gpus"
    else:
        nccl = read_table(tables.folder, tables.system, "comm", "nccl", "nccl_perf")
        if nccl is None:
            raise KvtuneError(f"no communication was measured on {tables.system}")
        rows, size, ranks = (
            nccl.where(op_name="all_reduce", nccl_dtype="half"),
            "message_size",
            "num_gpus",
        )
    known = np.unique(rows.columns[ranks])
    count = int(known[np.argmin(np.abs(np.log(known / gpus)))])
    chosen = rows.where(**{ranks: count})
    return Curve.of(chosen.columns[size], chosen.columns["latency"] * 1e-3)
