"""The bytes of single tokens in pages whose tokens share nothing: one is moved by copying them.

Keys by token, values, and numbers in 16 bits lie so. Of three bits, the tokens t and t + 32 share
the bytes of a plane, each with bits of its own there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvtune.policies.page_formats import PAGE, bits, code_bytes, fields, token_groups
from kvtune.policies.pages import PageLayout

HALF = PAGE // 2
PLANE_BITS = 0b01010101
"""Those of a plane's byte that are the first of its two tokens'."""


@dataclass(frozen=True)
class TokenBytes:
    """Places of each token's bytes in a page.

    Args:
        whole: ``[64, n]`` int32, of bytes that no other token has a part in.
        plane: ``[64, m]`` int32, of bytes that the tokens t and t + 32 share; m may be 0.
    """

    whole: Tensor
    plane: Tensor


@dataclass(frozen=True)
class Copies:
    """Tokens on their way between pages of one layout. Tokens are named as ``token_at`` does.

    Args:
        source: memory that they are read from, ``[bytes]`` uint8.
        target: memory that they are written to; may be the same.
        sources: ``[n]`` int64; negative where nothing is copied.
        targets: ``[n]`` int64, none of which is another's source.
        layout: of the pages.
    """

    source: Tensor
    target: Tensor
    sources: Tensor
    targets: Tensor
    layout: PageLayout


def token_at(cells: Tensor, places: Tensor) -> Tensor:
    """The number of a token in a pool, from its page's first cell and its place in the page."""
    return cells.long() * PAGE + places


@lru_cache(maxsize=64)
def token_bytes(layout: PageLayout, device: torch.device) -> TokenBytes:
    """Where the bytes of a page's tokens lie."""
    found = [
        _of_tensor(layout.keys, 0, layout.key_scales, layout.head_dim, False),
        _of_tensor(layout.values, layout.value_codes, layout.value_scales, layout.head_dim, True),
    ]
    whole, plane = (torch.cat(parts, 1).int().to(device) for parts in zip(*found, strict=True))
    return TokenBytes(whole, plane)


def copy_tokens(copies: Copies) -> None:
    """In plain torch; waits for the device, so that kernels copy there."""
    real = copies.sources >= 0
    sources, targets = copies.sources[real], copies.targets[real]
    where, cell_bytes = token_bytes(copies.layout, sources.device), copies.layout.cell_bytes

    def bytes_at(tokens: Tensor, places: Tensor) -> Tensor:
        return tokens[:, None] // PAGE * cell_bytes + places[tokens % PAGE]

    read, shared = (copies.source[bytes_at(sources, x)] for x in (where.whole, where.plane))
    copies.target[bytes_at(targets, where.whole)] = read
    if not where.plane.shape[1]:
        return
    theirs = (shared >> (sources % PAGE // HALF)[:, None].byte()) & PLANE_BITS
    for half in range(2):  # two tokens that share bytes never at once
        mine = targets % PAGE // HALF == half
        at = bytes_at(targets[mine], where.plane)
        others = copies.target[at] & ~(PLANE_BITS << half) & 0xFF
        copies.target[at] = others | (theirs[mine] << half)


def _of_tensor(
    name: str, codes_at: int, scales_at: int, head_dim: int, across: bool
) -> tuple[Tensor, Tensor]:
    """Places of each token's bytes of keys or values, whole and shared, ``[64, n]`` each.

    Args:
        name: of the format.
        codes_at: the first byte of the codes.
        scales_at: of the scales.
        head_dim: D.
        across: whether codes lie channel by channel, as values' do.
    """
    token = torch.arange(PAGE)[:, None]
    none = torch.empty(PAGE, 0, dtype=torch.int64)
    if name == "bf16":
        row = 2 * head_dim
        return codes_at + token * row + torch.arange(row), none
    width = head_dim // fields(name)
    pairs = _along(token % HALF, torch.arange(width), width, across)
    codes = codes_at + 2 * pairs + token // HALF
    halves = _along(token % HALF, torch.arange(2 * token_groups(head_dim)), 0, True)
    scales = scales_at + 2 * (2 * halves + token // HALF)
    both = torch.cat([codes, scales, scales + 1], 1)
    if bits(name) != 3:
        return both, none
    plane = codes_at + 2 * code_bytes(name, head_dim) // 3
    return both, plane + pairs


def _along(token: Tensor, channel: Tensor, width: int, across: bool) -> Tensor:
    """Numbers of units, of which a token has one a channel."""
    return channel * HALF + token if across else token * width + channel
