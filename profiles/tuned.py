"""How kernels are best compiled and cut on a card: ``kernels.yaml``, beside its measured profile.

What the numbers mean is the kernel's to say. A class is a kind of layer (floats, integers, or both
beside each other) with one head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from kvtune.common.files import cache_dir, write_text
from kvtune.profiles.gpus import list_gpus
from kvtune.profiles.measured import Capture, read_capture
from kvtune.profiles.strict import Located, parse

TUNED_FILE = "kernels.yaml"
KINDS = ("floats", "integers", "mixed")

Class = tuple[str, int]
"""A kind of layer, and its head dimension."""


@dataclass(frozen=True)
class TunedShape:
    """The best that was found for a class.

    Args:
        shape: a kernel's parameters by name.
        time_share: of the time that the built-in shape takes, over all layers that were tried.
        layers: that were tried.
    """

    shape: Mapping[str, int]
    time_share: float
    layers: tuple[str, ...]


@dataclass(frozen=True)
class TunedKernels:
    """Decode attention on one card.

    Args:
        slug: of the card's datasheet profile.
        capture: how and when it was measured.
        decode: the best of each class.
    """

    slug: str
    capture: Capture
    decode: Mapping[Class, TunedShape]


def find_tuned(device: str, names: Collection[str]) -> TunedKernels | None:
    """What is known of a card: measured on this machine, else shipped; None if nothing is.

    Args:
        device: the driver's name of the card.
        names: parameters that the kernel has.

    Raises:
        KvtuneError: the file is not as it must be; with its line and key.
    """
    slug = next((gpu.slug for gpu in list_gpus() if device in gpu.device_names), None)
    if slug is None:
        return None
    return _found(slug, frozenset(names))


@functools.cache
def _found(slug: str, names: frozenset[str]) -> TunedKernels | None:
    shipped = resources.files("kvtune.profiles") / "measured" / slug / TUNED_FILE
    for place in (_kept(slug), shipped):
        if place.is_file():
            return parse_tuned(place.read_text(encoding="utf-8"), str(place), names)
    return None


def _kept(slug: str) -> Path:
    return cache_dir() / "gpus" / slug / TUNED_FILE


def keep_tuned(tuned: TunedKernels) -> str:
    """Let this machine's runtime use it from now on; returns where it is kept."""
    write_text(_kept(tuned.slug), tuned_document(tuned))
    _found.cache_clear()
    return str(_kept(tuned.slug))


def parse_tuned(text: str, file: str, names: Collection[str]) -> TunedKernels:
    """The content of ``kernels.yaml``; strict.

    Args:
        text: YAML.
        file: its name, for messages.
        names: parameters that the kernel has.

    Raises:
        KvtuneError: a key or a parameter is unknown, missing or no whole number above zero.
    """
    document = parse(text, file).mapping(("gpu", "capture", "decode_attention"))
    decode = {
        (kind, _head_dim(key, record)): _shape(record, names)
        for kind, dims in document["decode_attention"].mapping((), KINDS).items()
        for key, record in dims.entries()
    }
    return TunedKernels(document["gpu"].text(), read_capture(document["capture"]), decode)


def _head_dim(key: str, record: Located) -> int:
    if not (key.isascii() and key.isdecimal()):
        record.fail("must stand under a head dimension, a whole number")
    if not 1 <= len(key) <= 6:
        record.fail("stands under no head dimension that a model has")
    return int(key)


def _shape(record: Located, names: Collection[str]) -> TunedShape:
    entries = record.mapping(("shape", "time_share", "layers"))
    numbers = entries["shape"].mapping((), names)
    return TunedShape(
        {name: number.count() for name, number in numbers.items()},
        entries["time_share"].positive(),
        entries["layers"].texts(),
    )


def tuned_document(tuned: TunedKernels) -> str:
    """The text of ``kernels.yaml``."""
    decode: dict[str, dict[int, object]] = {}
    for (kind, head_dim), best in sorted(tuned.decode.items()):
        decode.setdefault(kind, {})[head_dim] = {
            "shape": dict(best.shape),
            "time_share": best.time_share,
            "layers": list(best.layers),
        }
    document = {"gpu": tuned.slug, "capture": vars(tuned.capture), "decode_attention": decode}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
