"""What every step of the engine does: who decodes, what is read, who is admitted or preempted.

Continuous batching as vLLM's v1 scheduler does it: each step gives every answered sequence a token
and fills the rest of its token budget with chunks of prompts, first come first served. By
``Limits.reading`` prompts are read whole instead, as TensorRT-LLM does by default, or in steps in
which nothing decodes, as SGLang does.

When blocks run out, the sequence that was admitted last gives its own back and waits at the front.
By ``Limits.order`` the prompts that are held to the largest share come first instead, after KVShare
(Yang et al., arXiv 2503.16525), whose released code has no scheduler: how long one may be passed
over, and how far the queue is looked through, are ours.
"""

from __future__ import annotations

import math
from collections import deque

from kvtune.simulator.serving.decoding import Decoding
from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.sequence import Sequence
from kvtune.simulator.serving.step import Counts, Limits, Step
from kvtune.simulator.serving.step_times import Chunk, EngineTimes

LOOKED_THROUGH = 256
"""Waiting requests among which one is chosen by what is held of its prompt."""

FULL_ENOUGH = 0.9
"""Share of a step's tokens at which prompts are no longer held back for others."""

PASSED_OVER = 64
"""Later requests that may go before the first one that waits."""


class Scheduler:
    """The engine's queue and batch.

    Args:
        memory: blocks.
        times: of steps.
        limits: of a step.
    """

    def __init__(self, memory: Memory, times: EngineTimes, limits: Limits) -> None:
        self.memory, self.times, self.limits = memory, times, limits
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in the order in which they were admitted
        self.reading: dict[Sequence, None] = {}
        self.decoding = Decoding(memory)
        self.counts = Counts()
        self._passed_over = 0  # by how many the first one that waits
        self._held_back = 0  # decode steps since prompts began to be held back
        self._decoded = 0  # decode steps since prompts were last read
        self._left_to_answers = int((limits.left_to_answers or 0.0) * memory.pool.total)

    def plan(self, quiet_s: float) -> Step | None:
        """The next step, with the blocks that it takes; None where there is nothing to do.

        Args:
            quiet_s: seconds until the next request arrives.
        """
        step = Step()
        unseen = bool(self.waiting) and self._is_unseen()
        if self.limits.reading == "alone" and not unseen and self._read_alone(step):
            return step
        preempted = self._make_room(step)
        self.decoding.grow(0, 1)
        chunks = self._read(step) if self.reading else []
        held_back = unseen or (bool(self.waiting) and self._hold_back())
        if self.waiting and not preempted and not held_back:
            self._admit(step, chunks)
        decoding = self.decoding
        if not self.running:
            if self.waiting:
                raise RuntimeError("a request waits that an empty engine cannot take")
            return None
        sequences = decoding.count
        prompt = decoding.prompt_tokens / sequences if sequences else 0.0
        held = decoding.held_tokens / sequences if sequences else 0.0
        if chunks or preempted or step.admitted or held_back:
            self._one_step(step, chunks, prompt, held)
        else:
            self._several_steps(step, prompt, held, quiet_s)
        return step

    def complete(self, step: Step) -> list[Sequence]:
        """Count a step that has ended; the requests that it finished."""
        self.counts.steps += max(step.decode_steps, 1)
        self._decoded = 0 if step.read else self._decoded + step.decode_steps
        self.counts.decoded += step.decode_steps * self.decoding.count
        done = self.decoding.advance(step.decode_steps)
        for sequence in step.read:
            del self.reading[sequence]
            room = self.memory.compress(sequence)
            sequence.generated += 1
            if sequence.generated == sequence.output:
                done.append(sequence)
            else:
                self.decoding.enter(sequence, room)
        for sequence in step.returned:
            self.decoding.enter(sequence, sequence.bucket)
        for sequence in done:
            del self.running[sequence]
            self.memory.release(sequence)
        return done

    # --- memory ---------------------------------------------------------------------------------

    def _make_room(self, step: Step) -> bool:
        """Preempt from the last admitted on until the next step's blocks can be had."""
        preempted = False
        while self.decoding.blocks_needed > self.memory.prefixes.available:
            sequence, _ = self.running.popitem()
            self._preempt(sequence, step)
            preempted = True
        return preempted

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self.counts.preemptions += 1
        self.waiting.appendleft(sequence)
        if sequence in self.reading:
            del self.reading[sequence]
            self.memory.release(sequence)
            return
        sequence.bucket = self.decoding.leave(sequence)
        if copied := self.memory.swap_out(sequence):
            self.counts.swaps += 1
            self._copy(copied, step)
        else:
            self.memory.release(sequence)

    def _copy(self, blocks: int, step: Step) -> None:
        self.counts.copied_blocks += blocks
        step.seconds += self.times.copying(blocks)

    # --- prompts --------------------------------------------------------------------------------

    def _read_alone(self, step: Step) -> bool:
        """A step of nothing but prompts, if any can be read."""
        chunks = self._read(step) if self.reading else []
        if self.waiting:
            self._admit(step, chunks)
        if not chunks:
            return False
        step.seconds += self.times.mixed(0, 0.0, 0.0, chunks) + self._compressing(step)
        return True

    def _is_unseen(self) -> bool:
        """Whether the engine has not yet looked for the requests that wait, as it decodes."""
        return bool(self.decoding.count and self._decoded % self.limits.poll_steps)

    def _hold_back(self) -> bool:
        """Whether the prompts that wait may still be joined by others before they are read."""
        limits = self.limits
        if not (limits.hold_steps and self.decoding.count):
            return False
        if self._held_back < limits.hold_steps:
            tokens = sum(sequence.prompt for sequence in self.waiting)
            if tokens < FULL_ENOUGH * limits.step_tokens:
                self._held_back += 1
                return True
        self._held_back = 0
        return False

    def _left(self, chunks: list[Chunk]) -> int:
        """Tokens that a step with these chunks can still read."""
        decoding = 0 if self.limits.reading == "alone" else self.decoding.count
        return self.limits.step_tokens - decoding - sum(c.tokens for c in chunks)

    def _read(self, step: Step) -> list[Chunk]:
        """Chunks of prompts that have been begun, as far as the step's tokens go."""
        chunks: list[Chunk] = []
        for sequence in self.reading:
            self._read_chunk(sequence, step, chunks)
        return chunks

    def _read_chunk(self, sequence: Sequence, step: Step, chunks: list[Chunk]) -> None:
        tokens = min(self._left(chunks), sequence.to_read - sequence.read)
        if tokens <= 0:
            return
        chunks.append(Chunk(sequence.read, tokens))
        sequence.read += tokens
        if sequence.read == sequence.to_read:
            step.read.append(sequence)

    def _admit(self, step: Step, chunks: list[Chunk]) -> None:
        """Take from the queue, in order, while tokens, sequences and blocks are left."""
        left = self._left(chunks)
        while self.waiting and len(self.running) < self.limits.sequences and left > 0:
            place = self._next()
            sequence = self.waiting[place]
            if self.limits.reading == "whole" and chunks and sequence.prompt > left:
                return
            if not (self._return(sequence, step) if sequence.swapped else self._begin(sequence)):
                return
            del self.waiting[place]
            self._passed_over = self._passed_over + 1 if place else 0
            self.running[sequence] = None
            step.admitted.append(sequence)
            if sequence in self.reading:
                self._read_chunk(sequence, step, chunks)
                left -= chunks[-1].tokens
            else:
                left -= 1

    def _next(self) -> int:
        """The place in the queue of the request to admit next; a preempted first one always is."""
        first = self.waiting[0]
        was_here = first.swapped or first.generated
        if self.limits.order == "arrival" or was_here or self._passed_over >= PASSED_OVER:
            return 0
        places = range(min(len(self.waiting), LOOKED_THROUGH))
        return max(places, key=lambda at: (self.memory.held_share(self.waiting[at]), -at))

    def _begin(self, sequence: Sequence) -> bool:
        """Start to read a prompt, if its blocks can be had."""
        if not self.memory.admit(sequence, self._left_to_answers if self.running else 0):
            return False
        self.reading[sequence] = None
        self.counts.prompt_tokens += sequence.to_read
        self.counts.shared_tokens += sequence.read
        return True

    def _return(self, sequence: Sequence, step: Step) -> bool:
        """Bring a sequence back from the host, if it would not have to leave again at once."""
        growing = len(self.running) + 1 if self.running else 0
        if self.memory.prefixes.available < len(sequence.swapped) + growing:
            return False
        copied = self.memory.swap_in(sequence)
        if copied:
            self._copy(copied, step)
            step.returned.append(sequence)
        return bool(copied)

    # --- time -----------------------------------------------------------------------------------

    def _one_step(self, step: Step, chunks: list[Chunk], prompt: float, held: float) -> None:
        """A step that reads, or whose batch has just changed."""
        sequences = self.decoding.count
        step.decode_steps = 1 if sequences else 0
        if chunks:
            step.seconds += self.times.mixed(sequences, prompt, held, chunks)
        elif sequences:
            step.seconds += self.times.decoding(sequences, prompt, held)
        step.seconds += self._compressing(step)

    def _compressing(self, step: Step) -> float:
        return sum(self.times.compressing.at(sequence.prompt) for sequence in step.read)

    def _several_steps(self, step: Step, prompt: float, held: float, quiet_s: float) -> None:
        """Decode steps until the batch can change; their times rise evenly."""
        sequences, times = self.decoding.count, self.times
        steps = self.decoding.steps_until_change()
        first = times.decoding(sequences, prompt, held)
        last = times.decoding(sequences, prompt, held + steps - 1) if steps > 1 else first
        if not self.waiting and len(self.running) < self.limits.sequences:
            rise = (last - first) / (steps - 1) if steps > 1 else 0.0
            steps = min(steps, _steps_until(quiet_s, first, rise, steps))
            last = first + rise * (steps - 1)
        self.decoding.grow(1, steps)
        step.decode_steps = steps
        step.seconds += steps * (first + last) / 2


def _steps_until(seconds: float, first: float, rise: float, most: int) -> int:
    """The fewest steps, each longer than the one before by ``rise``, that take so many seconds."""
    if seconds == math.inf:
        return most
    middle = first - rise / 2
    root = math.sqrt(max(middle * middle + 2 * rise * seconds, 0.0))
    return max(math.ceil(2 * seconds / (middle + root)), 1)
