"""What the kernels must compute, in plain torch: pages written and read, attention, rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.page_formats import (
    CLIP,
    PAGE,
    bits,
    code_bytes,
    fields,
    is_blocks,
    is_by_token,
    is_rotated,
    token_groups,
)
from kvtune.policies.pages import PageLayout
from kvtune.runtime.kernels.reference_blocks import lay_blocks, read_blocks
from kvtune.runtime.kernels.reference_codes import by_token, by_unit, lay_codes, read_codes

LARGEST_E4M3 = 448.0


def fp8_scale(largest: Tensor) -> Tensor:
    """The scale of fp8 tensors by their largest magnitudes, float32: these over 448."""
    return largest.float().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_E4M3


def write_page(keys: Tensor, values: Tensor, layout: PageLayout, scales: Tensor) -> Tensor:
    """A page's bytes ``[page_bytes]`` uint8.

    Args:
        keys: ``[n, D]``, as many as a page holds or fewer.
        values: ``[n, D]``.
        layout: how the page lies.
        scales: ``[2]`` float32, of fp8 keys and values.
    """
    page = torch.zeros(layout.page_bytes, dtype=torch.uint8, device=keys.device)
    for name, rows, at, scales_at, scale, dim in (
        (layout.keys, keys, 0, layout.key_scales, scales[0], 0),
        (layout.values, values, layout.value_codes, layout.value_scales, scales[1], 1),
    ):
        if is_blocks(name):
            filled = rows[torch.arange(PAGE, device=rows.device).clamp_max(len(rows) - 1)]
            laid = lay_blocks(filled[None], name, scale[None], dim)[0]
            page[at : at + len(laid)] = laid
            continue
        turned = hadamard(rows.float()) if is_rotated(name) else rows
        padded = F.pad(turned, (0, 0, 0, layout.page_tokens - len(rows)))
        codes, beside = _encode(padded, len(rows), name, scale, dim)
        page[at : at + code_bytes(name, layout.head_dim, layout.page_tokens)] = codes
        page[scales_at : scales_at + beside.numel()] = beside
    return page


def read_page(page: Tensor, layout: PageLayout, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Both of ``write_page``, ``[tokens, D]`` float32, rotated back; beyond n anything."""
    keys, values = read_pages(page[None], layout, scales[None])
    return keys[0], values[0]


