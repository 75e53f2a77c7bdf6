"""One step of a serving engine: requests whose prompts are read, and requests that generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvtune.runtime.serving.reading import Prompts


class BlockTable(Protocol):
    """The engine's table of blocks, of the requests of one step."""

    def first(self) -> list[int]:
        """The first block of each request; 0 of rows that only pad the step."""

    def blocks(self, row: int, start: int, stop: int) -> list[int]:
        """Some of one request's blocks."""


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    Args:
        prompts: requests that read their prompt, if any do.
        generating: rows that append one token each, rows of nobody in a captured step included.
        places: where in the step's tokens; ``[n]``, or a slice of neighbours.
    """

    prompts: Prompts | None
    generating: int
    places: Tensor | slice
