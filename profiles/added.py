"""Cards and measured bundles that the user added: checked once, then kept with their hashes."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.common.files import write_text
from kvtune.common.stored import decoded, read_text
from kvtune.profiles.gpus import (
    GpuProfile,
    find_gpu,
    forget_cards,
    list_gpus,
    names_of,
    read_gpu_file,
    user_folder,
)
from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.measured import (
    GPU_FILE,
    HASHES_FILE,
    KERNEL_FILE,
    MeasuredProfile,
    added_folder,
    forget_measured,
    parse_measured,
)

_LARGEST_FILE = 64 * 2**20
_TOLERANCE = 1.05  # what a kernel may be above the sheet: clocks and rounding differ a little


@dataclass(frozen=True)
class Added:
    """What was added to the known cards and measured bundles.

    Args:
        kind: ``card`` or ``bundle``.
        slug: of the card.
        path: where it is kept.
        points: measured kernels of a bundle, 0 for a card.
    """

    kind: str
    slug: str
    path: Path
    points: int = 0


def add(path: Path) -> Added:
    """Store a card's YAML file, or a ``kvtune profile`` bundle: a folder, or a .zip of one.

    Raises:
        KvtuneError: the file is missing or wrong, a name is taken, or a kernel is faster than its
            card can be; nothing is stored then.
    """
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _add_card(path)
    files = _bundle_files(path)
    profile = parse_measured(files[GPU_FILE], files[KERNEL_FILE], str(path))
    check_plausible(profile, find_gpu(profile.slug), str(path))
    folder = added_folder(profile.slug)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    for name, text in (*files.items(), (HASHES_FILE, json.dumps(hashes, indent=2) + "\n")):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)
    forget_measured()
    return Added("bundle", profile.slug, folder, len(profile.rows))


def _add_card(path: Path) -> Added:
    card = read_gpu_file(path)
    others = {name: other for other in list_gpus() if other.slug != card.slug
              for name in names_of(other)}  # fmt: skip
    for name in names_of(card):
        if name in others:
            raise KvtuneError(
                f"{others[name].name} is already called {name!r}", where=str(path),
                hint="rename the file, or leave that alias out.",
            )  # fmt: skip
    if card.slug in {other.slug for other in list_gpus()} and not _own(card.slug).is_file():
        raise KvtuneError(f"kvtune ships a card {card.slug!r}", where=str(path), hint="rename it.")
    _own(card.slug).parent.mkdir(parents=True, exist_ok=True)
    write_text(_own(card.slug), read_text(path))
    forget_cards()
    return Added("card", card.slug, _own(card.slug))


def _own(slug: str) -> Path:
    return user_folder() / f"{slug}.yaml"


def check_plausible(profile: MeasuredProfile, card: GpuProfile, where: str) -> None:
    """Refuse kernels that are faster than the card's sheet allows.

    Raises:
        KvtuneError: it names the kernel, its rate and the sheet's.
    """
    for rate, most, unit in _rates(profile.rows, card):
        if rate > _TOLERANCE * most:
            raise KvtuneError(
                f"a kernel reaches {rate / 1e9:,.0f} {unit}, above the {card.name}'s "
                f"{most / 1e9:,.0f}; the bundle is of another card, or wrong",
                where=where,
            )


def _rates(rows: tuple[KernelRow, ...], card: GpuProfile) -> Iterator[tuple[float, float, str]]:
    """Every kernel's achieved bandwidth, unless a cache may hold its data, and operations."""
    fastest = max(
        card.bf16_flop_per_s, card.fp8_flop_per_s or 0.0, card.int8.value * 1e12 if card.int8 else 0
    )
    for row in rows:
        if row.point.l2 == "cold" and row.bytes > 4 * card.l2_bytes:
            yield row.bytes_per_s, card.bandwidth_bytes_per_s, "GB/s"
        yield row.flops / row.seconds, fastest, "GFLOP/s"


def _bundle_files(path: Path) -> dict[str, str]:
    """The two files of a bundle as text.

    Raises:
        KvtuneError: it is neither a folder nor a .zip, or lacks a file.
    """
    names = (GPU_FILE, KERNEL_FILE)
    if path.is_dir():
        found = {name: path / name for name in names if (path / name).is_file()}
        texts = {name: read_text(file) for name, file in found.items()}
    elif zipfile.is_zipfile(path):
        texts = _unzipped(path, names)
    else:
        raise KvtuneError(
            "this is neither a card's .yaml nor a bundle", where=str(path),
            hint="kvtune profile --out FOLDER writes a bundle: a folder, or a .zip of it.",
        )  # fmt: skip
    for name in names:
        if name not in texts:
            raise KvtuneError(f"this is no measured profile: {name} is missing", where=str(path))
    return texts


def _unzipped(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    """By the last part of their names only, so that nothing is written where the file says."""
    texts = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.rsplit("/", 1)[-1]
            if name in names and entry.file_size <= _LARGEST_FILE:
                texts[name] = decoded(archive.read(entry), f"{path}:{name}")
    return texts
