"""Steps that are the same operations again, replayed as a CUDA graph without the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Steps:
    """Runs a step of the device: as a graph once the same operations come a second time.

    Args:
        step: waits for nothing on the device, and leaves what outlives it where it lies.
        captures: whether there is a device with graphs and a step that may be captured.
    """

    def __init__(self, step: Callable[[], None], *, captures: bool) -> None:
        self._step, self.captures = step, captures
        self._pattern: Hashable = None
        self._graph: Any = None
        self.replayed = 0
        self.fault = ""  # why nothing is captured any longer

    def run(self, pattern: Hashable) -> None:
        """One step; steps of one pattern are the same operations on the same memory."""
        alike, self._pattern = pattern == self._pattern, pattern
        if not (alike and self.captures):
            self._graph = None
            self._step()
            return
        if self._graph is None and not self._capture():
            self._step()
            return
        self._graph.replay()
        self.replayed += 1

    def _capture(self) -> bool:
        """Record the step, which runs nothing of it; whether that went well."""
        try:
            self._graph = self._recorded()
        except RuntimeError as error:
            self.fault, self.captures = f"{type(error).__name__}: {error}"[:300], False
        return self.captures

    def _recorded(self) -> Any:
        """A graph of the step, with memory of its own: that of the last one goes with it."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph
