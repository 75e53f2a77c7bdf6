"""Copying single tokens between pages whose tokens share no scale; see ``cache.token_bytes``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from kvtune.runtime.cache.token_bytes import token_bytes
from kvtune.runtime.kernels.codes import HALF, PAGE

if TYPE_CHECKING:
    from kvtune.runtime.cache.token_bytes import Copies

ALL = -1
PLANE_BITS = tl.constexpr(85)  # every second bit, from the first one on


@triton.jit
def copy_token(
    source, target, sources, targets, whole, plane,
    CELL: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    SHARED: tl.constexpr, SHARED_BLOCK: tl.constexpr, ONLY: tl.constexpr,
):  # fmt: skip
    """One token.

    Args:
        source, target: memory, uint8.
        sources, targets: [n] int64 tokens, 64 to a cell; of a negative source nothing is copied.
        whole, plane: [64, COUNT] and [64, SHARED] int32 places of each token's bytes in a page.
        CELL: bytes.
        BLOCK, SHARED_BLOCK: powers of two that are no smaller.
        ONLY: half of a page in which targets are written, since tokens of both share the bytes of a
            plane; -1 for all.
    """
    move = tl.program_id(0)
    read, written = tl.load(sources + move), tl.load(targets + move)
    slot, place = read % PAGE, written % PAGE
    if ONLY >= 0:
        read = tl.where(place // HALF == ONLY, read, -1)
    if read >= 0:
        source += read // PAGE * CELL
        target += written // PAGE * CELL
        byte = tl.arange(0, BLOCK)
        real = byte < COUNT
        found = tl.load(source + tl.load(whole + slot * COUNT + byte, mask=real), mask=real)
        tl.store(target + tl.load(whole + place * COUNT + byte, mask=real), found, mask=real)
        if SHARED > 0:
            byte = tl.arange(0, SHARED_BLOCK)
            real = byte < SHARED
            found = tl.load(source + tl.load(plane + slot * SHARED + byte, mask=real), mask=real)
            own = (found.to(tl.int32) >> (slot // HALF).to(tl.int32)) & PLANE_BITS
            at = target + tl.load(plane + place * SHARED + byte, mask=real)
            upper = (place // HALF).to(tl.int32)
            others = tl.load(at, mask=real).to(tl.int32) & (255 - (PLANE_BITS << upper))
            tl.store(at, (others | (own << upper)).to(tl.uint8), mask=real)


def launch(copies: Copies) -> None:
    """Copy all tokens; in two launches where tokens share bytes."""
    where = token_bytes(copies.layout, copies.target.device)
    count, shared = where.whole.shape[1], where.plane.shape[1]
    for only in (0, 1) if shared else (ALL,):
        copy_token[(len(copies.sources),)](
            copies.source, copies.target, copies.sources, copies.targets, where.whole, where.plane,
            copies.layout.cell_bytes, count, triton.next_power_of_2(count),
            shared, triton.next_power_of_2(max(shared, 1)), only, num_warps=1,
        )  # fmt: skip
