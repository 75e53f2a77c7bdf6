"""Keys or values in blocks, in plain torch: written into pages and read back, n pages at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.policies.blocks import SCALES
from kvtune.policies.page_formats import PAGE, block_form, blocks_of
from kvtune.runtime.kernels.reference_codes import by_token, by_unit, lay_codes, read_codes

_TYPES = {
    "half": torch.float16, "half_zero": torch.float16, "single": torch.float32,
    "single_zero": torch.float32, "power": torch.uint8, "e4m3": torch.float8_e4m3fn,
}  # fmt: skip
SHARE_OF_FP8 = 1 / 6
"""What multiplies a head's scales is its fp8 scale times this, for codes of e2m1 up to 6."""


def lay_blocks(rows: Tensor, name: str, heads: Tensor, dim: int) -> Tensor:
    """Codes and scales of whole pages as they lie, ``[n, bytes]`` uint8.

    Args:
        rows: ``[n, 64, D]`` float32.
        name: of the format.
        heads: ``[n]`` float32, the fp8 scale of each one's head.
        dim: 0 for keys, 1 for values.
    """
    shared = None if blocks_of(name).scales != "e4m3" else heads[:, None, None] * SHARE_OF_FP8
    fit = block_form(name).fit(rows.float(), shared)
    laid = [lay_codes(fit.codes, blocks_of(name).bits, dim)]
    laid += [by_unit(scale.mT).contiguous().view(torch.uint8).flatten(1) for scale in fit.scales]
    return torch.cat(laid, 1)


def read_blocks(codes: Tensor, beside: Tensor, name: str, heads: Tensor, dim: int) -> Tensor:
    """What ``lay_blocks`` laid, ``[n, 64, D]`` float32.

    Args:
        codes: ``[n, bytes]`` uint8.
        beside: ``[n, at least their bytes]``, the scales behind them.
        name: of the format.
        heads: as they were.
        dim: likewise.
    """
    blocks = blocks_of(name)
    numbers = read_codes(codes, blocks.bits, dim)
    scales: list[Tensor] = []
    if blocks.scales != "none":
        size = PAGE * blocks.count(numbers.shape[-1]) * SCALES[blocks.scales]
        laid = beside[:, :size].contiguous().view(_TYPES[blocks.scales])
        parts = 2 if blocks.scales == "half_zero" else 1
        scales = [by_token(x.view(len(laid), -1, PAGE)).mT for x in laid.chunk(parts, 1)]
    rows = blocks.numbers(numbers, scales)
    return rows if blocks.scales != "e4m3" else rows * (heads[:, None, None] * SHARE_OF_FP8)
