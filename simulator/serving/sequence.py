"""One request inside the engine: how far it is, and what it holds."""

from __future__ import annotations

from kvtune.simulator.serving.blocks import Segment
from kvtune.simulator.serving.requests import Prefix


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
