"""The long-form table of measured kernels: one row a point, CSV, written row by row.

A killed measurement leaves every finished row; the next one goes on after them. torch is not
needed to read or to write it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.files import write_text
from kvtune.common.stored import read_text

Execution = Literal["graph", "eager"]
Spread = Literal["uniform", "ragged"]
L2State = Literal["cold", "warm"]

_CHOICES = {
    "execution": ("graph", "eager"),
    "spread": ("uniform", "ragged"),
    "l2": ("cold", "warm"),
}


@dataclass(frozen=True)
class Point:
    """What was run; two rows of one table never share it.

    Args:
        op: for example ``attention_decode`` or ``linear``.
        kernel: implementation, for example ``sdpa-flash``.
        execution: replayed in a CUDA graph, or launched one by one.
        number_format: of the cache or of the weights: ``bf16``, ``fp8``, ``int4``.
        batch: sequences; 0 where the op has none.
        query_heads: query heads a layer.
        kv_heads: KV heads a layer.
        head_dim: width of a head.
        length: tokens a sequence, the mean where lengths are ragged.
        spread: whether all heads hold the same number of tokens.
        rows: rows of a matrix product, or tokens of an element-wise op.
        width_in: columns of the input.
        width_out: columns of the output.
        l2: whether the op found its data in the last-level cache.
    """

    op: str
    kernel: str
    execution: Execution = "graph"
    number_format: str = "bf16"
    batch: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    length: int = 0
    spread: Spread = "uniform"
    rows: int = 0
    width_in: int = 0
    width_out: int = 0
    l2: L2State = "cold"


@dataclass(frozen=True)
class KernelRow:
    """One measured point.

    Args:
        point: what was run.
        version: of the library that holds the kernel.
        bytes: moved by one call, read and written.
        flops: operations of one call.
        p10_us: tenth percentile of the time of a call, microseconds.
        median_us: median, microseconds.
        p90_us: ninetieth percentile, microseconds.
        runs: samples that the percentiles are of.
        sm_mhz: clock of the multiprocessors while it ran; 0 where it is unknown.
        memory_mhz: clock of the memory; 0 where it is unknown.
        watts: power drawn; 0 where it is unknown.
        throttle: the driver's reasons for lower clocks, joined by ``+``; empty for none.
    """

    point: Point
    version: str
    bytes: int
    flops: int
    p10_us: float
    median_us: float
    p90_us: float
    runs: int
    sm_mhz: int = 0
    memory_mhz: int = 0
    watts: float = 0.0
    throttle: str = ""

    @property
    def seconds(self) -> float:
        """Median time of a call."""
        return self.median_us * 1e-6

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth that the kernel achieved, bytes a second."""
        return self.bytes / self.seconds


_POINT = tuple(f.name for f in fields(Point))
_NUMBERS = tuple(f.name for f in fields(KernelRow) if f.name != "point")
COLUMNS = (*_POINT, *_NUMBERS)
_TEXTS = ("op", "kernel", "execution", "number_format", "spread", "l2", "version", "throttle")
_FLOATS = ("p10_us", "median_us", "p90_us", "watts")
_LARGEST = 10**18
_ABOVE_ZERO = ("p10_us", "median_us", "p90_us", "runs")


class RowWriter:
    """Appends rows to a table and flushes each to the disk. Context manager.

    Args:
        path: the table; made with its header if it is not there. A last line that a killed run
            left unfinished is cut off.

    Raises:
        KvtuneError: what is there is no kernel table.
    """

    def __init__(self, path: Path) -> None:
        self.done = _recover(path)
        new = not path.exists()
        self._file = path.open("a", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        if new:
            self._csv.writeheader()
            self._flush()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: KernelRow) -> None:
        """Append one row; it is on the disk when this returns."""
        self._csv.writerow(_plain(row))
        self._flush()
        self.done.add(row.point)

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def read_rows(path: Path) -> tuple[KernelRow, ...]:
    """All rows of a table; strict.

    Raises:
        KvtuneError: a column or a number is missing, negative or of the wrong kind; with its line.
    """
    return parse_rows(read_text(path).splitlines(), str(path))


def parse_rows(lines: Iterable[str], file: str) -> tuple[KernelRow, ...]:
    """The rows of a table's text; see :func:`read_rows`."""
    reader = csv.DictReader(lines)
    try:
        return tuple(_distinct(_rows(reader, file), file))
    except csv.Error as error:
        raise KvtuneError(f"is no CSV ({error})", where=f"{file}:{reader.line_num}") from error


def _check_header(header: tuple[str, ...], file: str) -> None:
    for column in header:
        if column not in COLUMNS:
            raise KvtuneError(f"{column!r} is no column. {nearest(column, COLUMNS)}", where=file)
    for column in COLUMNS:
        if column not in header:
            raise KvtuneError(f"the column {column!r} is missing", where=f"{file}:1")
    if len(header) > len(COLUMNS):
        raise KvtuneError("a column stands here twice", where=f"{file}:1")


def _rows(reader: csv.DictReader[str], file: str) -> Iterator[tuple[str, KernelRow]]:
    _check_header(tuple(reader.fieldnames or ()), file)
    for record in reader:
        where = f"{file}:{reader.line_num}"
        yield where, _row(record, where)


def _distinct(rows: Iterable[tuple[str, KernelRow]], file: str) -> Iterator[KernelRow]:
    seen: set[Point] = set()
    for where, row in rows:
        if row.point in seen:
            raise KvtuneError(f"this point of {row.point.op!r} stands here twice", where=where)
        seen.add(row.point)
        yield row


def _row(record: dict[str, str | None], where: str) -> KernelRow:
    if len(record) > len(COLUMNS):
        raise KvtuneError("has more cells than there are columns", where=where)
    values = {column: _value(column, record.get(column), where) for column in COLUMNS}
    if not values["p10_us"] <= values["median_us"] <= values["p90_us"]:
        raise KvtuneError("'p10_us', 'median_us' and 'p90_us' must not fall", where=where)
    return KernelRow(
        Point(**{name: values[name] for name in _POINT}),
        **{name: values[name] for name in _NUMBERS},
    )


def _value(column: str, text: str | None, where: str) -> Any:
    if text is None or (text == "" and column != "throttle"):
        raise KvtuneError(f"the number of {column!r} is missing", where=where)
    if column in _TEXTS:
        if column in _CHOICES and text not in _CHOICES[column]:
            known = " or ".join(_CHOICES[column])
            raise KvtuneError(f"{column!r} must be {known}, not {text!r}", where=where)
        return text
    try:
        number = float(text) if column in _FLOATS else int(text)
    except ValueError as error:
        raise KvtuneError(f"{column!r} must be a number, not {text[:24]!r}", where=where) from error
    if not 0 <= number <= _LARGEST or (column in _ABOVE_ZERO and number == 0):
        raise KvtuneError(
            f"{column!r} must be above zero and at most {_LARGEST:.0e}, not {text[:24]}",
            where=where,
        )
    return number


def _plain(row: KernelRow) -> dict[str, Any]:
    values = asdict(row)
    values.update(values.pop("point"))
    return {
        name: f"{value:.4f}" if isinstance(value, float) else value
        for name, value in values.items()
    }


def _recover(path: Path) -> set[Point]:
    """Points of the finished rows; cuts off what a killed run left of its last line."""
    if not path.exists():
        return set()
    text = read_text(path)
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        path.unlink()
        return set()
    if whole != text:
        write_text(path, whole)
    return {row.point for row in parse_rows(whole.splitlines(), str(path))}
