"""Compiles kernels for a GPU without launching any: a process of its own does, beside its parent.

    python -m kvtune.runtime.compile_only < KERNELS

The parent's own launch then finds the kernel in Triton's cache on disk. Every kernel goes through
the function that launches it, with small tensors on the CPU of the dtypes, strides and alignment
that it is launched with, since these decide what Triton compiles; the launch itself is left out.
What is compiled for nothing, or not at all, costs time and changes no result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.compiled_ahead import Kernels
from kvtune.runtime.kernels.launch import Paged, Scratch, Shape, decode

_TOKENS = 64  # of a prompt that stands for all: every stride is a multiple of the head dimension


class Aimed:
    """Takes the place of Triton's CUDA driver, so that Triton compiles for a GPU that this process
    never opens.

    Args:
        target: of ``Kernels``.
    """

    def __init__(self, target: tuple[str, int, int]) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        """The architecture that Triton compiles kernels for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self._target)

    def get_current_device(self) -> int:
        """The number of the device, which Triton asks for; no kernel is launched on it."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """The handle of the stream, which Triton asks for; no kernel is launched on it."""
        return 0

    @cached_property
    def utils(self) -> Any:
        """Triton's CUDA helpers, which the compiled launchers are linked with."""
        from triton.backends.nvidia.driver import CudaUtils

        return CudaUtils()


def compile_all(kernels: Kernels) -> None:
    """Compile each kernel; one that fails is skipped, and compiled where it is launched."""
    from triton.runtime import driver

    driver.set_active(Aimed(kernels.target))
    _only_compiling()
    for work in WORK:
        for call in work(kernels):
            with suppress(Exception):
                call()


def _only_compiling() -> None:
    """Replace Triton's launch, so that a call compiles its kernel and does not run it."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        with suppress(Exception):
            _built_launcher(kernel)
        return kernel

    JITFunction.run = compiled


def _built_launcher(kernel: Any) -> None:
    """The C code that passes a kernel its arguments, which some versions of Triton compile too."""
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(kernel.src, kernel.metadata)


def _decode(kernels: Kernels) -> list[Callable[[], object]]:
    """Attention of new tokens, a kernel for each set of formats."""
    q = torch.empty(1, kernels.group, kernels.head_dim, dtype=getattr(torch, kernels.dtype))
    scratch = Scratch(1, 1, kernels.group, kernels.head_dim, "cpu")

    def call(pairs: tuple[int, ...], shape: dict[str, int | None]) -> Callable[[], object]:
        layer = _paged(kernels.head_dim, pairs)
        return lambda: decode(q, layer, scratch, kernels.scale, shape=Shape(**shape))  # type: ignore[arg-type]

    return [call(pairs, shape) for pairs, shape in kernels.decode]


def _store(kernels: Kernels) -> list[Callable[[], object]]:
    """Writing prompts into pages, a kernel for each layout."""
    from kvtune.runtime.cache.backend import Writing
    from kvtune.runtime.cache.triton_backend import TritonBackend

    shape = kernels.kv_heads, _TOKENS, kernels.head_dim
    keys = torch.zeros(shape, dtype=getattr(torch, kernels.dtype))
    layer, numbers = _paged(kernels.head_dim, ()), torch.zeros(_TOKENS, dtype=torch.int32)
    records = torch.zeros(1, 5, dtype=torch.int32)

    def call(layout: PageLayout) -> Callable[[], object]:
        writing = Writing(layout, keys, keys, numbers, records, layer.fp8_scales)
        return lambda: TritonBackend().write(layer.pool, writing)

    return [call(PageLayout(kernels.head_dim, *names)) for names in kernels.stored]


def _column_sums(kernels: Kernels) -> list[Callable[[], object]]:
    """The attention that each key of a prompt receives."""
    if not kernels.column_sums:
        return []
    from kvtune.runtime.kernels.columns import column_sums

    q, k = (
        torch.empty(heads, _TOKENS, kernels.head_dim, dtype=getattr(torch, kernels.dtype))
        for heads in (kernels.query_heads, kernels.kv_heads)
    )
    return [lambda: column_sums(q, k, kernels.scale)]


def _surroundings(kernels: Kernels) -> list[Callable[[], object]]:
    """What surrounds attention in a step, and the launch that rotates and appends."""
    if kernels.widths is None:
        return []
    from kvtune.runtime.cache.backend import Growing
    from kvtune.runtime.cache.triton_backend import TritonBackend
    from kvtune.runtime.kernels.elementwise import add_rms_norm, gated, rms_norm
    from kvtune.runtime.rotation import Rotation

    dtype, (width, inner) = getattr(torch, kernels.dtype), kernels.widths
    row = torch.empty(1, 1, width, dtype=dtype)
    gate, up = torch.empty(1, 1, 2 * inner, dtype=dtype).split(inner, -1)
    q, k, v = _projected(kernels, dtype)
    angles = torch.empty(1, 1, kernels.head_dim, dtype=dtype)
    layer, rows = _paged(kernels.head_dim, ()), torch.zeros(kernels.kv_heads, dtype=torch.int32)
    rotation = Rotation(q, k, angles, angles)
    return [
        lambda: rms_norm(row, row[0, 0], 1e-5, False),
        lambda: add_rms_norm(row, row, row[0, 0], 1e-5),
        lambda: gated(gate, up, False),
        lambda: TritonBackend().append_rotated(layer, Growing(rows, rows), rotation, v[:, :, 0]),
    ]


def _projected(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of one token, parts of one product as ``fuse`` makes them."""
    heads = kernels.query_heads, kernels.kv_heads, kernels.kv_heads
    every = torch.empty(1, 1, sum(heads) * kernels.head_dim, dtype=dtype)
    parts = every.split([count * kernels.head_dim for count in heads], -1)
    return [part.view(1, 1, -1, kernels.head_dim).transpose(1, 2) for part in parts]


def _paged(head_dim: int, pairs: tuple[int, ...]) -> Paged:
    """The page tables of a layer of one page, whose contents no kernel reads."""
    numbers = torch.zeros(2 * _TOKENS, dtype=torch.int32)
    scales, tiles = torch.ones(_TOKENS, 2), torch.zeros(1, 16, dtype=torch.int32)
    pool = torch.zeros(4 * head_dim * _TOKENS, dtype=torch.uint8)
    return Paged(pool, numbers, numbers, scales, tiles, pairs, head_dim)


WORK = _decode, _store, _column_sums, _surroundings

if __name__ == "__main__":
    compile_all(Kernels.of_text(sys.stdin.read()))
