"""What the datasheet tier assumes: achieved shares of the sheet's figures, floors, intervals.

The three numbers of a prior are the likely value and the ends of its 10-90 % interval.
Efficiencies are shares of the datasheet's figure; floors are seconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class Prior(NamedTuple):
    """A likely value and the ends of its interval."""

    value: float
    low: float
    high: float


# Decode attention, fitted on the tables of aiconfigurator-core 0.12.0: ten systems, three serving
# stacks, 32 query and 8 KV heads of 128 ("achieved_shares" of benchmarks/hardware_tables.py).
# t = floor + bytes / (efficiency x bandwidth) + sequences x per_sequence, a layer.
ATTENTION_EFFICIENCY = Prior(0.88, 0.77, 0.94)
ATTENTION_FLOOR_S = Prior(9e-6, 7e-6, 14e-6)
ATTENTION_PER_SEQUENCE_S = Prior(0.12e-6, 0.07e-6, 0.31e-6)
# Attention over quantised pages of narrower heads than a card's pages were measured with, over what
# their bytes say: one run of heads of 64 in int4, 16 and 5,617 sequences on an H100
# (benchmarks/results/validate-h100.txt).
NARROW_PAGES = Prior(1.3, 1.0, 1.6)
ATTENTION_COMPUTE = Prior(0.52, 0.43, 0.63)  # prompts of 8,192 tokens, same tables

# Products of four rows, which read their matrix, by kind of memory, same tables.
# Shared LPDDR is a guess: one gets what the host leaves.
GEMV_EFFICIENCY = {
    "hbm": Prior(0.76, 0.71, 0.82),
    "gddr": Prior(0.89, 0.74, 0.93),
    "lpddr": Prior(0.78, 0.62, 0.90),
}

# Matrix products of 8,192 rows over the dense peak of their format, same tables; of fp8 with one
# scale a tensor.
GEMM_EFFICIENCY = Prior(0.73, 0.61, 0.84)
GEMM_FP8_EFFICIENCY = Prior(0.55, 0.46, 0.72)

# What is left of the bf16 efficiency when weights are narrower. Low ends: gpt-fast on an A100
# (68.5 % in bf16, 52 % in int8, 42 % in int4); high ends: kernels of the Marlin kind.
# fp8: products of four rows, same tables.
WEIGHT_FORMAT_FACTOR = {
    "bf16": Prior(1.0, 1.0, 1.0),
    "fp8": Prior(0.70, 0.56, 0.95),
    "int8": Prior(0.86, 0.76, 0.97),
    "int4": Prior(0.76, 0.61, 0.93),
}

# The same for the cache of any stack, by format. Eight bits, of floats and of integers: fp8 in the
# tables of aiconfigurator-core; fewer bits: reports from half to all of the bf16 speed; what kvtune
# alone reads: as its pages were measured.
_EIGHT_BITS = Prior(0.90, 0.70, 0.99)

# Attention over kvtune's own pages: bytes a second over those of bf16, of an H200. Likely from 256
# MB to 1 GB of what bf16 takes; low ends from 64 MB on, or lower where nothing was measured there,
# since a tile's queries and outputs are made ready however short it is.
PAGES_FACTOR = {
    "bf16": Prior(1.0, 1.0, 1.0),
    # benchmarks/results/formats-kernels-h200.json
    "int8": Prior(0.90, 0.67, 0.94),
    "int4": Prior(0.79, 0.52, 0.86),
    "int3": Prior(0.55, 0.32, 0.59),  # unpacking takes longer: its third bits lie apart
    "int2": Prior(0.54, 0.28, 0.59),
    "rotated_int8": Prior(0.85, 0.62, 0.93),
    "rotated_int4": Prior(0.74, 0.43, 0.84),
    "rotated_int3": Prior(0.54, 0.28, 0.61),
    "rotated_int2": Prior(0.54, 0.24, 0.62),
    # benchmarks/results/formats-blocks-h200.json
    "fp8": Prior(0.90, 0.70, 0.94),
    "mxfp8": Prior(0.86, 0.62, 0.91),
    "mxfp4": Prior(0.56, 0.35, 0.60),
    # Of 2.25 bits 0.22 and 0.28 since tiles begin sooner (formats-kernels-2-h200.json), of 2 and 3
    # bits up to 0.35 before; the low end is the older kernel's.
    "allocated": Prior(0.24, 0.08, 0.36),
    # benchmarks/results/formats-blocks-2-h200.json
    "fp8_token_head": Prior(0.89, 0.62, 0.94),
    "fp8_unscaled": Prior(0.90, 0.62, 0.94),
    "int8_token_head": Prior(0.91, 0.62, 0.96),
    "int4_token_head": Prior(0.78, 0.45, 0.86),
    "hqq4": Prior(0.78, 0.45, 0.84),
    "q4_0": Prior(0.71, 0.40, 0.78),  # as it is rotated
    "turboquant4": Prior(0.42, 0.25, 0.45),
    "turboquant3": Prior(0.21, 0.12, 0.23),
    "turboquant2": Prior(0.34, 0.17, 0.38),
    "hqq2": Prior(0.55, 0.26, 0.61),
    # Not measured: as others of their bits and scales.
    "q8_0": Prior(0.86, 0.60, 0.93),
    "nvfp4": Prior(0.56, 0.30, 0.66),
    "turboquant1": Prior(0.25, 0.10, 0.40),
}
CACHE_FACTOR = PAGES_FACTOR | {
    "fp8": _EIGHT_BITS,
    "int8": _EIGHT_BITS,
    "int4": Prior(0.55, 0.30, 0.80),
    "int3": Prior(0.44, 0.22, 0.70),
    "int2": Prior(0.32, 0.15, 0.60),
}
# A format that nobody has reported on: between a tenth of the bf16 efficiency and all of it.
UNREPORTED_CACHE_FACTOR = Prior(0.4, 0.1, 1.0)

# Kernels of a layer other than attention (projections, norms, rotary, activation): floors.
OTHER_KERNELS_S = Prior(15e-6, 8e-6, 28e-6)
ROUTING_KERNELS_S = Prior(12e-6, 6e-6, 30e-6)  # more of them in a mixture of experts

# The host. A replayed graph costs one launch and the sampler; eager mode costs the host's own
# time a layer, whatever the GPU does meanwhile: 2.1-2.8 ms for an unfused loop on one H100 host,
# about 1 ms in an eager serving engine (vllm issue 42058), less on fast hosts.
GRAPH_HOST_S = Prior(150e-6, 50e-6, 400e-6)
EAGER_HOST_LAYER_S = Prior(1.2e-3, 0.5e-3, 2.8e-3)
EAGER_HOST_STEP_S = Prior(1e-3, 0.3e-3, 3e-3)

# What the terms do not explain. With it a datasheet-only card is within about 15 % in the median
# and 30 % at the 90th percentile.
UNEXPLAINED = 0.2


# One direction of the link between GPUs of a host, bytes a second, where an architecture has one of
# its own (NVLink 3, 4 and 5, from the data sheets); other cards talk over the host link.
LINK_BYTES_PER_S = {
    ("ampere", "hbm"): 300e9,
    ("hopper", "hbm"): 450e9,
    ("blackwell", "hbm"): 900e9,
}
LINK_SHARE = Prior(0.7, 0.5, 0.9)
SUM_FLOOR_S = Prior(8e-6, 4e-6, 25e-6)  # of a small sum over GPUs (aiconfigurator-core's tables)


def cache_factor(name: str, end: str) -> float:
    """Efficiency of reading a cache in a format, over that of bf16."""
    factor: float = getattr(CACHE_FACTOR.get(name, UNREPORTED_CACHE_FACTOR), end)
    return factor


def pages_as(name: str, other: str, end: str) -> float:
    """Bytes of pages in another format that are read in the time of one byte in this one."""
    known, mine = (PAGES_FACTOR.get(each, UNREPORTED_CACHE_FACTOR) for each in (other, name))
    slower: float = known.value / getattr(mine, {"low": "high", "high": "low"}.get(end, end))
    return slower
