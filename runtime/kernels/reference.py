"""What the kernels must compute, in plain torch: pages written and read, attention, rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.pages import (
    CLIP,
    PAGE,
    PageLayout,
    bits,
    code_bytes,
    fields,
    is_by_token,
    is_rotated,
    token_groups,
)

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
    """The same of many pages of one layout at once.

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
    """Scale and offset of codes, fp16: ``[..., D]`` by channel, ``[..., g, 64]`` by token."""

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
    return _lay(codes, bits(name), dim), both.view(torch.uint8)


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
    many = len(codes)
    if name == "bf16":
        return codes.view(torch.bfloat16).float().view(many, -1, head_dim)
    if name == "fp8":
        shape = (many, PAGE, -1) if dim == 0 else (many, -1, PAGE)
        rows = codes.reshape(shape) if dim == 0 else codes.reshape(shape).mT.contiguous()
        return rows.view(torch.float8_e4m3fn).float() * scale[:, None, None]
    steps = _read(codes, bits(name), dim).float()
    over = _reduced(name, dim)
    count = head_dim if over == 0 else token_groups(head_dim) * PAGE
    laid = beside[:, : 4 * count].contiguous().view(torch.float16).view(many, 2, count)
    pair = [_by_token(x, fields(name), over) for x in laid.unbind(1)]
    step, offset = _Groups(pair[0], pair[1]).spread(over, head_dim)
    return torch.addcmul(offset, steps, step)


def _lay(codes: Tensor, width: int, dim: int) -> Tensor:
    """Codes ``[64, D]`` as they lie, flat; of three bits the third ones behind the others."""
    if width != 3:
        return _units(_pack(codes, width), dim)
    return torch.cat([_units(_pack(codes & 3, 2), dim), _third_units(codes >> 2, dim)])


def _read(laid: Tensor, width: int, dim: int) -> Tensor:
    """What ``_lay`` laid in each of n pages, ``[n, 64, D]``."""
    if width != 3:
        return _unpack(_rows(laid, dim), width)
    lower, third = laid.split([2 * laid.shape[1] // 3, laid.shape[1] // 3], 1)
    return _unpack(_rows(lower, dim), 2) | (_third_rows(third, dim) << 2)


def _third_units(bits_of: Tensor, dim: int) -> Tensor:
    """Single bits ``[64, D]``: bit 2 f + h of byte (t, d) is that of token t + 32 h."""
    parts = bits_of.view(2, PAGE // 2, 4, -1)  # [h, t, f, d]
    laid = (parts << _places(parts)).sum((0, 2), dtype=torch.uint8)
    return (laid if dim == 0 else laid.T).flatten()


def _third_rows(laid: Tensor, dim: int) -> Tensor:
    """What ``_third_units`` laid in each of n pages, ``[n, 64, D]``."""
    many, half = len(laid), PAGE // 2
    shape = (many, half, -1) if dim == 0 else (many, -1, half)
    bytes_of = laid.reshape(shape) if dim == 0 else laid.reshape(shape).mT
    found = (bytes_of[:, None, :, None] >> _places(bytes_of)) & 1
    return found.reshape(many, PAGE, -1)


def _places(like: Tensor) -> Tensor:
    """Bits ``2 f + h`` of a byte, ``[h, 1, f, 1]``."""
    field, half = (torch.arange(n, dtype=like.dtype, device=like.device) for n in (4, 2))
    return 2 * field[:, None] + half[:, None, None, None]


def _units(packed: Tensor, dim: int) -> Tensor:
    """Bytes ``[64, D / f]`` as they lie: tokens t and t + 32 side by side."""
    halves = packed.view(2, PAGE // 2, -1)
    return halves.permute((1, 2, 0) if dim == 0 else (2, 1, 0)).flatten()


def _rows(laid: Tensor, dim: int) -> Tensor:
    """What ``_units`` laid in each of n pages, ``[n, 64, D / f]``."""
    many = len(laid)
    if dim == 0:
        return laid.reshape(many, PAGE // 2, -1, 2).permute(0, 3, 1, 2).reshape(many, PAGE, -1)
    return laid.reshape(many, -1, PAGE // 2, 2).permute(0, 3, 2, 1).reshape(many, PAGE, -1)


def _by_unit(scales: Tensor, count: int, dim: int) -> Tensor:
    """Scales as their codes lie: by channel by byte, then field of ``count``; by token by unit."""
    if dim == 0:
        return scales.view(count, -1).T.flatten()
    return scales.view(-1, 2, PAGE // 2).transpose(1, 2).flatten()


def _by_token(laid: Tensor, count: int, dim: int) -> Tensor:
    """What ``_by_unit`` laid in each of n pages: ``[n, D]`` by channel, ``[n, g, 64]`` by token."""
    many = len(laid)
    if dim == 0:
        return laid.view(many, -1, count).mT.flatten(1)
    return laid.view(many, -1, PAGE // 2, 2).mT.reshape(many, -1, PAGE)


def _pack(codes: Tensor, width: int) -> Tensor:
    """``[n, D]`` codes as ``[n, D * width / 8]`` bytes; field f: channels from f D / fields."""
    fields = codes.chunk(8 // width, dim=1)
    packed = torch.zeros_like(fields[0])
    for n, field in enumerate(fields):
        packed |= field << (n * width)
    return packed


def _unpack(packed: Tensor, width: int) -> Tensor:
    mask = 2**width - 1
    return torch.cat([(packed >> (n * width)) & mask for n in range(8 // width)], dim=-1)


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[G, D]`` and log-sum-exp ``[G]`` of one head, in the tensors' own precision."""
    logits = q @ keys.T * scale
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, H, T, D]`` by ``[B or 1, T, D]``, in float32, rounded once."""
    first, second = heads.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (heads.float() * cos[:, None].float() + turned * sin[:, None].float()).to(heads.dtype)
