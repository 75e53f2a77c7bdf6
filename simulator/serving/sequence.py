"""One request inside the engine: how far it is, what it holds, and the bytes that this takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prefix:
    """The shared beginning of a prompt, as a chain of segments of equal length.

    Args:
        ids: one identifier a segment; prompts that begin with the same ids begin with the same
            tokens.
        tokens: length of the whole prefix.
    """

    ids: tuple[str, ...]
    tokens: int

    def ends(self, block_tokens: int) -> list[int]:
        """Tokens up to the last full block of each segment and of those before it."""
        count = len(self.ids)
        ends = (self.tokens * (i + 1) // count for i in range(count))
        return [end - end % block_tokens for end in ends]


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


@dataclass(frozen=True)
class Footprint:
    """Bytes of one sequence's cache by the length of its prompt.

    Args:
        reading: while a prompt of so many tokens is read: uncompressed; from length 0 on.
        kept: once it has been read: as the policy leaves it.
        token: of each generated token, in 16 bits.
        shareable: whether a prompt's beginning is stored alike whatever follows it.
    """

    reading: list[int]
    kept: list[int]
    token: int
    shareable: bool = True

    def read_bytes(self, prompt: int, generated: int) -> int:
        """Of a prompt and of generated tokens that are read anew with it."""
        return max(self.reading[prompt], self.kept[prompt]) + generated * self.token

    def kept_bytes(self, prompt: int, generated: int) -> int:
        """Of a prompt that has been read and the generated tokens after it."""
        return self.kept[prompt] + generated * self.token


class Sequence:
    """A request while it waits, is read, or is answered.

    Attributes:
        index: of the request.
        prompt, output: tokens of its prompt and of its whole answer.
        prefix: shared beginning of its prompt.
        generated: tokens of its answer so far.
        read, to_read: tokens read so far and in all, since it was last admitted.
        blocks: its own.
        shared: segments that it reads together with others.
        ends_at: the decode step after which it is finished; -1 while it does not decode.
        bucket: which decode steps need a block more for it, modulo the tokens of a block.
        swapped: its blocks on the host; empty unless it was moved there.
    """

    __slots__ = (
        "blocks", "bucket", "ends_at", "generated", "index", "output", "prefix", "prompt",
        "read", "shared", "swapped", "to_read",
    )  # fmt: skip

    def __init__(self, index: int, prompt: int, output: int, prefix: Prefix | None = None) -> None:
        self.index, self.prompt, self.output, self.prefix = index, prompt, output, prefix
        self.generated = self.read = self.to_read = 0
        self.blocks: list[int] = []
        self.shared: list[Segment] = []
        self.ends_at = self.bucket = -1
        self.swapped: list[int] = []

    @property
    def held_generated(self) -> int:
        """Generated tokens that the cache holds: all but the newest, which no step has read yet."""
        return max(self.generated - 1, 0)
