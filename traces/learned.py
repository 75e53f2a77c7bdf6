"""Matrices fitted to a model once, before any prompt: rotations of its heads, kernels that fuse.

They belong to a model's fingerprint, are made by ``kvtune.runtime.learn`` and kept in the cache
folder. All tensors have the layer as their first axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic, cache_dir, sha256
from kvtune.common.stored import read_bytes

if TYPE_CHECKING:
    from torch import Tensor


def learned(fingerprint: str) -> dict[str, Tensor]:
    """All that was fitted to a model, by name; empty where nothing was."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = _stored(fingerprint)
    if not path.is_file():
        return {}
    try:
        found: dict[str, Tensor] = load(read_bytes(path))
    except SafetensorError as error:
        raise KvtuneError(
            f"is no safetensors file: {error}", where=str(path), hint="remove it and learn again."
        ) from error
    return found


def learned_layers(fingerprint: str, layers: int, device: str = "cpu") -> list[dict[str, Tensor]]:
    """The same layer by layer, float32.

    Raises:
        KvtuneError: the file is another model's.
    """
    found = {name: tensor.float().to(device) for name, tensor in learned(fingerprint).items()}
    for name, tensor in found.items():
        if not tensor.ndim or len(tensor) != layers:
            raise KvtuneError(
                f"{name!r} is not of {layers} layers", where=str(_stored(fingerprint)),
                hint="remove it and learn again.",
            )  # fmt: skip
    return [{name: tensor[layer] for name, tensor in found.items()} for layer in range(layers)]


def digest_of_learned(fingerprint: str) -> str:
    """Hash of all that was fitted to a model; "" where nothing was."""
    path = _stored(fingerprint)
    return sha256(path) if path.is_file() else ""


def keep_learned(fingerprint: str, tensors: Mapping[str, Tensor]) -> Path:
    """Add tensors to what was learned of a model; returns the file."""
    from safetensors.torch import save

    path = _stored(fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        name: x.contiguous().cpu() for name, x in (learned(fingerprint) | dict(tensors)).items()
    }
    with atomic(path) as draft:
        draft.write_bytes(save(whole))
    return path


def _stored(fingerprint: str) -> Path:
    return cache_dir() / "calibrations" / f"{fingerprint[:16]}.safetensors"
