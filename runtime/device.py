"""What times on a device and knows its memory."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch

from kvtune.common.errors import KvtuneError
from kvtune.runtime.measure.monitor import Monitor, open_monitor

Found = TypeVar("Found")

_FULL = ("out of memory", "ALLOC_FAILED")  # of the driver, of Triton, of cuBLAS


class Bench(Protocol):
    """A device that times calls and knows its memory."""

    def seconds(self, call: Callable[[], object]) -> float:
        """What a call takes, until the device has done all of it."""

    def forget_peak(self) -> None:
        """Begin to look for the most memory anew."""

    def release(self) -> None:
        """Give the device what earlier runs have left, so that the next one finds it in one piece;
        then as ``forget_peak``.
        """  # fmt: skip

    def peak_bytes(self) -> int:
        """The most memory that tensors took since."""

    def look(self) -> None:
        """See how much of the device is in use; after whatever gives memory back it is too late."""

    def device_bytes(self) -> int | None:
        """The most that was seen since, now included, whoever used it; None where unknown."""

    def reserved_bytes(self) -> int:
        """The most that the allocator of tensors has taken since, in use or not."""

    def outside_bytes(self) -> int:
        """What the process takes beside the allocator of tensors, now."""

    def capped(self, limit_bytes: int) -> AbstractContextManager[int]:
        """Hold the process to a limit until the block ends; what it takes beside tensors."""

    def available_bytes(self) -> int:
        """What tensors may still take."""


class CudaBench:
    """The current CUDA device, by its own events.

    Args:
        monitor: what the driver says of the device; the driver's own unless given.
    """

    def __init__(self, monitor: Monitor | None = None) -> None:
        self._monitor = monitor or open_monitor(torch.cuda.current_device())
        self._most: int | None = None

    def seconds(self, call: Callable[[], object]) -> float:
        """Between two events around the call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def forget_peak(self) -> None:
        """After what earlier runs have left was dropped; caches refer to themselves."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        self._most = None

    def release(self) -> None:
        """Dropped, and not kept by torch's allocator either; no captured graph may be in use.

        Every stream that a graph was captured from has left cuBLAS a workspace.
        """
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self.forget_peak()

    def peak_bytes(self) -> int:
        """As torch's allocator counts them: weights, cache and activations."""
        return int(torch.cuda.max_memory_allocated())

    def reserved_bytes(self) -> int:
        """Bytes that torch's allocator has reserved."""
        return int(torch.cuda.max_memory_reserved())

    def outside_bytes(self) -> int:
        """Context, libraries and kernels, where the driver tells processes apart."""
        free, total = torch.cuda.mem_get_info()
        used = total - free - self._monitor.others_bytes()
        return max(int(used - torch.cuda.memory_reserved()), 0)

    @contextmanager
    def capped(self, limit_bytes: int) -> Iterator[int]:
        """torch's allocator is given the limit, less what this process takes beside it."""
        outside = self.outside_bytes()
        share = (limit_bytes - outside) / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0))
        try:
            yield outside
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def look(self) -> None:
        """Ask NVML what is used now, and keep the most that was seen."""
        used = self._monitor.used_bytes()
        self._most = used if used is None else max(used, self._most or 0)

    def device_bytes(self) -> int | None:
        """By NVML; torch's allocator gives nothing back but when a graph is captured."""
        self.look()
        return self._most

    def available_bytes(self) -> int:
        """Free on the device, or held by torch's allocator and not in use."""
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + held)


@contextmanager
def collecting_little() -> Iterator[None]:
    """Let the benches look for garbage among what is made in the block alone.

    A process that has loaded a model and searched holds millions of objects, through which every
    collection would go, and every run that is timed begins with some.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def bench_for(device: str) -> Bench:
    """What times on this device.

    Raises:
        KvtuneError: nothing does; the message says why.
    """
    if torch.device(device).type != "cuda":
        raise KvtuneError("no GPU here, so that nothing was timed")
    if not importlib.util.find_spec("triton"):
        raise KvtuneError("the GPU's kernels need Triton, which is not installed")
    return CudaBench()


def unless_full(call: Callable[[], Found]) -> Found | None:
    """What a call finds; None if the device's memory does not suffice for it."""
    try:
        return call()
    except RuntimeError as error:
        if not _is_full(error):
            raise
        return None


def _is_full(error: RuntimeError) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in _FULL)
