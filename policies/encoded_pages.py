"""Pages of formats that have no layout of their own: packed buffers, end to end; without torch."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.policies.format import Format
from kvtune.policies.option import Option
from kvtune.policies.packed import Piece, pieces_of
from kvtune.policies.pages import KERNEL_HEAD_DIMS
from kvtune.policies.parts import PartPlan

_CELLS = 4
_BETWEEN = 64  # bytes at most between the buffers of a part


@dataclass(frozen=True)
class EncodedPages:
    """Cells of the pool that hold packed buffers; the last page of a part may be filled in part.

    Args:
        head_dim: D.
    """

    head_dim: int

    @property
    def cell_bytes(self) -> int:
        """What sizes and places in a pool are multiples of."""
        return 4 * self.head_dim

    @property
    def page_cells(self) -> int:
        """Cells of a page: of heads of 64 channels a KiB, so that little stays empty."""
        return _CELLS

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_cells * self.cell_bytes

    def pages_for(self, size: int) -> int:
        """Pages that so many bytes of buffers take, each of which begins with a whole word."""
        return -(-(size + _BETWEEN * (size > 0)) // self.page_bytes)


def encoded_bytes(plan: PartPlan, option: Option, head_dim: int) -> int:
    """Bytes of a part's packed keys and values, at most where they depend on the data."""
    keys, values = plan.formats or (option.keys, option.values)
    return keys.bound(plan.entries, head_dim, "keys") + values.bound(
        plan.entries, head_dim, "values"
    )


def packed_pieces(
    formats: tuple[Format, Format], entries: int, head_dim: int
) -> tuple[Piece, ...] | None:
    """How a kernel reads a part's packed keys and values where they lie; None where none does."""
    if head_dim not in KERNEL_HEAD_DIMS:
        return None
    keys, values = formats
    return pieces_of(
        keys.packed(entries, head_dim, "keys"), values.packed(entries, head_dim, "values")
    )


def is_read_in_place(plan: PartPlan, option: Option, head_dim: int) -> bool:
    """Whether a kernel reads a part's packed buffers, so that no step reads them back."""
    formats = plan.formats or (option.keys, option.values)
    return packed_pieces(formats, plan.entries, head_dim) is not None
