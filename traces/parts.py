"""Folders of a trace in which workers leave one sample each, until all are there."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from kvtune.traces.manifest import MANIFEST

PARTS = "parts"


def part_of(folder: Path, index: int) -> Path:
    """Where a worker leaves the sample of this number."""
    return folder / PARTS / f"{index:04d}"


def remove_parts(folder: Path) -> None:
    """Remove what workers have left in a trace's folder, and nothing that is not theirs."""
    for manifest in (folder / PARTS).glob(f"[0-9]*/{MANIFEST}"):
        shutil.rmtree(manifest.parent, ignore_errors=True)
    with suppress(OSError):  # there is none, or something else lies in it
        (folder / PARTS).rmdir()
