"""Codes and scales as they lie in pages, in plain torch: n pages at once, keys (dim 0) or values.

The tokens t and t + 32 of a page lie side by side; a byte holds channels that are D / fields apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.policies.page_formats import PAGE, field_bits

_HALF = PAGE // 2


def lay_codes(codes: Tensor, width: int, dim: int) -> Tensor:
    """Codes ``[n, 64, D]`` of ``width`` bits as they lie, ``[n, bytes]``; of three bits the third
    ones behind the others."""
    if width != 3:
        return _units(_pack(codes, width), dim)
    return torch.cat([_units(_pack(codes & 3, 2), dim), _third_units(codes >> 2, dim)], 1)


def read_codes(laid: Tensor, width: int, dim: int) -> Tensor:
    """What ``lay_codes`` laid in each of n pages, ``[n, 64, D]``."""
    if width != 3:
        return _unpack(_rows(laid, dim), width)
    lower, third = laid.split([2 * laid.shape[1] // 3, laid.shape[1] // 3], 1)
    return _unpack(_rows(lower, dim), 2) | (_third_rows(third, dim) << 2)


def by_unit(scales: Tensor) -> Tensor:
    """Scales by token ``[..., 64]`` as their tokens' codes lie."""
    units: Tensor = scales.unflatten(-1, (2, _HALF)).transpose(-1, -2).flatten(-2)
    return units


def by_token(laid: Tensor) -> Tensor:
    """What ``by_unit`` laid, ``[..., 64]``."""
    tokens: Tensor = laid.unflatten(-1, (_HALF, 2)).transpose(-1, -2).flatten(-2)
    return tokens


def _pack(codes: Tensor, width: int) -> Tensor:
    """``[n, 64, D]`` codes as ``[n, 64, D * width / 8]`` bytes, field by field."""
    parts = codes.chunk(8 // width, dim=-1)
    packed = torch.zeros_like(parts[0])
    for n, part in enumerate(parts):
        packed |= part << (n * width)
    return packed


def _unpack(packed: Tensor, width: int) -> Tensor:
    mask, last = 2**width - 1, 8 - width
    parts = [packed & mask, *((packed >> n) & mask for n in range(width, last, width))]
    return torch.cat([*parts, packed >> last] if last else parts, dim=-1)


def _units(packed: Tensor, dim: int) -> Tensor:
    """Bytes ``[n, 64, D / f]`` as they lie: tokens t and t + 32 side by side."""
    halves: Tensor = packed.unflatten(1, (2, _HALF))
    return halves.permute((0, 2, 3, 1) if dim == 0 else (0, 3, 2, 1)).flatten(1)


def _rows(laid: Tensor, dim: int) -> Tensor:
    """What ``_units`` laid in each of n pages, ``[n, 64, D / f]``."""
    many = len(laid)
    if dim == 0:
        return laid.reshape(many, _HALF, -1, 2).permute(0, 3, 1, 2).reshape(many, PAGE, -1)
    return laid.reshape(many, -1, _HALF, 2).permute(0, 3, 2, 1).reshape(many, PAGE, -1)


def _third_units(third: Tensor, dim: int) -> Tensor:
    """Single bits ``[n, 64, D]``: bit 2 f + h of byte (t, d) is that of token t + 32 h."""
    many = len(third)
    parts = third.reshape(many, 2, _HALF, 8 // field_bits(3), -1)
    laid = (parts << _places(parts)).sum((1, 3), dtype=torch.uint8)
    return (laid if dim == 0 else laid.mT).flatten(1)


def _third_rows(laid: Tensor, dim: int) -> Tensor:
    """What ``_third_units`` laid in each of n pages, ``[n, 64, D]``."""
    many = len(laid)
    shape = (many, _HALF, -1) if dim == 0 else (many, -1, _HALF)
    bytes_of = laid.reshape(shape) if dim == 0 else laid.reshape(shape).mT
    found = (bytes_of[:, None, :, None] >> _places(bytes_of)) & 1
    return found.reshape(many, PAGE, -1)


def _places(like: Tensor) -> Tensor:
    """Bits ``2 f + h`` of a byte, ``[h, 1, f, 1]``."""
    field, half = (torch.arange(n, dtype=like.dtype, device=like.device) for n in (4, 2))
    return 2 * field[:, None] + half[:, None, None, None]