def read_pages(pages: Tensor, layout: PageLayout, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Decode the keys and values of several pages of one layout.

    Args:
        pages: ``[n, page_bytes]`` uint8.
        layout: how each lies.
        scales: ``[n, 2]`` float32, of fp8 keys and values.

    Returns:
        Keys and values ``[n, tokens, D]`` float32.
    """
    codes, beside = pages[:, : layout.key_scales], pages[:, layout.key_scales :]
    keys = _decode(codes, beside, layout.keys, scales[:, 0], 0, layout.head_dim)
    codes, beside = (
        pages[:, layout.value_codes : layout.value_scales],
        pages[:, layout.value_scales :],
    )
    values = _decode(codes, beside, layout.values, scales[:, 1], 1, layout.head_dim)
    return (
        hadamard(keys) if is_rotated(layout.keys) else keys,
        hadamard(values) if is_rotated(layout.values) else values,
    )


@dataclass(frozen=True)
class _Groups:
    """Scale and offset of codes: ``[..., D]`` by channel, ``[..., g, 64]`` by token."""

    scale: Tensor
    offset: Tensor

    def spread(self, dim: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Both as float32 that broadcasts to ``[..., 64, D]``; by channel if ``dim`` is 0."""
        scale, offset = self.scale.float(), self.offset.float()
        if dim == 0:
            return scale.unsqueeze(-2), offset.unsqueeze(-2)
        scale, offset = scale.mT, offset.mT
        if head_dim <= PAGE:
            return scale, offset
        wide = [x.repeat_interleave(PAGE, -1)[..., :head_dim] for x in (scale, offset)]
        return wide[0], wide[1]


def _encode(
    padded: Tensor, count: int, name: str, scale: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a page's rows, of which ``count`` are tokens and the others zeros."""
    none = padded.new_zeros(0, dtype=torch.uint8)
    if name == "bf16":
        return padded.bfloat16().view(torch.uint8).flatten(), none
    if name == "fp8":
        codes = (padded.float() / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        codes = codes.to(torch.float8_e4m3fn).view(torch.uint8)
        return (codes if dim == 0 else codes.T).flatten(), none
    levels, over = 2 ** bits(name) - 1, _reduced(name, dim)
    clip = CLIP[bits(name)] if is_rotated(name) else 1.0
    groups = _ranges(padded[:count].float(), levels, over, clip)
    step, offset = groups.spread(over, padded.shape[1])
    step = torch.where(step > 0, step, 1)
    codes = ((padded.float() - offset) / step).round().clamp(0, levels).to(torch.uint8)
    both = torch.cat([_by_unit(x, fields(name), over) for x in (groups.scale, groups.offset)])
    return lay_codes(codes[None], bits(name), dim)[0], both.view(torch.uint8)


def _reduced(name: str, dim: int) -> int:
    """The axis of ``[64, D]`` that a group lies along; ``dim`` is 0 of keys and 1 of values."""
    return 1 if is_by_token(name) else dim


def _ranges(rows: Tensor, levels: int, dim: int, clip: float) -> _Groups:
    if dim == 0:
        low, high = rows.amin(0), rows.amax(0)
    else:
        groups = F.pad(rows, (0, 0, 0, PAGE - len(rows))).split(PAGE, dim=1)
        low = torch.stack([x.amin(1) for x in groups])
        high = torch.stack([x.amax(1) for x in groups])
    drawn_in = (high - low) * ((1 - clip) / 2)
    low, high = low + drawn_in, high - drawn_in
    offset = low.half()
    return _Groups(((high - offset.float()) / levels).half(), offset)


def _decode(
    codes: Tensor, beside: Tensor, name: str, scale: Tensor, dim: int, head_dim: int
) -> Tensor:
    """Rows ``[n, tokens, D]`` float32 of n pages' codes and of the scales beside them."""
    if is_blocks(name):
        return read_blocks(codes, beside, name, scale, dim)
    many = len(codes)
    if name == "bf16":
        return codes.view(torch.bfloat16).float().view(many, -1, head_dim)
    if name == "fp8":
        shape = (many, PAGE, -1) if dim == 0 else (many, -1, PAGE)
        rows = codes.reshape(shape) if dim == 0 else codes.reshape(shape).mT.contiguous()
        return rows.view(torch.float8_e4m3fn).float() * scale[:, None, None]
    steps = read_codes(codes, bits(name), dim).float()
    over = _reduced(name, dim)
    count = head_dim if over == 0 else token_groups(head_dim) * PAGE
    laid = beside[:, : 4 * count].contiguous().view(torch.float16).view(2 * many, count)
    both = _by_token(laid.float(), fields(name), over)
    step, offset = _Groups(*both.unflatten(0, (many, 2)).unbind(1)).spread(over, head_dim)
    return torch.addcmul(offset, steps, step)


def _by_unit(scales: Tensor, count: int, dim: int) -> Tensor:
    """Scales as their codes lie: by channel by byte, then field of ``count``; by token by unit."""
    return scales.view(count, -1).T.flatten() if dim == 0 else by_unit(scales).flatten()


def _by_token(laid: Tensor, count: int, dim: int) -> Tensor:
    """What ``_by_unit`` laid in each of n pages: ``[n, D]`` by channel, ``[n, g, 64]`` by token."""
    many = len(laid)
    if dim == 0:
        return laid.view(many, -1, count).mT.flatten(1)
    return by_token(laid.view(many, -1, PAGE))


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[G, D]`` and log-sum-exp ``[G]`` of one head, in the tensors' own precision."""
    logits = q @ keys.T * scale
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, H, T, D]`` by ``[B or 1, T, D]``, in float32, rounded once."""
    first, second = heads.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (heads.float() * cos[:, None].float() + turned * sin[:, None].float()).to(heads.dtype)
