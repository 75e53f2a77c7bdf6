"""Pages of signs and the tables that they are read by, in plain torch: written, and read back.

Tables of one head, in this order: means of keys and of values, steps of values and the place of
each value channel's first sign (two bytes a channel each); what each of a key's signs counts (two
bytes) and in which channel (one byte); how many signs each value channel has (one byte). Keys that
were weighted are read divided by their weights, which is part of their steps and means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.policies.formats.fitted import Allocated, Quantised, scale_of
from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.page_formats import PAGE, is_rotated, sign_bytes
from kvtune.policies.pages import PageLayout

_HALF = PAGE // 2


@dataclass(frozen=True)
class SignRows:
    """Tokens of several heads on their way into pages of signs.

    Args:
        keys: ``[R, n, D]`` float32; of a head the first ``counts`` are tokens.
        values: likewise.
        counts: ``[R]`` int64.
        weights: ``[R, D]``, by which keys are multiplied before they are coded; or None.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    weights: Tensor | None = None


def write_sign_pages(rows: SignRows, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Bytes of pages ``[R, pages, page_bytes]`` and of tables ``[R, cells of them * 4 D]``."""
    keys = rows.keys if rows.weights is None else rows.keys * rows.weights[:, None]
    key_mean, key_codes = _form(layout.keys, layout.head_dim).coded_rows(keys, rows.counts)
    value_mean, value_codes = _form(layout.values, layout.head_dim).coded_rows(
        rows.values, rows.counts
    )
    weights = 1.0 if rows.weights is None else rows.weights
    key_signs = _Signs.of(key_codes, sign_bytes(layout.keys, layout.head_dim))
    value_signs = _Signs.of(value_codes, sign_bytes(layout.values, layout.head_dim))
    amounts = (key_codes.steps[:, 0].float() / weights).gather(1, key_signs.channel)
    tables = [
        (key_mean[:, 0].float() / weights).half(), value_mean[:, 0], value_codes.steps[:, 0],
        value_signs.first.to(torch.int16), (amounts * (1 << key_signs.place)).half(),
        key_signs.channel.to(torch.uint8), value_codes.widths[:, 0].to(torch.uint8),
    ]  # fmt: skip
    pages = [
        _units(key_signs.bytes_of(key_codes), True), _by_page(key_codes.tokens[..., 0]),
        _units(value_signs.bytes_of(value_codes), False), _by_page(value_codes.tokens[..., 0]),
    ]  # fmt: skip
    return (
        _padded(torch.cat(pages, -1), layout.page_bytes),
        _padded(
            torch.cat([each.view(torch.uint8) for each in tables], -1), layout.tables.page_bytes
        ),
    )


def read_sign_pages(pages: Tensor, tables: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, 64, D]`` float32, rotated back.

    Args:
        pages: ``[n, page_bytes]`` uint8.
        tables: ``[n, at least their bytes]`` uint8, of each one's head.
        layout: how each lies.
    """
    head_dim, signs = layout.head_dim, 8 * sign_bytes(layout.keys, layout.head_dim)
    key_means, value_means, steps, firsts = (
        tables[:, 2 * n * head_dim :][:, : 2 * head_dim].contiguous() for n in range(4)
    )
    amounts, channels, widths = tables[:, 8 * head_dim :].split_with_sizes(
        [2 * signs, signs, tables.shape[1] - 8 * head_dim - 3 * signs], 1
    )
    key_bits = _bits(pages[:, : layout.key_scales], True)
    value_bits = _bits(pages[:, layout.value_codes : layout.value_scales], False)
    counted = (key_bits - 0.5) * amounts.contiguous().view(torch.float16).float()[:, None]
    keys = torch.zeros(len(pages), PAGE, head_dim, device=pages.device)
    keys.scatter_add_(2, channels.long()[:, None].expand_as(counted), counted)
    first = firsts.view(torch.int16).long()[:, None]
    width = widths[:, :head_dim].long()[:, None]
    levels = torch.zeros_like(keys)
    for place in range(int(width.max())):
        at = (first + place).clamp_max(value_bits.shape[2] - 1).expand_as(levels)
        levels += torch.where(place < width, (value_bits.gather(2, at) - 0.5) * 2**place, 0)
    values = levels * steps.view(torch.float16).float()[:, None]
    scales = [
        scale_of(pages[:, at:][:, :PAGE, None]) for at in (layout.key_scales, layout.value_scales)
    ]
    keys = keys * scales[0] + key_means.view(torch.float16).float()[:, None]
    values = values * scales[1] + value_means.view(torch.float16).float()[:, None]
    return keys, hadamard(values) if is_rotated(layout.values) else values


def _padded(laid: Tensor, size: int) -> Tensor:
    return F.pad(laid, (0, size - laid.shape[-1]))


def _form(name: str, head_dim: int) -> Allocated:
    rotated = "hadamard" if is_rotated(name) else "channels"
    return Allocated(0, mean_bits=8 * sign_bytes(name, head_dim) / head_dim, directions=rotated)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Signs:
    """Which bit of which channel each sign is.

    Args:
        first: sign of each channel, ``[R, D]``.
        channel: of each sign, ``[R, signs]``.
        place: its bit of the channel's code, likewise.
    """

    first: Tensor
    channel: Tensor
    place: Tensor

    @staticmethod
    def of(codes: Quantised, size: int) -> _Signs:
        """Of rows of ``size`` bytes."""
        ends = codes.widths[:, 0].cumsum(-1)
        first = ends - codes.widths[:, 0]
        sign = torch.arange(8 * size, device=ends.device).expand(len(ends), -1).contiguous()
        channel = torch.searchsorted(ends, sign, right=True).clamp_max(ends.shape[1] - 1)
        return _Signs(first, channel, sign - first.gather(1, channel))

    def bytes_of(self, codes: Quantised) -> Tensor:
        """The signs of all tokens, eight a byte, ``[R, n, bytes]`` uint8."""
        rows, tokens, _ = codes.codes.shape
        at = self.channel[:, None].expand(-1, tokens, -1)
        flags = (codes.codes.to(torch.uint8).gather(2, at) >> self.place[:, None]) & 1
        eights = flags.view(rows, tokens, -1, 8)
        return (eights << torch.arange(8, device=flags.device)).sum(-1, dtype=torch.uint8)


def _by_page(rows: Tensor) -> Tensor:
    """``[R, n, ...]`` as ``[R, pages, 64, ...]``, zeros behind the last token."""
    missing = -rows.shape[1] % PAGE
    padded = F.pad(rows, (*[0, 0] * (rows.dim() - 2), 0, missing))
    paged: Tensor = padded.unflatten(1, (-1, PAGE))
    return paged


def _units(packed: Tensor, by_token: bool) -> Tensor:
    """Bytes ``[R, n, B]`` as they lie in pages ``[R, pages, 64 B]``: tokens t, t + 32 together."""
    halves: Tensor = _by_page(packed).unflatten(2, (2, _HALF))  # [R, pages, half, 32, B]
    return halves.permute((0, 1, 3, 4, 2) if by_token else (0, 1, 4, 3, 2)).flatten(2)


def _bits(laid: Tensor, by_token: bool) -> Tensor:
    """What ``_units`` laid in each of n pages, ``[n, 64, signs]`` float32."""
    if by_token:
        rows = laid.reshape(len(laid), _HALF, -1, 2).permute(0, 3, 1, 2)
    else:
        rows = laid.reshape(len(laid), -1, _HALF, 2).permute(0, 3, 2, 1)
    packed = rows.reshape(len(laid), PAGE, -1)
    flags = (packed[..., None] >> torch.arange(8, device=laid.device)) & 1
    return flags.flatten(2).float()
