"""Sums over GPUs that share each layer, by the stacks' tables."""

from __future__ import annotations

import functools

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import StackTables, read_table
from kvtune.profiles.stack_kernels.curve import Curve


@functools.lru_cache(maxsize=64)
def all_reduce_curve(tables: StackTables, gpus: int) -> Curve:
    """The stack's own sum in a graph, else NCCL's; more GPUs than were measured as the most."""
    own = tables.read("comm", "custom_allreduce_perf")
    if own is not None:
        graphs = [
            name for name in np.unique(own.columns.get("kernel_source", [])) if "graph" in name
        ]
        rows = own.where(kernel_source=graphs[0]) if graphs else own
        size, ranks = "message_size", "num_gpus"
    else:
        nccl = read_table(tables.folder, tables.system, "comm", "nccl", "nccl_perf")
        if nccl is None:
            raise KvtuneError(f"no communication was measured on {tables.system}")
        rows, size, ranks = (
            nccl.where(op_name="all_reduce", nccl_dtype="half"),
            "message_size",
            "num_gpus",
        )
    known = np.unique(rows.columns[ranks])
    count = int(known[np.argmin(np.abs(np.log(known / gpus)))])
    chosen = rows.where(**{ranks: count})
    return Curve.of(chosen.columns[size], chosen.columns["latency"] * 1e-3)
