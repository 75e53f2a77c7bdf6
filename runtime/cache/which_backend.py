"""Who works on a device's pages: kernels where there is a GPU and Triton, else plain torch."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch

from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.plain_backend import PlainBackend


def backend_type(device: Any) -> type[Backend]:
    """The backend of a device: kernels where there is a GPU and Triton; else plain torch."""
    if torch.device(device).type == "cuda" and importlib.util.find_spec("triton"):
        from kvtune.runtime.cache.triton_backend import TritonBackend  # only where Triton is

        return TritonBackend
    return PlainBackend


def backend_for(device: Any) -> Backend:
    """One of the type that ``backend_type`` says; with a warning where that is slow."""
    found = backend_type(device)
    if not found.has_kernels:
        warnings.warn(
            f"kvtune's kernels need a CUDA device and Triton; on {device} the cache answers "
            "rightly in plain torch, slowly",
            stacklevel=2,
        )
    return found()
