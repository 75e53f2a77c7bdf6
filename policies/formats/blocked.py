"""What formats in blocks share: packing, reading back, counting, and how pages call them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.policies.blocks import Blocks
from kvtune.policies.format import Role, formats
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.packing import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BlockCodes:
    """What a format gives a token's numbers.

    Args:
        codes: ``[..., D]`` uint8, of whole blocks.
        scales: ``[..., blocks]`` each, in the types in which they are stored; two where zero
            points in 16 bits follow the scales.
        head: what multiplies all scales of a head, or None.
    """

    codes: Tensor
    scales: tuple[Tensor, ...]
    head: Tensor | None = None


@dataclass(frozen=True)
class BlockFormat(Coded):
    """Stores tokens one by one, in blocks; a class says how they lie, and which codes they have."""

    @property
    @abstractmethod
    def blocks(self) -> Blocks:
        """How a token's numbers lie."""

    @abstractmethod
    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """Codes and scales of ``[..., n, D]`` float32.

        Args:
            rows: tokens.
            head: what multiplies all of a head's scales, of heads that share some; as they are in
                ``rows`` unless it is given.
        """

    def blocks_in(self, head_dim: int) -> Blocks:
        """How they lie in heads of so many channels."""
        return self.blocks

    @property
    def page_name(self) -> str:
        """What pages call it: its label, whichever first tokens stay in 16 bits."""
        return replace(self, exact_first=0).label

    @classmethod
    def in_pages(cls) -> tuple[BlockFormat, ...]:
        """Every setting that pages hold."""
        return (cls(),)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Codes and scales, all of whole blocks."""
        return tokens * self.blocks_in(head_dim).token_bytes(head_dim)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Packed codes and scales, and the head's own where there is one."""
        import torch

        fit = self.fit(rows)
        buffers = {"codes": pack(fit.codes, self.bits)}
        if fit.scales:
            buffers["scales"] = torch.stack(fit.scales, -1)
        if fit.head is not None:
            buffers["head"] = fit.head.flatten()
        return buffers

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """The numbers that codes and scales stand for."""
        blocks = self.blocks_in(shape[1])
        padded = blocks.count(shape[1]) * blocks.width_of(shape[1])
        codes = unpack(buffers["codes"], self.bits, padded)
        scales = buffers["scales"].unbind(-1) if "scales" in buffers else ()
        rows = blocks.numbers(codes, scales)[:, : shape[1]]
        return rows * buffers["head"] if "head" in buffers else rows


def padded_blocks(rows: Tensor, width: int) -> Tensor:
    """``[..., D]`` as ``[..., blocks, width]``, a short last block filled with zeros."""
    import torch.nn.functional as F

    blocks: Tensor = F.pad(rows, (0, -rows.shape[-1] % width)).unflatten(-1, (-1, width))
    return blocks


@cache
def block_forms() -> Mapping[str, BlockFormat]:
    """Every block format that pages hold, by what pages call it.

    Raises:
        KvtuneError: two lie alike: one number would call both, and either write the other's pages.
    """
    kinds = [kind for kind in formats().values() if issubclass(kind, BlockFormat)]
    found = {form.page_name: form for kind in kinds for form in kind.in_pages()}
    first: dict[int, str] = {}
    for name, form in found.items():
        other = first.setdefault(form.blocks.number, name)
        if other != name:
            raise KvtuneError(
                f"the format {name!r} ({type(form).__module__}) lies in pages exactly as {other!r} "
                f"({type(found[other]).__module__}), from which kernels could not tell it",
                hint="let one describe its blocks otherwise, or return () from its in_pages: it is "
                "then held encoded, without pages.",
            )
    return found


@cache
def _numbered() -> Mapping[int, str]:
    return {form.blocks.number: name for name, form in block_forms().items()}


def name_of(number: int) -> str:
    """The format in pages that kernels call so."""
    return _numbered()[number]
