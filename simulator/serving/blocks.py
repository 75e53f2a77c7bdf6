"""Blocks of paged memory that one owner holds at a time."""

from __future__ import annotations


class BlockPool:
    """Blocks of equal size, each with a number as its name and at most one owner.

    Args:
        total: how many there are.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, number: int) -> list[int]:
        """Names of so many blocks, which must be free."""
        if number == 0:
            return []
        if number > len(self._free):
            raise ValueError(f"{number} blocks wanted, {len(self._free)} are free")
        taken = self._free[-number:]
        del self._free[-number:]
        return taken

    def give(self, blocks: list[int]) -> None:
        """Take blocks back."""
        self._free += blocks
