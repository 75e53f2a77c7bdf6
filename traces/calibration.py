"""What is measured on a model once, before any prompt: which heads retrieve, which layers suffer.

A calibration belongs to a model's fingerprint. SmolLM2's ships with the package; others are
measured by ``kvtune.runtime.calibrate`` and kept in the cache folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.common.bounds import Finite, Name, NotNegative
from kvtune.common.errors import KvtuneError
from kvtune.common.files import cache_dir, write_json
from kvtune.common.stored import checked, parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FORMAT = 1
_AGAIN = "remove the file; the model is then calibrated again."


@dataclass(frozen=True)
class Calibration:
    """What was measured once on one model.

    Args:
        head_scores: attention mass that each query head pays to what it is about to copy,
            ``[L][Hq]``.
        layer_errors: relative error of each layer's attention output under a tiny cache, ``[L]``.
        source: what it was measured on.
    """

    head_scores: tuple[tuple[float, ...], ...]
    layer_errors: tuple[float, ...]
    source: str

    def tensors(self, layer: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """One layer's, by the names that a trace gives them: ``[Hq]`` and ``[]``."""
        import torch

        return {
            "head_scores": torch.tensor(self.head_scores[layer], device=device),
            "layer_error": torch.tensor(self.layer_errors[layer], device=device),
        }


def find_calibration(fingerprint: str) -> Calibration | None:
    """A model's calibration, from the package or the cache folder."""
    shipped = files("kvtune.traces") / "calibrations" / _name(fingerprint)
    for place in (_stored(fingerprint), shipped):
        if place.is_file():
            data = place.read_bytes()
            return _read(parse_json(data, str(place), _AGAIN), str(place))
    return None


def require_calibration(fingerprint: str) -> Calibration:
    """A model's calibration.

    Raises:
        KvtuneError: it was never measured.
    """
    found = find_calibration(fingerprint)
    if found is None:
        raise KvtuneError(
            "this model was not calibrated yet",
            hint="python -m kvtune.runtime.calibrate MODEL measures it once.",
        )
    return found


def keep_calibration(fingerprint: str, calibration: Calibration) -> Path:
    """Write a calibration to the cache folder; returns the file."""
    path = _stored(fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"format": _FORMAT, "fingerprint": fingerprint, **vars(calibration)}
    write_json(path, fields)
    return path


def _stored(fingerprint: str) -> Path:
    return cache_dir() / "calibrations" / _name(fingerprint)


def _name(fingerprint: str) -> str:
    return f"{fingerprint[:16]}.json"


@dataclass(frozen=True)
class _Stored:
    """The form of a calibration in its file."""

    format: int
    fingerprint: Name
    head_scores: tuple[tuple[Finite, ...], ...]
    layer_errors: tuple[NotNegative, ...]
    source: str
    model: Name = ""
    remake: Name = ""


def _read(fields: Any, where: str) -> Calibration:
    if isinstance(fields, dict) and fields.get("format") != _FORMAT:
        raise KvtuneError(
            f"calibration format {fields.get('format')!r}; this kvtune reads {_FORMAT}",
            where=where,
            hint=_AGAIN,
        )
    found = checked(_Stored, fields, where, _AGAIN)
    if len(found.head_scores) != len(found.layer_errors):
        raise KvtuneError("head_scores and layer_errors differ in layers", where=where, hint=_AGAIN)
    return Calibration(found.head_scores, found.layer_errors, found.source)
