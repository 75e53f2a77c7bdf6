"""Rotary positions of stored keys and queries: turned on, back, or to their mean."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


QUERIES_LEFT_OUT = 4
"""First prompt queries that ``query_moments`` and ``later_queries`` leave out."""

LATER_QUERIES = 512
_LATER_POSITIONS = 128


class Rope(Protocol):
    """One rotary embedding: pairs (i, i + R/2) of the first R dimensions turn together."""

    @property
    def inverse_frequencies(self) -> Sequence[float]:
        """Radians a position for each pair, ``[R / 2]``."""
        ...

    @property
    def attention_factor(self) -> float:
        """What the model multiplies cos and sin with (YaRN and its kin)."""
        ...


def turn(vectors: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Rotate post-RoPE vectors by ``positions`` steps; negative steps turn back.

    Exact for every fixed frequency table; the attention factor is left as it is.

    Args:
        vectors: ``[..., T, D]`` float32.
        positions: steps, broadcasts to ``[..., T]``.
        rope: of the layer.
    """
    cos, sin = _waves(positions, rope)
    return _apply(vectors, cos, sin)


def mean_turn(vectors: Tensor, first: int, count: int, rope: Rope) -> Tensor:
    """The mean of ``vectors`` ``[..., D]`` rotated to ``count`` positions from ``first`` on."""
    import torch

    at = torch.arange(first, first + count, device=vectors.device)
    cos, sin = _waves(at, rope)
    return _apply(vectors, cos.mean(0), sin.mean(0))


def query_moments(queries: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of a prompt's queries before RoPE.

    The first few queries are outliers and left out, unless there are no others.

    Args:
        queries: of the whole prompt, after RoPE, ``[Hq, P, D]``.
        rope: of the layer, or None.

    Returns:
        ``[Hq, D]`` and ``[Hq, D, D]`` float32.
    """
    import torch

    first = min(QUERIES_LEFT_OUT, queries.shape[1] - 1)
    plain = queries[:, first:].float()
    if rope is not None:
        at = torch.arange(first, queries.shape[1], device=queries.device)
        plain = turn(plain, -at, rope) / rope.attention_factor
    mean = plain.mean(1)
    centred = plain - mean[:, None]
    return mean, centred.transpose(-1, -2) @ centred / plain.shape[1]


def later_queries(queries: Tensor, rope: Rope | None, most: int = LATER_QUERIES) -> Tensor:
    """A sample of a prompt's queries, each turned to a position right behind the prompt.

    They stand for the queries to come: alike in content, and as far from every key as those will
    be. The first few queries are outliers and left out, unless there are no others.

    Args:
        queries: of the whole prompt, after RoPE, ``[Hq, P, D]``.
        rope: of the layer, or None.
        most: queries.

    Returns:
        ``[Hq, n, D]`` float32, n at most ``most``, evenly spaced over the prompt.
    """
    import torch

    tokens = queries.shape[1]
    first = min(QUERIES_LEFT_OUT, tokens - 1)
    stride = -(-(tokens - first) // most)
    at = torch.arange(first + (tokens - 1 - first) % stride, tokens, stride, device=queries.device)
    sample = queries[:, at].float()
    if rope is None:
        return sample
    behind = tokens + torch.arange(len(at), device=at.device) % _LATER_POSITIONS
    return turn(sample, behind - at, rope)


def _waves(positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    frequencies = _on_device(tuple(rope.inverse_frequencies), positions.device)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Sent once: a decode step that turns keys would wait for the device each time."""
    import torch

    with torch.inference_mode(False):  # a pass with gradients may come later
        return torch.tensor(numbers, device=device)


def _apply(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    import torch

    half = cos.shape[-1]
    left, right, rest = vectors.split((half, half, vectors.shape[-1] - 2 * half), dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)
