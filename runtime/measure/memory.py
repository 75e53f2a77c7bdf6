"""Device memory that is neither weights nor cache: context, libraries, workspaces and graphs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvtune.common.units import MIB
from kvtune.profiles.models import find_model
from kvtune.runtime.measure.monitor import Monitor


@dataclass(frozen=True)
class MemoryReading:
    """MiB each; None where the driver could not be asked.

    Args:
        visible: all that a process can see.
        context: of a process before its first tensor.
        libraries: what kernels and graphs take beside the allocator, after a decode step.
        workspace: what the allocator holds beside weights and cache, after a decode step.
    """

    visible: float
    context: float | None
    libraries: float | None
    workspace: float


def used_before(monitor: Monitor) -> int | None:
    """Device memory in use before this process has a context; to be asked first of all."""
    return monitor.used_bytes()


def read_memory(monitor: Monitor, before: int | None) -> MemoryReading:
    """Start a context, replay one decode step of a shallow model, and see what it all took.

    Args:
        monitor: asked for the memory in use.
        before: what was in use before the context.
    """
    import torch

    from kvtune.runtime.measure.plain_model import PlainDecoder
    from kvtune.runtime.measure.timer import capture

    torch.cuda.synchronize()
    started = monitor.used_bytes()
    model = PlainDecoder(replace(find_model("llama-8b"), layers=2), "cuda")
    model.hold(1, 1024)
    model.step()
    torch.cuda.synchronize()
    capture(model.step)()
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    ended = monitor.used_bytes()
    context = _difference(started, before)
    return MemoryReading(
        visible=torch.cuda.mem_get_info()[1] / MIB,
        context=context,
        libraries=_difference(ended, started, reserved),
        workspace=(reserved - model.weight_bytes - model.cache_bytes) / MIB,
    )


def _difference(more: int | None, *less: int | None) -> float | None:
    if more is None or any(part is None for part in less):
        return None
    return max(0.0, (more - sum(part or 0 for part in less)) / MIB)
