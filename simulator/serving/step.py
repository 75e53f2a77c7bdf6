"""One step of the engine: what it may hold, what it does, and what has been counted of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvtune.profiles.elsewhere import StackChoice
from kvtune.simulator.serving.sequence import Sequence

Reading = Literal["chunks", "whole", "alone"]
READING: dict[StackChoice, Reading] = {
    "kvtune": "chunks", "vllm": "chunks", "sglang": "alone", "trtllm": "whole",
}  # fmt: skip
"""How each stack reads prompts unless it is told otherwise."""


@dataclass(frozen=True)
class Limits:
    """What a step may hold.

    Args:
        sequences: at once.
        step_tokens: new tokens of a step, decoded and read.
        order: who of those that wait comes next: the first to arrive, or whose prompt is held to
            the largest share.
        reading: prompts are read in chunks beside decoding, whole beside decoding, or in steps of
            their own.
        hold_steps: decode steps for which prompts may be held back until they fill a step.
        poll_steps: decode steps between which the engine does not look for new requests.
        left_to_answers: share of the blocks that a new request leaves to those that run, if any do;
            None for what the stack does (kvtune's vLLM plugin leaves some).
    """

    sequences: int
    step_tokens: int
    order: Literal["arrival", "cached"] = "arrival"
    reading: Reading = "chunks"
    hold_steps: int = 0
    poll_steps: int = 1
    left_to_answers: float | None = None


@dataclass
class Step:
    """One step, or several alike in a row.

    Args:
        seconds: that it takes in all.
        decode_steps: tokens that each decoding sequence gets; 0 where none decodes.
        admitted: sequences that were taken from the queue.
        read: sequences whose prompt is complete afterwards.
        returned: sequences that come back from the host and decode from the next step on.
    """

    seconds: float = 0.0
    decode_steps: int = 0
    admitted: list[Sequence] = field(default_factory=list)
    read: list[Sequence] = field(default_factory=list)
    returned: list[Sequence] = field(default_factory=list)


@dataclass
class Counts:
    """What happened so far.

    Args:
        preemptions: sequences that gave their blocks back, also by moving to the host.
        swaps: those of them that moved to the host.
        copied_blocks: between card and host, both ways.
        prompt_tokens: of all admitted, again at every admission.
        shared_tokens: those of them that were already held.
        steps: of the engine.
        decoded: tokens that decode steps gave.
    """

    preemptions: int = 0
    swaps: int = 0
    copied_blocks: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    steps: int = 0
    decoded: int = 0
