"""The plans of a finished search in columns, as ``plans.jsonl`` has them: read seven times as fast.

One safetensors file with a sha256 of its own columns and of the ``plans.jsonl`` that they were made
of. Nothing depends on it: where that hash, a shape, a type or a bound is not as it must be,
``plans.jsonl`` itself is read, as it is of a search that still runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from kvtune.common.bounds import LARGEST_LOSS, LARGEST_WHOLE, Parameter
from kvtune.common.files import atomic
from kvtune.tuner.explore import COLUMNS_FILE
from kvtune.tuner.explore.plans import ARRAYS, Plans, Size, is_inside

_DIGEST = "kvtune_columns_1_sha256"  # one key: of several the order in a file is by chance
_KINDS = {"heads": np.uint16, "kl": np.float64, "held_out": np.float64, "by_kind": np.float64}
_LEAST = {"context_tokens": 1, "sequences": 1}
_PARAMETERS = TypeAdapter(tuple[dict[str, Parameter], ...])


def write_columns(folder: Path, plans: Plans, text: bytes) -> None:
    """Write the columns beside the ``plans.jsonl`` whose content is ``text``."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(getattr(plans, name)) for name in ARRAYS}
    arrays["parameters"] = np.frombuffer(json.dumps(plans.parameters).encode(), np.uint8)
    about = {_DIGEST: _digest(text, arrays)}
    with atomic(folder / COLUMNS_FILE) as temporary:
        temporary.write_bytes(save(arrays, metadata=about))


def read_columns(folder: Path, text: bytes, size: Size) -> Plans | None:
    """The plans of the ``plans.jsonl`` whose content is ``text``; None where they must be parsed.

    Args:
        folder: the run directory.
        text: content of its ``plans.jsonl``.
        size: what every plan must fit.
    """
    path = folder / COLUMNS_FILE
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in (*ARRAYS, "parameters")}
        if about.get(_DIGEST) != _digest(text, arrays):
            return None
        parameters = _PARAMETERS.validate_json(arrays.pop("parameters").tobytes(), strict=True)
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError):
        return None
    if not _fit(arrays, len(parameters), size):
        return None
    return Plans(**arrays, parameters=parameters, tier=size.tier)


def _digest(text: bytes, arrays: dict[str, Any]) -> str:
    """Of the lines and of the columns made of them."""
    found = hashlib.sha256(text)
    for name in (*ARRAYS, "parameters"):
        found.update(arrays[name])
    return found.hexdigest()


def _fit(arrays: dict[str, Any], count: int, size: Size) -> bool:
    """Whether all columns have the types, the shapes and the bounds of a study's plans."""
    shapes = {
        "kl": (count, 3),
        "held_out": (count, 3),
        "by_kind": (count, size.kinds),
        "heads": (count, size.heads),
    }
    for name, column in arrays.items():
        if column.dtype != _KINDS.get(name, np.int64) or column.shape != shapes.get(name, (count,)):
            return False
        most = LARGEST_LOSS if column.dtype == np.float64 else LARGEST_WHOLE
        most = size.options - 1 if name == "heads" else most
        # NaN is neither; an empty column is within any bounds.
        if not ((column >= _LEAST.get(name, 0)) & (column <= most)).all():
            return False
    return bool(is_inside(arrays["kl"]).all() and is_inside(arrays["held_out"]).all())
