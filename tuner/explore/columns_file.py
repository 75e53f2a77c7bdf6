"""The plans of a finished search in columns, as ``plans.jsonl`` has them: read seven times as fast.

One safetensors file with a sha256 of its own columns and one of the ``plans.jsonl`` that they were
made of. Where the lines have changed since, they are read instead, as they are of a search that
still runs. A file of columns that is not as it was written is an error: something has damaged the
run directory, and what else it damaged is not known.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from kvtune.common.bounds import LARGEST_LOSS, LARGEST_WHOLE, Parameter
from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic
from kvtune.tuner.explore import COLUMNS_FILE, PLANS_FILE
from kvtune.tuner.explore.plans import ARRAYS, Plans, Size, is_inside

_DIGESTS = "kvtune_columns_2_sha256"  # one key: of several the order in a file is by chance
_KINDS = {"heads": np.uint16, "kl": np.float64, "held_out": np.float64, "by_kind": np.float64}
_LEAST = {"context_tokens": 1, "sequences": 1}
_PARAMETERS = TypeAdapter(tuple[dict[str, Parameter], ...])


def write_columns(folder: Path, plans: Plans, text: bytes) -> None:
    """Write the columns beside the ``plans.jsonl`` whose content is ``text``."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(getattr(plans, name)) for name in ARRAYS}
    arrays["parameters"] = np.frombuffer(json.dumps(plans.parameters).encode(), np.uint8)
    about = {_DIGESTS: f"{_digest(text)} {_digest_of_columns(arrays)}"}
    with atomic(folder / COLUMNS_FILE) as temporary:
        temporary.write_bytes(save(arrays, metadata=about))


def read_columns(folder: Path, text: bytes, size: Size) -> Plans | None:
    """The plans of the ``plans.jsonl`` whose content is ``text``; None where they must be parsed.

    Args:
        folder: the run directory.
        text: content of its ``plans.jsonl``.
        size: what every plan must fit.

    Raises:
        KvtuneError: the file of columns is damaged.
    """
    path = folder / COLUMNS_FILE
    if not path.is_file():
        return None
    about, arrays = _opened(path)
    lines, _, columns = about.get(_DIGESTS, "").partition(" ")
    if not columns:
        return None  # as another version of kvtune wrote it
    if columns != _digest_of_columns(arrays):
        raise _damaged(path, "its columns are not those whose hash it holds")
    if lines != _digest(text):
        return None
    return _plans(path, arrays, size)


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What the file says of itself, and its arrays by name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, "it is no safetensors file") from error


def _plans(path: Path, arrays: dict[str, Any], size: Size) -> Plans:
    """The plans in arrays of the right names, types, shapes and bounds."""
    if set(arrays) != {*ARRAYS, "parameters"}:
        raise _damaged(path, "it has other columns than plans have")
    try:
        parameters = _PARAMETERS.validate_json(arrays.pop("parameters").tobytes(), strict=True)
    except ValueError as error:
        raise _damaged(path, "its parameters cannot be read") from error
    if not _fit(arrays, len(parameters), size):
        raise _damaged(path, "a column is not of the type, length or size that plans have")
    return Plans(**arrays, parameters=parameters, tier=size.tier)


def _damaged(path: Path, reason: str) -> KvtuneError:
    return KvtuneError(
        reason,
        where=str(path),
        hint=f"remove it: {PLANS_FILE} beside it holds the same plans, and is then read instead.",
    )


def _digest(text: bytes) -> str:
    """Of the lines that the columns were made of."""
    return hashlib.sha256(text).hexdigest()


def _digest_of_columns(arrays: dict[str, Any]) -> str:
    """Of the columns with their names, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
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
