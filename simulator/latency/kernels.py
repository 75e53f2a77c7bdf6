"""Times of single kernels from a measured table, between its points and a little beyond them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.measured import MeasuredProfile

FloatArray = npt.NDArray[np.float64]
Heads = tuple[int, int, int]  # query heads, KV heads, head width


@dataclass(frozen=True)
class Curve:
    """Seconds over one size, linear between its points.

    Args:
        x: sizes, ascending.
        seconds: at each of them.
    """

    x: FloatArray
    seconds: FloatArray

    def at(self, sizes: npt.ArrayLike) -> FloatArray:
        """Held below the first point; beyond the last, on through it from the one before."""
        asked = np.asarray(sizes, dtype=np.float64)
        inside = np.interp(asked, self.x, self.seconds)
        beyond = np.maximum(0.0, asked - self.x[-1])
        return np.asarray(inside + beyond * self._last_slope())

    def _last_slope(self) -> float:
        if len(self.x) == 1:
            return float(self.seconds[0] / self.x[0])
        rise = float(self.seconds[-1] - self.seconds[-2])
        return max(0.0, rise / float(self.x[-1] - self.x[-2]))


@dataclass(frozen=True)
class Surface:
    """Seconds of decode attention over batch and length.

    Args:
        batches: ascending.
        lengths: ascending, from 0, where only the kernel's floor is left.
        seconds: ``[batches, lengths]``.
    """

    batches: FloatArray
    lengths: FloatArray
    seconds: FloatArray

    def at(self, batch: npt.ArrayLike, length: npt.ArrayLike) -> FloatArray:
        """Bilinear; batches beyond the largest are taken as so much longer sequences."""
        asked, tokens = np.broadcast_arrays(
            np.asarray(batch, dtype=np.float64), np.asarray(length, dtype=np.float64)
        )
        most = self.batches[-1]
        tokens = np.where(asked > most, tokens * asked / most, tokens)
        row, row_share = _between(self.batches, np.minimum(asked, most))
        column, share = _between(self.lengths, tokens)
        low, high = (
            self.seconds[r, column] * (1 - share)
            + self.seconds[r, np.minimum(column + 1, len(self.lengths) - 1)] * share
            for r in (row, np.minimum(row + 1, len(self.batches) - 1))
        )
        return np.asarray(low * (1 - row_share) + high * row_share)


def _between(points: FloatArray, asked: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Index of the point below, and the share of the way to the next; above 1 beyond the last."""
    if len(points) == 1:
        zeros = np.zeros(np.shape(asked))
        return zeros.astype(np.intp), zeros
    index = np.clip(np.searchsorted(points, asked, side="right") - 1, 0, len(points) - 2)
    share = (asked - points[index]) / (points[index + 1] - points[index])
    return index, np.maximum(share, 0.0)


