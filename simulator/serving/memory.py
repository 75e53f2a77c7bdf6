"""What sequences hold: blocks on the card, segments that they share, blocks on the host."""

from __future__ import annotations

from collections import OrderedDict
from itertools import count

from kvtune.simulator.serving.blocks import BlockPool
from kvtune.simulator.serving.sequence import Footprint, Key, Prefix, Segment, Sequence


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


class Memory:
    """Gives blocks to sequences by what they need under a policy.

    Args:
        footprint: bytes of a sequence.
        block_tokens: generated tokens that a block holds.
        blocks: on the card.
        host_blocks: on the host; 0 for none.
    """

    def __init__(
        self, footprint: Footprint, block_tokens: int, blocks: int, host_blocks: int = 0
    ) -> None:
        self.footprint, self.block_tokens = footprint, block_tokens
        self.block_bytes = block_tokens * footprint.token
        self.pool, self.host = BlockPool(blocks), BlockPool(host_blocks)
        self.prefixes = PrefixCache(self.pool)

    def blocks_for(self, size: int) -> int:
        """Blocks that so many bytes take."""
        return -(-size // self.block_bytes)

    def most(self, prompt: int, output: int) -> int:
        """The most blocks that a request can come to need, also when it is read anew."""
        return self.blocks_for(self.footprint.read_bytes(prompt, output - 1))

    @property
    def used(self) -> int:
        """Blocks that sequences hold; idle segments are not among them."""
        return self.pool.total - self.prefixes.available

    def take(self, count: int) -> list[int] | None:
        """So many blocks, or None where they cannot be had."""
        if count > self.prefixes.available:
            return None
        self.prefixes.make_free(count)
        return self.pool.take(count)

    # --- reading a prompt -----------------------------------------------------------------------

    def admit(self, sequence: Sequence, leave: int = 0) -> bool:
        """Give what reading takes, with the beginning that is already held; False if too little.

        Args:
            sequence: that waits.
            leave: blocks that must be left to others.
        """
        sequence.to_read = sequence.prompt + sequence.generated
        found, held = self._find(sequence)
        read, kept = self.footprint.read_bytes, self.footprint.kept_bytes
        prompt, generated = sequence.prompt, sequence.generated
        own = max(
            self.blocks_for(read(prompt, generated) - read(held, 0)),
            self.blocks_for(kept(prompt, generated)) - _blocks_of(found),
        )
        self.prefixes.use(found)
        blocks = self.take(own) if own + leave <= self.prefixes.available else None
        if blocks is None:
            self.prefixes.release(found)
            return False
        sequence.blocks, sequence.shared, sequence.read = blocks, found, held
        return True

    def held_share(self, sequence: Sequence) -> float:
        """Of a waiting prompt, how much is held already."""
        return self._find(sequence)[1] / sequence.prompt

    def _find(self, sequence: Sequence) -> tuple[list[Segment], int]:
        """Segments of a prompt that are held, and how many of its tokens they hold."""
        prefix = sequence.prefix
        if prefix is None or not self.footprint.shareable:
            return [], 0
        ends = prefix.ends(self.block_tokens)
        found = self.prefixes.find(prefix.ids, ends)
        while found and ends[len(found) - 1] >= sequence.prompt + sequence.generated:
            found.pop()  # the last token is read anyway, since its answer is wanted
        return found, ends[len(found) - 1] if found else 0

    def compress(self, sequence: Sequence) -> int:
        """Give back what only reading took; the tokens that the last block still has room for."""
        size = self.footprint.kept_bytes(sequence.prompt, sequence.generated)
        kept = self.blocks_for(size)
        if sequence.prefix and self.footprint.shareable:
            self._share(sequence, sequence.prefix)
        own = kept - _blocks_of(sequence.shared)
        self.pool.give(sequence.blocks[own:])
        del sequence.blocks[own:]
        return (kept * self.block_bytes - size) // self.footprint.token

    def _share(self, sequence: Sequence, prefix: Prefix) -> None:
        """Hand the full blocks of segments that nobody held before to the prefix cache."""
        first, ends = len(sequence.shared), prefix.ends(self.block_tokens)
        parent = sequence.shared[-1].number if first else 0
        begin = self._full_blocks(ends[first - 1]) if first else 0
        for name, end in zip(prefix.ids[first:], ends[first:], strict=True):
            key, full = (parent, name, end), self._full_blocks(end)
            if key in self.prefixes.segments or full == begin:
                return
            blocks = [sequence.blocks.pop() for _ in range(full - begin)]
            segment = self.prefixes.add(key, blocks)
            sequence.shared.append(segment)
            parent, begin = segment.number, full

    def _full_blocks(self, tokens: int) -> int:
        return self.footprint.kept[tokens] // self.block_bytes

    # --- giving back ----------------------------------------------------------------------------

    def release(self, sequence: Sequence) -> None:
        """Take back all that a sequence holds on the card."""
        self.pool.give(sequence.blocks)
        self.prefixes.release(sequence.shared)
        sequence.blocks, sequence.shared = [], []

    def swap_out(self, sequence: Sequence) -> int:
        """Move a sequence to the host if there is room; the blocks that were moved, else 0."""
        count = len(sequence.blocks) + _blocks_of(sequence.shared)
        if count > self.host.free:
            return 0
        sequence.swapped = self.host.take(count)
        self.release(sequence)
        return count

    def swap_in(self, sequence: Sequence) -> int:
        """Move a sequence back if there is room; the blocks that were moved, else 0."""
        count = len(sequence.swapped)
        blocks = self.take(count)
        if blocks is None:
            return 0
        self.host.give(sequence.swapped)
        sequence.blocks, sequence.swapped = blocks, []
        return count


def _blocks_of(segments: list[Segment]) -> int:
    return sum(len(segment.blocks) for segment in segments)
