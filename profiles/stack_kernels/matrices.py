"""Matrix products by the stacks' tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import StackTables, Table
from kvtune.profiles.stack_kernels.curve import Curve
from kvtune.profiles.stack_kernels.grid import FloatArray

UNMEASURED = "--weights chooses another format; without --stack kvtune's own model answers."


class _Matrices(NamedTuple):
    """Seconds of matrix products: ``[out, wide, rows]`` with their sizes, logarithms all."""

    out: FloatArray
    wide: FloatArray
    rows: FloatArray
    log_s: FloatArray


@functools.lru_cache(maxsize=16)
def matrices_by_format(tables: StackTables) -> Mapping[str, _Matrices]:
    """What was measured of a stack, by the format of the matrices."""
    table = tables.read("gemm", "gemm_perf")
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
def _matrix_curve(tables: StackTables, out: int, wide: int, number_format: str) -> Curve:
    """Over rows, bilinear in the logarithms of both widths; beyond the grid in proportion."""
    grids = matrices_by_format(tables)
    if number_format not in grids:
        raise KvtuneError(
            f"{tables.stack} on {tables.system} has no measured matrices in {number_format}; "
            f"it has {', '.join(sorted(grids)) or 'none'}",
            hint=UNMEASURED,
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
def fastest_matrix(tables: StackTables, out: int, wide: int, number_format: str) -> Curve:
    """The fastest of all stacks' kernels; a format is this stack's own where it has it."""
    own = _matrix_curve(tables, out, wide, number_format)
    others = [
        _matrix_curve(each, out, wide, number_format)
        for each in tables.own_first()[1:]
        if number_format in matrices_by_format(each)
    ]
    rows = np.unique(np.concatenate([own.log_x, *(each.log_x for each in others)]))
    fastest = np.minimum.reduce([each.at(np.exp(rows)) for each in (own, *others)])
    return Curve(rows, np.log(fastest))
