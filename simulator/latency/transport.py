"""CacheGen's controller: which level of each chunk is sent, or its text, as bandwidth changes.

After Liu et al., "CacheGen", SIGCOMM 2024, arXiv 2310.07240. Chunks are sent one after the other;
a chunk is decoded while the next one travels; a chunk that is sent as text is recomputed instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TEXT = "text"


@dataclass(frozen=True)
class Chunk:
    """One part of a prompt.

    Args:
        level_bytes: encoded, by level, best level first.
        text_bytes: of its tokens.
        recompute_s: what its prefill takes.
        decode_s: what decoding takes, whatever the level.
    """

    level_bytes: dict[str, int]
    text_bytes: int
    recompute_s: float
    decode_s: float = 0.0

    def sent_bytes(self, choice: str) -> int:
        """How many bytes travel."""
        return self.text_bytes if choice == TEXT else self.level_bytes[choice]


@dataclass(frozen=True)
class Delivery:
    """What was sent, and when all of it was in the cache.

    Args:
        choices: level of each chunk, or ``TEXT``.
        sent_bytes: in all.
        ready_s: when the last chunk was decoded or recomputed.
        within: whether that was within the time allowed.
    """

    choices: tuple[str, ...]
    sent_bytes: int
    ready_s: float
    within: bool


@dataclass(frozen=True)
class State:
    """What a rule may look at before it chooses for a chunk.

    Args:
        index: of the chunk.
        elapsed_s: since the request.
        bandwidth_bytes_per_s: what the previous chunk was sent at; before the first, the trace's
            first.
        next_bytes_per_s: the trace's for this chunk, which no server knows in advance.
    """

    index: int
    elapsed_s: float
    bandwidth_bytes_per_s: float
    next_bytes_per_s: float


Rule = Callable[[Sequence[Chunk], State, float], str]


def deliver(
    chunks: Sequence[Chunk], trace_bytes_per_s: Sequence[float], allowed_s: float, rule: Rule
) -> Delivery:
    """Send every chunk as the rule says.

    Args:
        chunks: of the prompt, in order.
        trace_bytes_per_s: bandwidth while each chunk travels.
        allowed_s: time to first token that is asked for.
        rule: ``as_published`` or ``as_released``.
    """
    arrived = ready = 0.0
    choices: list[str] = []
    for index, (chunk, bandwidth) in enumerate(zip(chunks, trace_bytes_per_s, strict=True)):
        known = trace_bytes_per_s[max(index - 1, 0)]
        choice = rule(chunks, State(index, arrived, known, bandwidth), allowed_s)
        choices.append(choice)
        arrived += chunk.sent_bytes(choice) / bandwidth
        work = chunk.recompute_s if choice == TEXT else chunk.decode_s
        ready = max(arrived, ready) + work
    sent = sum(chunk.sent_bytes(choice) for chunk, choice in zip(chunks, choices, strict=True))
    return Delivery(tuple(choices), sent, ready, ready <= allowed_s)


def as_published(chunks: Sequence[Chunk], state: State, allowed_s: float) -> str:
    """The paper's rule: text where all that is left can be recomputed in time; else the best level
    at which all that is left arrives in time at the bandwidth last seen; else the smallest."""
    left, remaining_s = chunks[state.index :], allowed_s - state.elapsed_s
    if sum(chunk.recompute_s for chunk in left) <= remaining_s:
        return TEXT
    for level in left[0].level_bytes:
        wanted = sum(chunk.level_bytes[level] for chunk in left)
        if wanted / state.bandwidth_bytes_per_s <= remaining_s:
            return level
    return min(left[0].level_bytes, key=left[0].level_bytes.__getitem__)


def as_released(chunks: Sequence[Chunk], state: State, allowed_s: float) -> str:
    """The released code's rule: the best level whose chunk arrives within its equal share of the
    time at the bandwidth that it will meet (it reads the trace ahead); else text."""
    chunk, share_s = chunks[state.index], allowed_s / len(chunks)
    for level, size in chunk.level_bytes.items():
        if size / state.next_bytes_per_s < share_s:
            return level
    return TEXT
