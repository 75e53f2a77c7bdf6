"""8 and 4 bits as OpenVINO's CPU plugin stores a paged cache: keys by channel, values by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.packing import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

PAGE_TOKENS = 32
_SCALE_BYTES = 8  # a scale and a zero point of 32 bits each
_CONSTANT = 1e-4  # the scale of a group that has no spread


@dataclass(frozen=True)
class OpenVINOCodes(Coded):
    """Asymmetric codes with a scale and a zero point of 32 bits, which is not rounded.

    keys:   groups of one channel's tokens in a page of 32
    values: one group a token and head
    code = round(x / scale + zero), scale = (max - min) / (2^bits - 1), zero = -min / scale

    Source: OpenVINO (Apache-2.0), CPU plugin, ``attn_quant.cpp`` and ``attn_quant_kernel.hpp`` of
    ``scaled_attn``. A page of keys that is not full is read back there, joined by the next token
    and quantised again, so that what an answer stored loses a little with each of its tokens.
    """

    page_tokens = PAGE_TOKENS
    source = "OpenVINO, CPU plugin, KV_CACHE_PRECISION"

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Codes of whole bytes a token, and the scales of every group."""
        groups = -(-tokens // PAGE_TOKENS) * head_dim if role == "keys" else tokens
        return tokens * self._row_bytes(head_dim) + groups * _SCALE_BYTES

    def _row_bytes(self, head_dim: int) -> int:
        return -(-head_dim * self.bits // 8)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Packed codes, scales and zero points."""
        import torch

        groups, axis = _groups(rows, role)
        codes, scale, zero = self._fit(groups, axis)
        codes = codes.flatten(-3, -2)[: len(rows)].to(torch.uint8)
        return {"codes": pack(codes, self.bits), "scales": torch.cat([scale, zero], axis)}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Codes less their zero point, times their scale."""
        tokens, head_dim = shape
        codes = unpack(buffers["codes"], self.bits, head_dim).float()  # [n, D]
        scales = buffers["scales"]  # [pages, 2, D] of keys, [n, 1, 2] of values
        if role == "keys":
            scales = scales.repeat_interleave(PAGE_TOKENS, 0)[:tokens].transpose(1, 2)
        scale, zero = scales[..., 0], scales[..., 1]
        found: Tensor = (codes - zero) * scale
        return found

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """The same for heads of one length at once, without packing."""
        length = tensor.shape[-2]
        if self.exact_first or not length or bool((counts != length).any()):
            return super().roundtrip(tensor, counts, role)
        groups, axis = _groups(tensor.float(), role)
        codes, scale, zero = self._fit(groups, axis)
        back = ((codes - zero) * scale).flatten(-3, -2)[..., :length, :]
        return back.to(tensor.dtype)

    def _fit(self, groups: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points of groups along an axis."""
        import torch

        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale == 0, _CONSTANT, scale)
        zero = -low / scale
        return (groups / scale + zero).round().clamp(0, 2**self.bits - 1), scale, zero


def _groups(rows: Tensor, role: Role) -> tuple[Tensor, int]:
    """Tokens ``[..., n, D]`` in groups and the axis along which each lies.

    Keys as pages ``[..., pages, 32, D]``, the last filled up with its last token; values
    ``[..., n, 1, D]``.
    """
    import torch

    if role == "values":
        return rows[..., None, :], -1
    missing = -rows.shape[-2] % PAGE_TOKENS
    last = rows[..., -1:, :].expand(*rows.shape[:-2], missing, -1)
    return torch.cat([rows, last], -2).unflatten(-2, (-1, PAGE_TOKENS)), -2


@dataclass(frozen=True)
class OpenVINO8(OpenVINOCodes):
    """8 bits an element; see ``OpenVINOCodes``."""

    name = "openvino_u8"
    bits = 8


@dataclass(frozen=True)
class OpenVINO4(OpenVINOCodes):
    """4 bits an element; see ``OpenVINOCodes``."""

    name = "openvino_u4"
    bits = 4
