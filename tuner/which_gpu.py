"""The smallest card on which a search finds a plan that keeps to everything that was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.common.errors import DoesNotFitError
from kvtune.common.progress import Progress
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import SearchResult
from kvtune.tuner.search import run_search


@dataclass(frozen=True)
class Tried:
    """A card that was searched for.

    Args:
        gpu: its name.
        memory_bytes: that could be used of it.
        works: whether its plan keeps to all that was asked, the loss included.
        reason: what it serves, or why not.
    """

    gpu: str
    memory_bytes: int
    works: bool
    reason: str


def smallest_gpu(
    requests: Sequence[SearchRequest], progress: Progress
) -> tuple[list[Tried], SearchResult]:
    """Search card by card, least memory first, and stop at the first that works.

    Under one limit for all of them the smaller card comes first, of equal ones the slower.

    Args:
        requests: the same search on different cards, each with a run directory of its own.
        progress: told of every search.

    Raises:
        DoesNotFitError: none of the cards works; with the reason of the largest.
    """
    tried: list[Tried] = []
    for request in sorted(requests, key=_size):
        progress.note(f"searching for {request.gpu.name}")
        slug, memory = request.gpu.slug, request.memory_bytes
        try:
            result = run_search(request, progress)
        except DoesNotFitError as error:
            tried.append(Tried(slug, memory, False, error.message))
            continue
        loss = result.quality.kl.value
        serves = f"{result.sequences} of {result.context_tokens} tokens, KL {loss:.2g}"
        works = loss <= request.largest_kl
        tried.append(Tried(slug, memory, works, serves))
        if works:
            return tried, result
    last = tried[-1]
    raise DoesNotFitError(
        f"none of {len(tried)} cards does what was asked; the largest, {last.gpu}: {last.reason}",
        hint="raise --max-kl or a limit, shorten --context, or list larger cards.",
    )


def _size(request: SearchRequest) -> tuple[float, ...]:
    """By what cards are put in order: what may be used of them, then what they are."""
    gpu = request.gpu
    return request.memory_bytes, gpu.visible_bytes, gpu.bandwidth.value
