"""Paged memory: blocks that one owner holds at a time, and prompt beginnings that several share."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count


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


Key = tuple[int, str, int]
"""Number of the segment before it, its own id, and prompt tokens up to its end."""


@dataclass(eq=False)
class Segment:
    """A stretch of a shared prefix whose keys and values are held.

    Args:
        key: that it is found by.
        number: that those which follow it name it by; never given twice.
        blocks: that hold it.
        users: sequences that read it now.
    """

    key: Key
    number: int
    blocks: list[int]
    users: int = 1


class PrefixCache:
    """Segments of prompts that were read, kept while nobody else needs their blocks.

    Segments without users are given up in the order in which they were last used; the end of a
    chain before its beginning, since a segment is of no use without those before it.

    Args:
        pool: that the blocks belong to.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.segments: dict[Key, Segment] = {}
        self.idle: OrderedDict[Key, Segment] = OrderedDict()
        self.idle_blocks = 0
        self._numbers = count(1)

    @property
    def available(self) -> int:
        """Blocks that are free or would be if idle segments were given up."""
        return self.pool.free + self.idle_blocks

    def make_free(self, blocks: int) -> None:
        """Give up idle segments until so many blocks are free, which must be possible."""
        while self.pool.free < blocks:
            key, segment = self.idle.popitem(last=False)
            del self.segments[key]
            self.idle_blocks -= len(segment.blocks)
            self.pool.give(segment.blocks)

    def find(self, ids: tuple[str, ...], ends: list[int]) -> list[Segment]:
        """The longest chain of held segments that begins with these ids and ends here."""
        found: list[Segment] = []
        for name, end in zip(ids, ends, strict=True):
            segment = self.segments.get((found[-1].number if found else 0, name, end))
            if segment is None:
                break
            found.append(segment)
        return found

    def use(self, segments: list[Segment]) -> None:
        """Count one more user of each."""
        for segment in segments:
            if segment.users == 0:
                del self.idle[segment.key]
                self.idle_blocks -= len(segment.blocks)
            segment.users += 1

    def add(self, key: Key, blocks: list[int]) -> Segment:
        """Hold a segment that was just read, with its reader as the only user."""
        segment = self.segments[key] = Segment(key, next(self._numbers), blocks)
        return segment

    def release(self, segments: list[Segment]) -> None:
        """Count one user less of each segment of a chain."""
        for segment in reversed(segments):
            segment.users -= 1
            if segment.users == 0:
                self.idle[segment.key] = segment
                self.idle_blocks += len(segment.blocks)
