"""Integer codes with a scale and an offset a group: keys per channel or token, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.format import Format, Role, Stored
from kvtune.policies.formats.packing import pack, unpack
from kvtune.policies.packed import Sections, grouped, joined, numbers
from kvtune.policies.registry import LONGEST_PROMPT, parameter

if TYPE_CHECKING:
    from torch import Tensor

_GROUP_BYTES = 4  # a scale and an offset, 16 bits each


@dataclass(frozen=True)
class Grouped(Format):
    """Asymmetric round-to-nearest codes; key outliers live in channels, so keys group along tokens.

    keys:   groups of ``group`` consecutive kept tokens of one channel
    values: groups of ``group`` consecutive channels of one token, and so keys by token
    code = round((x - min) / scale), scale = (max - min) / (2^bits - 1)

    Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML
    2024, arXiv 2402.02750. Differs: what stays of the prompt is quantised to its end, without a
    residual window (generated tokens stay in 16 bits), and a last group may be short.
    ``exact_first`` leaves the first kept tokens, the sinks, in 16 bits, whose keys would widen
    every group they are in (Hooper et al., "KVQuant", NeurIPS 2024, arXiv 2401.18079, 3.5).

    ``keys_by="token"`` groups keys as values are, which Sheng et al., "FlexGen", ICML 2023, arXiv
    2303.06865, do to both; KIVI's section 3 says why channels are better: an outlying channel
    widens its group in every token. A token needs no others to be stored. As values are always
    grouped so, they read nothing into it.
    """

    source = "Liu et al., ICML 2024, arXiv 2402.02750"

    group: int = parameter(64, "elements that share a scale", unit="elements", low=2, high=4096)
    exact_first: int = parameter(
        0, "first kept tokens left in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    keys_by: Literal["channel", "token"] = parameter(
        "channel", "whose elements share a key's scale; values' are always a token's"
    )

    @property
    def label(self) -> str:
        """``int4``, ``int2+4`` where the first four tokens are exact, ``int4-token`` by token."""
        grouping = "-token" if self.keys_by == "token" else ""
        return self.name + grouping + (f"+{self.exact_first}" if self.exact_first else "")

    def bound(self, tokens: int, head_dim: int, role: Role) -> int:
        """Packed codes, rounded up to bytes a group, scales, and the tokens left exact."""
        exact = min(tokens, self.exact_first)
        along, across = self._axes(tokens - exact, head_dim, role)
        whole, rest = divmod(along, self.group)
        row = whole * self._group_bytes(self.group) + (self._group_bytes(rest) if rest else 0)
        return 2 * exact * head_dim + across * row

    @property
    def exact_tokens(self) -> int:
        """The first ``exact_first`` tokens stay in 16 bits."""
        return self.exact_first

    def encode(self, tensor: Tensor, role: Role) -> Stored:
        """Packed codes with 16-bit scales and offsets, a short last group apart."""
        import torch

        exact, coded = tensor[: self.exact_first], tensor[self.exact_first :].float()
        rows = coded.T if self.is_along_tokens(role) else coded
        narrow = exact if exact.element_size() == 2 else exact.to(torch.bfloat16)
        buffers = {"exact": narrow}
        whole = rows.shape[-1] // self.group * self.group
        for name, part in (("whole", rows[:, :whole]), ("last", rows[:, whole:])):
            if part.numel():
                width = min(self.group, part.shape[-1])
                codes, step, low = self._codes(part.unflatten(-1, (-1, width)))
                buffers[f"{name} codes"] = pack(codes, self.bits)
                buffers[f"{name} scales"] = torch.cat([step, low], -1).half()
        return Stored(buffers, len(tensor))

    def decode(self, stored: Stored, head_dim: int, role: Role) -> Tensor:
        """Codes times scales, plus offsets; the exact tokens in front."""
        import torch

        buffers, along_tokens = stored.buffers, self.is_along_tokens(role)
        exact = buffers["exact"].float()
        if stored.tokens == len(exact):
            return exact
        length = stored.tokens - len(exact) if along_tokens else head_dim
        parts = [exact.new_zeros(head_dim if along_tokens else stored.tokens - len(exact), 0)]
        for name, width in (("whole", self.group), ("last", length % self.group)):
            if f"{name} codes" in buffers:
                codes = unpack(buffers[f"{name} codes"], self.bits, width)
                step, low = buffers[f"{name} scales"].float().split(1, -1)
                parts.append((codes * step + low).flatten(-2))
        rows = torch.cat(parts, -1)
        return torch.cat([exact, rows.T if along_tokens else rows])

    def packed(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """The first tokens as they are, groups along tokens or channels behind them."""
        exact = min(tokens, self.exact_first)
        coded = grouped(tokens - exact, head_dim, self.bits, self.group, self.is_along_tokens(role))
        behind = None if coded is None else tuple(each.moved(exact) for each in coded)
        return joined([numbers(0, exact, "exact"), behind])

    def _codes(self, groups: Tensor, axis: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of groups that lie along an axis, with the scale and offset of each group."""
        step, low = self._grid(groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True))
        codes = (groups - low).div_(step).round_().clamp_(0, 2**self.bits - 1)
        return codes, step, low

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset, rounded to 16 bits, of groups between these ends."""
        import torch

        low = low.half().float()
        scale = ((high - low) / (2**self.bits - 1)).half().float()
        return torch.where(scale > 0, scale, 1.0), low  # a constant group has no spread

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """Quantise and dequantise group by group, in float32 with 16-bit scales."""
        import torch

        exact, coded = tensor[..., : self.exact_first, :], tensor[..., self.exact_first :, :]
        along_tokens = self.is_along_tokens(role)
        if along_tokens:
            coded = _last_repeated(coded, counts - self.exact_first)
        stored = self._quantise(coded.float(), -2 if along_tokens else -1)
        return torch.cat([exact, stored.to(tensor.dtype)], dim=-2)

    def is_along_tokens(self, role: Role) -> bool:
        """Whether a group is of one channel's tokens, not of one token's channels."""
        return role == "keys" and self.keys_by == "channel"

    def _quantise(self, rows: Tensor, axis: int) -> Tensor:
        """Groups along an axis, the last of them short where the length is no multiple."""
        import torch

        if rows.numel() == 0:
            return rows
        length = rows.shape[axis]
        whole = length // self.group * self.group
        sizes = [size for size in (whole, length - whole) if size]
        parts = [
            self._back(part.unflatten(axis, (-1, min(self.group, part.shape[axis]))), axis)
            for part in rows.split(sizes, axis)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def _back(self, groups: Tensor, axis: int) -> Tensor:
        """What is read back of whole groups, with these side by side along the axis."""
        codes, step, low = self._codes(groups, axis)
        return codes.mul_(step).add_(low).flatten(axis - 1, axis)

    def _axes(self, tokens: int, head_dim: int, role: Role) -> tuple[int, int]:
        return (tokens, head_dim) if self.is_along_tokens(role) else (head_dim, tokens)

    def _group_bytes(self, elements: int) -> int:
        return -(-elements * self.bits // 8) + _GROUP_BYTES


def _last_repeated(tensor: Tensor, counts: Tensor) -> Tensor:
    """``[..., n, D]`` whose last real token stands in for all behind it: no group grows wider."""
    import torch

    if tensor.numel() == 0:
        return tensor
    place = torch.arange(tensor.shape[-2], device=tensor.device)
    at = (counts - 1).clamp_min(0)[..., None, None].expand(*counts.shape, 1, tensor.shape[-1])
    return torch.where((place < counts[..., None])[..., None], tensor, tensor.gather(-2, at))


@dataclass(frozen=True)
class Int8(Grouped):
    """8 bits an element; see ``Grouped``."""

    name = "int8"
    bits = 8


@dataclass(frozen=True)
class Int4(Grouped):
    """4 bits an element; see ``Grouped``."""

    name = "int4"
    bits = 4


@dataclass(frozen=True)
class Int3(Grouped):
    """3 bits an element; see ``Grouped``."""

    name = "int3"
    bits = 3


@dataclass(frozen=True)
class Int2(Grouped):
    """2 bits an element; see ``Grouped``."""

    name = "int2"
    bits = 2
