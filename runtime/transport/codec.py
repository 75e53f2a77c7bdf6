"""CacheGen's codec: a prompt's keys and values quantised by layer and entropy-coded by channel.

After Liu et al., "CacheGen: KV Cache Compression and Streaming for Fast Large Language Model
Serving", SIGCOMM 2024, arXiv 2310.07240. Every token of a layer has a scale of its own; symbols of
a channel are range-coded with that channel's own frequencies, which travel with them and are
counted. As in the released code there is no delta unless asked for; with ``anchors`` every n-th
token is coded in 255 steps and those after it as differences from it as it is read back, so that
errors do not add up. Differs: steps follow each token's largest number also for differences, where
the paper's are fixed shares of a layer's deviation; frequencies are deflated, not offline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.runtime.transport.symbols import decode_symbols, encode_symbols

Floats = NDArray[np.float32]
_ANCHOR_BINS = 256
_FIRST_LAYERS = 2  # whose values have bins of their own, as in the released settings
_FEWEST_BINS = 4  # three symbols: less, nothing and more
_MOST_TOKENS = 65535  # of a chunk: frequencies are stored in 16 bits


@dataclass(frozen=True)
class Level:
    """How coarsely a chunk is quantised; of b bins, b - 1 symbols are used.

    Args:
        name: for people.
        key_bins: of the first, middle and last third of the layers.
        value_bins: of the first two layers, and of all others.
        anchors: every how many tokens one is an anchor; 0 codes every token by itself.
    """

    name: str
    key_bins: tuple[int, int, int]
    value_bins: tuple[int, int]
    anchors: int = 0

    def __post_init__(self) -> None:
        bins = (*self.key_bins, *self.value_bins)
        if min(bins) < _FEWEST_BINS or self.anchors < 0:
            raise KvtuneError(
                f"a level of {min(bins)} bins with an anchor every {self.anchors} tokens",
                hint=f"give {_FEWEST_BINS} bins at least, and 0 for no anchors.",
            )

    def bins(self, role: str, layer: int, layers: int) -> int:
        """How many levels a layer's keys or values are rounded to."""
        if role == "keys":
            return self.key_bins[3 * layer // layers]
        return self.value_bins[layer >= _FIRST_LAYERS]


LEVELS = (
    Level("fine", (32, 32, 32), (32, 32)),
    Level("medium", (32, 16, 16), (32, 16)),
    Level("coarse", (16, 16, 12), (16, 12)),
)
"""The released settings, best first."""


@dataclass(frozen=True)
class Encoded:
    """A chunk of a prompt, encoded.

    Args:
        level: how.
        shape: layers, KV heads, tokens, head size.
        buffers: by layer, role and kind (``3.keys.words``); their bytes are what travels.
    """

    level: Level
    shape: tuple[int, int, int, int]
    buffers: Mapping[str, NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """How many bytes travel."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def bits_an_element(self) -> float:
        """Bits an element takes on average, keys and values together."""
        return 8 * self.nbytes / (2 * float(np.prod(self.shape)))


def encode(keys: Floats, values: Floats, level: Level) -> Encoded:
    """Quantise and entropy-code a chunk.

    Args:
        keys: ``[L, H, T, D]`` float32, after RoPE.
        values: likewise.
        level: how coarsely.

    Raises:
        KvtuneError: too many tokens, or ``constriction`` is not installed.
    """
    layers, _, tokens, _ = keys.shape
    if tokens > _MOST_TOKENS:
        raise KvtuneError(
            f"a chunk of {tokens:,} tokens, of which {_MOST_TOKENS:,} are the most",
            hint="encode the prompt in chunks.",
        )
    buffers: dict[str, NDArray[Any]] = {}
    for role, tensor in (("keys", keys), ("values", values)):
        for layer in range(layers):
            plane = tensor[layer].transpose(1, 0, 2).reshape(tokens, -1)  # [T, H D]
            bins = level.bins(role, layer, layers)
            for kind, buffer in _encode_plane(plane, bins, level.anchors).items():
                buffers[f"{layer}.{role}.{kind}"] = buffer
    return Encoded(level, keys.shape, buffers)


def decode(encoded: Encoded) -> tuple[Floats, Floats]:
    """Keys and values ``[L, H, T, D]`` float32."""
    layers, heads, tokens, size = encoded.shape
    found = []
    for role in ("keys", "values"):
        planes = []
        for layer in range(layers):
            prefix = f"{layer}.{role}."
            mine = {
                name.removeprefix(prefix): buffer
                for name, buffer in encoded.buffers.items()
                if name.startswith(prefix)
            }
            bins = encoded.level.bins(role, layer, layers)
            plane = _decode_plane(mine, tokens, heads * size, bins, encoded.level.anchors)
            planes.append(plane.reshape(tokens, heads, size).transpose(1, 0, 2))
        found.append(np.stack(planes))
    return found[0], found[1]


def _encode_plane(plane: Floats, bins: int, anchors: int) -> dict[str, NDArray[Any]]:
    """One layer's keys or values ``[T, C]``."""
    if not anchors:
        return _encode_rows(plane, bins)
    first = _encode_rows(plane[::anchors], _ANCHOR_BINS)
    read = _decode_rows(first, len(plane[::anchors]), plane.shape[1], _ANCHOR_BINS)
    follow = np.arange(len(plane)) % anchors != 0
    between = plane[follow] - np.repeat(read, anchors, 0)[: len(plane)][follow]
    return {f"anchor_{kind}": x for kind, x in first.items()} | _encode_rows(between, bins)


def _decode_plane(
    buffers: Mapping[str, NDArray[Any]], tokens: int, channels: int, bins: int, anchors: int
) -> Floats:
    if not anchors:
        return _decode_rows(buffers, tokens, channels, bins)
    first = {name[7:]: x for name, x in buffers.items() if name.startswith("anchor_")}
    read = _decode_rows(first, -(-tokens // anchors), channels, _ANCHOR_BINS)
    plane = np.repeat(read, anchors, 0)[:tokens]
    follow = np.arange(tokens) % anchors != 0
    plane[follow] += _decode_rows(buffers, int(follow.sum()), channels, bins)
    return plane


def _encode_rows(rows: Floats, bins: int) -> dict[str, NDArray[Any]]:
    """Symbols of ``[T, C]``, range-coded channel by channel; a scale a token."""
    half = bins // 2 - 1
    scales = np.abs(rows).max(1, initial=0).astype(np.float16)
    safe = np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
    symbols = np.rint(rows * half / safe).clip(-half, half).astype(np.int32) + half
    return {"scales": scales, **encode_symbols(symbols, 2 * half + 1)}


def _decode_rows(
    buffers: Mapping[str, NDArray[Any]], tokens: int, channels: int, bins: int
) -> Floats:
    half = bins // 2 - 1
    if not tokens:
        return np.zeros((0, channels), np.float32)
    symbols = decode_symbols(buffers, tokens, channels, 2 * half + 1)
    scales = buffers["scales"].astype(np.float32)[:, None]
    return ((symbols - half) * (scales / half)).astype(np.float32)


def joined(chunks: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Keys and values of a prompt from those of its chunks, in order."""
    return tuple(np.concatenate(each, 2) for each in zip(*chunks, strict=True))  # type: ignore[return-value]
