"""The sequences that get a token at every step, with the sums that time and memory need.

No step visits every sequence: what ends and what needs a block next is found by step number.
"""

from __future__ import annotations

import heapq

from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.sequence import Sequence


class Decoding:
    """Sequences that are being answered.

    Args:
        memory: that their blocks come from.

    Attributes:
        step: decode steps so far.
        count: sequences.
        prompt_tokens: sum of their prompts.
        held_tokens: sum of the generated tokens that their caches hold.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.step = self.count = self.prompt_tokens = self.held_tokens = 0
        self._ends: list[tuple[int, int, Sequence]] = []
        self._buckets: list[dict[Sequence, None]] = [{} for _ in range(memory.block_tokens)]
        self._entered = 0

    def enter(self, sequence: Sequence, room: int) -> None:
        """Answer a sequence from the next step on.

        Args:
            sequence: whose prompt has been read and whose first token is there.
            room: tokens that its last block still takes.
        """
        sequence.ends_at = self.step + sequence.output - sequence.generated
        sequence.bucket = (self.step + room) % self.memory.block_tokens
        self._buckets[sequence.bucket][sequence] = None
        self._entered += 1
        heapq.heappush(self._ends, (sequence.ends_at, self._entered, sequence))
        self.count += 1
        self.prompt_tokens += sequence.prompt
        self.held_tokens += sequence.held_generated

    def leave(self, sequence: Sequence) -> int:
        """Stop answering a sequence; the tokens that its last block still had room for."""
        sequence.generated = sequence.output - (sequence.ends_at - self.step)
        del self._buckets[sequence.bucket][sequence]
        room = (sequence.bucket - self.step) % self.memory.block_tokens
        sequence.ends_at = -1
        self.count -= 1
        self.prompt_tokens -= sequence.prompt
        self.held_tokens -= sequence.held_generated
        return room

    @property
    def blocks_needed(self) -> int:
        """Blocks that the next step needs."""
        return len(self._buckets[self.step % self.memory.block_tokens])

    def steps_until_change(self) -> int:
        """Steps until one ends or the blocks run out; the first step's have been given."""
        while self._ends[0][2].ends_at != self._ends[0][0]:
            heapq.heappop(self._ends)  # left before its end
        until_end = self._ends[0][0] - self.step
        block, left = self.memory.block_tokens, self.memory.prefixes.available
        if left >= self.count * (until_end // block + 1):
            return until_end
        for step in range(1, until_end):
            left -= len(self._buckets[(self.step + step) % block])
            if left < 0:
                return step
        return until_end

    def grow(self, first: int, end: int) -> None:
        """Give the blocks that steps need, counted from the next one, which is step 0."""
        block, memory = self.memory.block_tokens, self.memory
        for step in range(first, min(end, first + block)):
            bucket = self._buckets[(self.step + step) % block]
            if not bucket:
                continue
            each = (end - step - 1) // block + 1
            memory.prefixes.make_free(each * len(bucket))
            taken = memory.pool.take(each * len(bucket))
            for at, sequence in enumerate(bucket):
                sequence.blocks += taken[at * each : (at + 1) * each]

    def advance(self, steps: int) -> list[Sequence]:
        """Count so many steps; the sequences that they finish, which have left."""
        self.step += steps
        self.held_tokens += steps * self.count
        done = []
        while self._ends and self._ends[0][0] <= self.step:
            ends_at, _, sequence = heapq.heappop(self._ends)
            if sequence.ends_at == ends_at:
                self.leave(sequence)
                done.append(sequence)
        return done
