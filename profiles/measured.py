"""Measured profiles: ``gpu.yaml`` and ``kernels.csv`` of a card, shipped or written by a run."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.common.files import sha256
from kvtune.common.stored import read_json, read_text
from kvtune.profiles.gpus import Figure, read_figure, user_folder
from kvtune.profiles.kernel_table import KernelRow, parse_rows
from kvtune.profiles.strict import Located, parse

GPU_FILE, KERNEL_FILE, HASHES_FILE = "gpu.yaml", "kernels.csv", "hashes.json"

UNITS = {
    "memory_visible": "MiB",
    "context": "MiB",
    "libraries": "MiB",
    "workspace": "MiB",
    "read_bandwidth": "GB/s",
    "launch": "us",
    "graph_kernel": "us",
    "host_to_device": "GB/s",
    "device_to_host": "GB/s",
}
"""Figures that a run may measure, each with the one unit it is given in."""


@dataclass(frozen=True)
class Capture:
    """How and when a profile was measured.

    Args:
        kvtune: version.
        torch: version.
        cuda: version that torch was built for.
        driver: version.
        device: the driver's name of the card.
        command: that measured it.
        date: day.
    """

    kvtune: str
    torch: str
    cuda: str
    driver: str
    device: str
    command: str
    date: str


@dataclass(frozen=True, eq=False)
class MeasuredProfile:
    """What was measured on one card.

    Args:
        slug: of the card's datasheet profile.
        capture: how and when.
        figures: by name, among :data:`UNITS`.
        rows: the kernel table.
    """

    slug: str
    capture: Capture
    figures: dict[str, Figure]
    rows: tuple[KernelRow, ...]

    def bytes_of(self, name: str) -> int | None:
        """A figure that is given in MiB, in bytes; None where it was not measured."""
        figure = self.figures.get(name)
        return None if figure is None else int(figure.value * 2**20)


def read_measured(folder: Path) -> MeasuredProfile:
    """A profile directory as ``kvtune profile`` writes it.

    Raises:
        KvtuneError: a file is missing, or something in it is; with file, line and key.
    """
    for name in (GPU_FILE, KERNEL_FILE):
        if not (folder / name).is_file():
            raise KvtuneError(
                f"this is no measured profile: {name} is missing",
                where=str(folder),
                hint="kvtune profile --out FOLDER measures one.",
            )
    return parse_measured(
        read_text(folder / GPU_FILE),
        read_text(folder / KERNEL_FILE),
        str(folder),
    )


def find_measured(slug: str) -> MeasuredProfile | None:
    """The measured profile of a card, added by the user or shipped; None where there is none.

    Raises:
        KvtuneError: an added one was changed since.
    """
    return _added(added_folder(slug)) or _shipped(slug)


def added_folder(slug: str) -> Path:
    """Where ``kvtune gpus add`` keeps a card's bundle."""
    return user_folder() / "measured" / slug


def forget_measured() -> None:
    """Read added bundles anew when next asked."""
    _added.cache_clear()


@functools.lru_cache(maxsize=32)
def _added(folder: Path) -> MeasuredProfile | None:
    if not (folder / HASHES_FILE).is_file():
        return None
    hashes = read_json(folder / HASHES_FILE)
    for name in (GPU_FILE, KERNEL_FILE):
        if not isinstance(hashes, dict) or sha256(folder / name) != hashes.get(name):
            hint = "add the bundle again with kvtune gpus add."
            raise KvtuneError("this file was changed since it was added", where=name, hint=hint)
    return read_measured(folder)


def parse_measured_gpu(text: str, file: str) -> tuple[str, Capture, dict[str, Figure]]:
    """The content of ``gpu.yaml``; strict.

    Raises:
        KvtuneError: a key is unknown, missing, or of the wrong kind or unit.
    """
    document = parse(text, file).mapping(("gpu", "capture", "figures"))
    return document["gpu"].text(), read_capture(document["capture"]), _figures(document["figures"])


def read_capture(record: Located) -> Capture:
    """How and when, as a measured file says it."""
    names = [f.name for f in fields(Capture)]
    entries = record.mapping(names)
    return Capture(**{name: entries[name].word() for name in names})


def _figures(record: Located) -> dict[str, Figure]:
    known = record.mapping((), UNITS)
    return {name: read_figure(name, UNITS[name], entry) for name, entry in known.items()}


def parse_measured(gpu_text: str, kernel_text: str, folder: str) -> MeasuredProfile:
    """A profile from the texts of its two files; ``folder`` is named in errors."""
    slug, capture, figures = parse_measured_gpu(gpu_text, f"{folder}/{GPU_FILE}")
    rows = parse_rows(kernel_text.splitlines(), f"{folder}/{KERNEL_FILE}")
    return MeasuredProfile(slug, capture, figures, rows)


@functools.cache
def _shipped(slug: str) -> MeasuredProfile | None:
    folder = resources.files("kvtune.profiles") / "measured" / slug
    gpu, kernels = folder / GPU_FILE, folder / KERNEL_FILE
    if not (gpu.is_file() and kernels.is_file()):
        return None
    return parse_measured(
        gpu.read_text(encoding="utf-8"),
        kernels.read_text(encoding="utf-8"),
        f"profiles/measured/{slug}",
    )
