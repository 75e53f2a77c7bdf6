"""Device memory that is neither weights nor cache: context, libraries, workspaces and graphs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvtune.common.units import MIB
from kvtune.profiles.models import find_model


@dataclass(frozen=True)
class MemoryReading:
    """Memory of a process that decodes, in MiB each.

    Args:
        visible: all that a process can see.
        context: of a process before its first tensor.
        libraries: what kernels and graphs take beside the allocator, after a decode step.
        workspace: what the allocator holds beside weights and cache, after a decode step.
    """

    visible: float
    context: float
    libraries: float
    workspace: float


def read_memory() -> MemoryReading:
    """Start a context, replay one decode step of a shallow model, and see what it all took.

    The GPU must be this process's alone; what others hold would be counted as context.
    """
    import torch

    from kvtune.runtime.measure.plain_model import PlainDecoder
    from kvtune.runtime.measure.timer import capture

    torch.zeros(1, device="cuda")
    context = _beside_the_allocator()
    torch.cuda.empty_cache()
    model = PlainDecoder(replace(find_model("llama-8b"), layers=2), "cuda")
    model.hold(1, 1024)
    replay = capture(model.step)
    replay()
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    return MemoryReading(
        visible=torch.cuda.mem_get_info()[1] / MIB,
        context=context / MIB,
        libraries=max(0, _beside_the_allocator() - context) / MIB,
        workspace=(reserved - model.weight_bytes - model.cache_bytes) / MIB,
    )


def _beside_the_allocator() -> int:
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())
