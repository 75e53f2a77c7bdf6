"""One call as a CUDA graph, for benchmarks that time it without its launches."""

from __future__ import annotations

from typing import Any

import torch


def captured_call(call: Any) -> Any:
    """One call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    return captured.replay
