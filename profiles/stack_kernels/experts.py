"""Routed experts of a layer by the stacks' tables."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import StackTables
from kvtune.profiles.stack_kernels.curve import Curve
from kvtune.profiles.stack_kernels.grid import FloatArray
from kvtune.profiles.stack_kernels.matrices import UNMEASURED


class ExpertShape(NamedTuple):
    """What decides how long routed experts take.

    ``shares`` GPUs have a share of each expert's width, and ``whole`` as many groups of GPUs have
    experts of their own.
    """

    hidden: int
    intermediate: int
    active: int
    experts: int
    shares: int = 1
    whole: int = 1

    def __str__(self) -> str:
        return (
            f"{self.experts} experts of {self.intermediate} x {self.hidden}, {self.active} of them "
            f"for each token, over {self.shares} x {self.whole} GPUs"
        )


# Checkpoints in fp8 have one scale a matrix or one a block, and tables have kernels of both by
# themselves: of vLLM's on an H200 the first take three times as long, on a B200 the second.
_KERNELS = {"fp8": ("fp8", "fp8_block")}


def experts_s(
    tables: StackTables, shape: ExpertShape, number_format: str, tokens: npt.ArrayLike
) -> FloatArray:
    """Seconds of one layer's routed experts on one GPU, by the faster of a format's kernels.

    Those of another stack stand in for a format that this one's table lacks.

    Raises:
        KvtuneError: no stack was measured with such experts.
    """
    names = _KERNELS.get(number_format, (number_format,))
    for each in tables.own_first():
        curves = [_curve(each, shape, name) for name in names]
        seconds = [curve.at(tokens) for curve in curves if curve is not None]
        if seconds:
            return np.asarray(np.minimum.reduce(seconds))
    raise KvtuneError(
        f"{tables.stack} on {tables.system} has no measured {shape}, in {number_format}",
        hint=UNMEASURED,
    )


@functools.lru_cache(maxsize=16)
def expert_formats(tables: StackTables) -> frozenset[str]:
    """Formats that routed experts were measured in."""
    table = tables.read("moe", "moe_perf")
    return frozenset() if table is None else frozenset(np.unique(table.columns["moe_dtype"]))


@functools.lru_cache(maxsize=512)
def _curve(tables: StackTables, shape: ExpertShape, number_format: str) -> Curve | None:
    """Of this very mixture, with tokens that crowd on some experts as they do in practice.

    Where that way to place them was not measured, as many GPUs with whole experts each, or with
    shares of all.
    """
    gpus = shape.shares * shape.whole
    for shares, whole in dict.fromkeys(((shape.shares, shape.whole), (1, gpus), (gpus, 1))):
        wanted = {
            "moe_dtype": number_format, "hidden_size": shape.hidden,
            "inter_size": shape.intermediate, "topk": shape.active, "num_experts": shape.experts,
            "moe_tp_size": shares, "moe_ep_size": whole,
        }  # fmt: skip
        rows = tables.read("moe", "moe_perf", wanted)
        for spread in ("power_law_1.01", "power_law_1.2", "balanced") if rows else ():
            found = rows.where(distribution=spread).fastest_of("num_tokens") if rows else None
            if found is not None and len(found):
                return Curve.of(found.columns["num_tokens"], found.columns["latency"] * 1e-3)
    return None
