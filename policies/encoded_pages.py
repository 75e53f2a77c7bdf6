"""Pages of formats that no kernel reads: a head's packed buffers, end to end; without torch."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.policies.option import Option
from kvtune.policies.parts import PartPlan

_CELLS = 4


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
        """Pages that so many bytes take."""
        return -(-size // self.page_bytes)


def encoded_bytes(plan: PartPlan, option: Option, head_dim: int) -> int:
    """Bytes of a part's packed keys and values, at most where they depend on the data."""
    keys, values = plan.formats or (option.keys, option.values)
    return keys.bound(plan.entries, head_dim, "keys") + values.bound(
        plan.entries, head_dim, "values"
    )
