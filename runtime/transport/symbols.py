"""Entropy coding of small whole numbers, channel by channel, each by its own frequencies."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError

Symbols = NDArray[np.int32]
Buffers = dict[str, NDArray[Any]]


def encode_symbols(symbols: Symbols, count: int) -> Buffers:
    """Range-code ``[T, C]`` symbols from 0 to ``count - 1``; frequencies travel deflated.

    Raises:
        KvtuneError: ``constriction`` is not installed.
    """
    counts = frequencies(symbols, count)
    encoder = _constriction().stream.queue.RangeEncoder()
    for channel, of_channel in zip(symbols.T, counts, strict=True):
        if len(channel):
            encoder.encode(np.ascontiguousarray(channel), _model(of_channel))
    return {"counts": _deflated(counts), "words": encoder.get_compressed()}


def decode_symbols(
    buffers: Mapping[str, NDArray[Any]], tokens: int, channels: int, count: int
) -> Symbols:
    """What ``encode_symbols`` was given, ``[T, C]``."""
    unpacked = zlib.decompress(buffers["counts"].tobytes())
    counts = np.frombuffer(unpacked, np.uint16).reshape(channels, count)
    decoder = _constriction().stream.queue.RangeDecoder(buffers["words"])
    return np.stack([decoder.decode(_model(each), tokens) for each in counts], 1)


def least_bytes(symbols: Symbols, count: int) -> int:
    """Bytes of the frequencies and of an ideal coder's words: a bound, where there is no coder."""
    counts = frequencies(symbols, count)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with np.errstate(divide="ignore"):
        bits = -(counts * np.where(counts > 0, np.log2(share), 0)).sum()
    return _deflated(counts).nbytes + int(np.ceil(bits / 8))


def frequencies(symbols: Symbols, count: int) -> NDArray[np.uint16]:
    """How often each symbol occurs in each channel, ``[C, count]``."""
    found = [np.bincount(channel, minlength=count) for channel in symbols.T]
    return np.stack(found).astype(np.uint16)


def _deflated(counts: NDArray[np.uint16]) -> NDArray[np.uint8]:
    return np.frombuffer(zlib.compress(counts.tobytes(), 9), np.uint8)


def _model(counts: NDArray[np.uint16]) -> Any:
    """The same on both sides: frequencies of one channel."""
    model = _constriction().stream.model.Categorical
    return model((counts / counts.sum(dtype=np.float64)).astype(np.float32), perfect=False)


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise KvtuneError(
            "entropy coding needs the package constriction",
            hint="pip install 'kvtune[transport]'.",
        ) from error
    return constriction
