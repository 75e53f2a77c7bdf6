"""Transform coding of a head: its principal directions in even steps, entropy-coded one by one.

x = m + B z, B the eigenvectors of the covariance of a head's keys or values; symbols = round(z / s)
with one step s for all directions of a head, which loses least at a given rate (Huang and
Schultheiss, "Block Quantization of Correlated Gaussian Random Variables", 1963, and Gish and
Pierce, "Asymptotically Efficient Quantizing", 1968). The first tokens, the sinks, stay in 16 bits:
their keys would take a direction each. Basis and mean travel with the head and are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.runtime.transport.symbols import Symbols, decode_symbols, encode_symbols, least_bytes

Floats = NDArray[np.float32]
SINKS = 4
_LARGEST = 127  # of the basis, in 8 bits
_FURTHEST = 1000  # steps from the mean that are told apart


@dataclass(frozen=True)
class Head:
    """One head's keys or values but for the sinks, before entropy coding.

    Args:
        symbols: ``[T, D]`` from 0 on.
        count: how many different symbols there may be.
        first: what each direction's symbol 0 stands for, in steps.
        step: of all directions, float32 that 16 bits hold.
        mean: ``[D]``.
        basis: ``[D, D]`` int8.
        columns: its scales ``[D]``.
    """

    symbols: Symbols
    count: int
    first: NDArray[np.int16]
    step: NDArray[np.float16]
    mean: NDArray[np.float16]
    basis: NDArray[np.int8]
    columns: NDArray[np.float16]

    @property
    def nbytes(self) -> int:
        """Of all but the symbols."""
        rest = (self.first, self.step, self.mean, self.basis, self.columns)
        return sum(each.nbytes for each in rest) + 2  # and the count

    @property
    def least_bytes(self) -> int:
        """With an ideal coder's symbols."""
        return self.nbytes + least_bytes(self.symbols, self.count)

    def read(self) -> Floats:
        """What the symbols stand for, ``[T, D]``."""
        steps = (self.symbols + self.first).astype(np.float32)
        basis = self.basis * self.columns.astype(np.float32)
        read: Floats = steps * self.step.astype(np.float32) @ basis.T + self.mean
        return read.astype(np.float32)


def quantised(rows: Floats, step: float) -> Head:
    """A head's ``[T, D]``, in steps of ``step`` root mean squares around its mean."""
    mean = rows.mean(0).astype(np.float16)
    centred = rows - mean.astype(np.float32)
    covariance = centred.T.astype(np.float64) @ centred
    basis = np.linalg.eigh(covariance)[1][:, ::-1]
    columns = (np.abs(basis).max(0) / _LARGEST).astype(np.float16)
    whole = np.rint(basis / columns).clip(-_LARGEST, _LARGEST).astype(np.int8)
    own = whole * columns.astype(np.float64)
    z = np.linalg.solve(own, centred.T).T  # in the basis as it is stored
    size = np.float16(step * np.sqrt(np.square(centred).mean()))
    steps = np.rint(z / (float(size) or 1.0)).clip(-_FURTHEST, _FURTHEST).astype(np.int32)
    first = steps.min(0)
    symbols = steps - first
    count = max(int(symbols.max()) + 1, 2)
    rest = np.array([size]), mean, whole, columns
    return Head(symbols, count, first.astype(np.int16), *rest)


def encode_directions(tensor: Floats, step: float) -> dict[str, NDArray[Any]]:
    """One layer's keys or values ``[H, T, D]``.

    Raises:
        KvtuneError: ``constriction`` is not installed.
    """
    buffers: dict[str, NDArray[Any]] = {"sinks": tensor[:, :SINKS].astype(np.float16)}
    for number, rows in enumerate(tensor[:, SINKS:]):
        if not len(rows):
            continue
        head = quantised(rows, step)
        made: dict[str, NDArray[Any]] = {
            "first": head.first, "step": head.step, "mean": head.mean, "basis": head.basis,
            "columns": head.columns, "count": np.array([head.count], np.int16),
        }  # fmt: skip
        for name, buffer in {**made, **encode_symbols(head.symbols, head.count)}.items():
            buffers[f"{number}.{name}"] = buffer
    return buffers


def decode_directions(
    buffers: Mapping[str, NDArray[Any]], heads: int, tokens: int, size: int
) -> Floats:
    """What ``encode_directions`` was given, as its symbols tell it."""
    found = np.zeros((heads, tokens, size), np.float32)
    found[:, :SINKS] = buffers["sinks"]
    for number in range(heads if tokens > SINKS else 0):
        prefix = f"{number}."
        own = {
            name.removeprefix(prefix): buffer
            for name, buffer in buffers.items()
            if name.startswith(prefix)
        }
        count = int(own["count"][0])
        symbols = decode_symbols(own, tokens - SINKS, size, count)
        rest = (own[name] for name in ("first", "step", "mean", "basis", "columns"))
        found[number, SINKS:] = Head(symbols, count, *rest).read()
    return found