class Kernels:
    """What a measured table says of kernels, by op.

    Args:
        rows: of one card.

    Raises:
        KvtuneError: an op that every step needs was not measured.
    """

    def __init__(self, rows: Iterable[KernelRow]) -> None:
        self._by_op: dict[str, list[KernelRow]] = defaultdict(list)
        self._copies: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        for row in rows:
            point = row.point
            plain = point.execution == "graph" or point.op == "runtime_prefill"
            if plain and point.spread == "uniform":
                self._by_op[point.op].append(row)
            elif point.op in ("host_to_device", "device_to_host"):
                self._copies[point.op, point.kernel][point.width_in] = row.seconds
        self._linear: dict[tuple[int, int], Curve] = {}
        self._surfaces: dict[Heads, Surface] = {}
        self._paged: dict[str, Surface] = {}
        self._plain: dict[tuple[str, int], Curve] = {}

    def has(self, op: str) -> bool:
        """Whether any point of the op was measured."""
        return op in self._by_op

    def rows(self, op: str) -> list[KernelRow]:
        """Those of an op.

        Raises:
            KvtuneError: there are none.
        """
        if op not in self._by_op:
            raise KvtuneError(
                f"this profile holds no measured {op!r}",
                hint="kvtune profile goes on with an unfinished profile.",
            )
        return self._by_op[op]

    # --- linear layers ---------------------------------------------------------------------

    def has_linear(self, out: int, wide: int) -> bool:
        """Whether this very matrix was measured."""
        return any(
            (row.point.width_out, row.point.width_in) == (out, wide) for row in self.rows("linear")
        )

    def linear(self, out: int, wide: int, tokens: npt.ArrayLike) -> FloatArray:
        """Seconds of ``[tokens, wide] x [wide, out]``: this matrix, or between others by size."""
        if (out, wide) not in self._linear:
            self._linear[out, wide] = self._linear_curve(out, wide)
        return self._linear[out, wide].at(tokens)

    def _linear_curve(self, out: int, wide: int) -> Curve:
        """Of this matrix; or at every number of rows between all matrices measured up to there.

        Each of them is asked over its own rows first: not all were measured at the same ones.
        """
        found: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
        for row in self.rows("linear"):
            found[row.point.width_out, row.point.width_in][row.point.rows] = row.seconds
        if (out, wide) in found:
            return _curve(found[out, wide])
        curves = {a * b: _curve(by_rows) for (a, b), by_rows in found.items()}
        between = {}
        for rows in sorted({rows for by_rows in found.values() for rows in by_rows}):
            near = {size: c for size, c in curves.items() if c.x[0] <= rows <= c.x[-1]}
            between[rows] = _by_size({n: float(c.at(rows)) for n, c in near.items()}, out * wide)
        return _curve(between)

    # --- attention -------------------------------------------------------------------------

    def heads(self) -> Heads:
        """The geometry that was measured at most points."""
        found = [_heads(row) for row in self.rows("attention_decode")]
        return max(dict.fromkeys(found), key=found.count)

    def has_heads(self, heads: Heads) -> bool:
        """Whether decode attention was measured for this geometry, at more than a few points."""
        return sum(_heads(row) == heads for row in self.rows("attention_decode")) >= 8

    def attention(self, heads: Heads, batch: npt.ArrayLike, length: npt.ArrayLike) -> FloatArray:
        """Seconds of one layer's decode attention over bf16; other geometries by their bytes."""
        known = heads if self.has_heads(heads) else self.heads()
        if known not in self._surfaces:
            self._surfaces[known] = _surface(
                [
                    row
                    for row in self.rows("attention_decode")
                    if _heads(row) == known and row.point.l2 == "cold"
                ]
            )
        scale = heads[1] * heads[2] / (known[1] * known[2])
        return self._surfaces[known].at(batch, np.asarray(length, dtype=np.float64) * scale)

    def attention_points(self, heads: Heads) -> set[tuple[int, int]]:
        """Batch and length of every measured point of a geometry."""
        return {
            (row.point.batch, row.point.length)
            for row in self.rows("attention_decode")
            if _heads(row) == heads
        }

    @functools.cached_property
    def paged_formats(self) -> frozenset[str]:
        """Formats over whose pages attention was measured."""
        return frozenset(row.point.number_format for row in self._by_op.get("attention_paged", ()))

    def paged(
        self, number_format: str, batch: npt.ArrayLike, layer_bytes: npt.ArrayLike
    ) -> FloatArray:
        """Seconds of one layer's attention over pages, by the bytes that a sequence holds there."""
        if number_format not in self._paged:
            rows = [
                row
                for row in self.rows("attention_paged")
                if row.point.number_format == number_format
            ]
            self._paged[number_format] = _surface(rows, by_bytes=True)
        return self._paged[number_format].at(batch, layer_bytes)

    # --- everything else -------------------------------------------------------------------

    def plain(self, op: str, numbers: npt.ArrayLike) -> FloatArray:
        """Seconds of an element-wise op on so many numbers of input."""
        if (op, 0) not in self._plain:
            self._plain[op, 0] = _curve(
                {row.point.rows * max(1, row.point.width_in): row.seconds for row in self.rows(op)}
            )
        return self._plain[op, 0].at(numbers)

    def by_batch(self, op: str, batch: npt.ArrayLike) -> FloatArray:
        """Seconds of an op that was measured over the batch alone."""
        if (op, 1) not in self._plain:
            self._plain[op, 1] = _curve({row.point.batch: row.seconds for row in self.rows(op)})
        return self._plain[op, 1].at(batch)

    def copy(self, direction: str, memory: str) -> Curve | None:
        """Seconds over bytes of a copy between host and device; None where it was not measured."""
        found = self._copies.get((direction, memory))
        return None if not found else _curve(found)

    def by_bytes(self, op: str) -> Curve:
        """Seconds of an op over the bytes that one call moves."""
        return _curve({row.point.width_in: row.seconds for row in self.rows(op)})

    def by_length(self, op: str, number_format: str, length: npt.ArrayLike) -> FloatArray:
        """Seconds of an op on one layer's cache of one sequence."""
        found = {
            row.point.length: row.seconds
            for row in self.rows(op)
            if row.point.number_format == number_format and _heads(row) == self.heads()
        }
        if not found:
            raise KvtuneError(f"this profile holds no measured {op!r} of {number_format!r}")
        return _curve(found).at(length)


def _heads(row: KernelRow) -> Heads:
    point = row.point
    return point.query_heads, point.kv_heads, point.head_dim


def _curve(found: dict[int, float]) -> Curve:
    sizes = sorted(found)
    return Curve(
        np.array(sizes, dtype=np.float64), np.array([found[size] for size in sizes])
    )  # fmt: skip


def _by_size(sizes: dict[int, float], wanted: int) -> float:
    """Seconds by weights of the matrix, straight in the logarithms; beyond the ends in step."""
    known = np.array(sorted(sizes), dtype=np.float64)
    seconds = np.array([sizes[int(size)] for size in known])
    near = float(np.exp(np.interp(np.log(wanted), np.log(known), np.log(seconds))))
    return near * max(1.0, wanted / float(known[-1]))


def _surface(rows: list[KernelRow], by_bytes: bool = False) -> Surface:
    """Over batch and length, or over batch and the bytes of a sequence."""
    by_batch: dict[int, dict[int, float]] = defaultdict(dict)
    for row in rows:
        size = row.bytes // row.point.batch if by_bytes else row.point.length
        by_batch[row.point.batch][size] = row.seconds
    lengths = np.array(sorted({0, *(size for found in by_batch.values() for size in found)}))
    floor = min(row.seconds for row in rows)
    table = []
    for batch in sorted(by_batch):
        table.append(_curve({0: floor} | by_batch[batch]).at(lengths))
    batches, sizes = np.array(sorted(by_batch), dtype=np.float64), lengths.astype(np.float64)
    return Surface(batches, sizes, np.array(table))


@functools.lru_cache(maxsize=8)
def kernels_of(profile: MeasuredProfile) -> Kernels:
    """The kernels of a profile, made once."""
    return Kernels(profile.rows)
