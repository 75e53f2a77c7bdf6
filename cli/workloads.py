"""The workloads that options name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kvtune.traces.workloads import Workload, small, standard

_USER_SAMPLES = {"small": 3, "full": 8}


def named_workload(
    name: Literal["small", "full"], seed: int, texts: Sequence[Path] = ()
) -> Workload:
    """``small`` or ``full``; with texts of the user's, cut from those alone."""
    workload = small(seed) if name == "small" else standard(seed)
    if not texts:
        return workload
    each = {"user": _USER_SAMPLES[name]}
    counts = dict.fromkeys(workload.counts, each)
    return replace(workload, counts=counts, files=tuple(texts))
