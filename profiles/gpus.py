"""GPU profiles: every number with its unit, kind, source and date; found by name or detected."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.files import cache_dir
from kvtune.common.stored import read_text
from kvtune.common.units import GIB, MIB
from kvtune.profiles.strict import Located, library, library_file, parse

FigureKind = Literal["datasheet", "measured", "assumed"]
MemoryKind = Literal["hbm", "gddr", "lpddr"]
VENDORS = ("nvidia", "amd", "intel", "apple", "google")

_UNITS = {
    "memory_nominal": "GiB",
    "memory_visible": "MiB",
    "bandwidth": "GB/s",
    "bf16": "TFLOP/s",
    "fp8": "TFLOP/s",
    "int8": "TOP/s",
    "l2": "MiB",
    "pcie": "GB/s",
    "power": "W",
    "context": "MiB",
}
_MOST = {"GiB": 1e5, "MiB": 1e8, "GB/s": 1e6, "TFLOP/s": 1e6, "TOP/s": 1e6, "W": 1e5, "us": 1e7}
_NOT_EVERYWHERE = ("fp8", "int8", "l2", "pcie", "power")
_DATE = re.compile(r"\d{4}-\d{2}(-\d{2})?")


@dataclass(frozen=True)
class Figure:
    """One number and where it is from.

    Args:
        value: the number, in ``unit``.
        unit: as written in the file; each key has exactly one that is allowed.
        kind: read in a datasheet, measured on a card, or assumed.
        source: document, page or command.
        date: year and month, or day, of the source.
        interval: where the true value lies, in ``unit``; None where the source is exact.
    """

    value: float
    unit: str
    kind: FigureKind
    source: str
    date: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class GpuProfile:
    """What kvtune knows of a GPU. Figures carry their source; properties are in base units.

    Args:
        slug: canonical name, for example ``rtx-4090``.
        name: name for people.
        aliases: other names it is found by.
        device_names: what the driver calls the card.
        vendor: one of :data:`VENDORS`.
        architecture: for example ``ada``.
        memory_kind: ``hbm``, ``gddr``, or ``lpddr`` that the host shares; their achieved
            bandwidths differ.
        memory_nominal: what the box says, GiB.
        memory_visible: total that the runtime reports to a process, MiB.
        bandwidth: peak memory bandwidth, GB/s.
        bf16: dense bf16 rate with fp32 accumulation, TFLOP/s.
        context: device memory of a process before its first tensor, MiB.
        fp8: dense fp8 rate, TFLOP/s; None where the card has no fp8.
        int8: dense int8 rate, TOP/s; None where unknown.
        l2: last-level cache on the die, MiB; None where unknown.
        pcie: host link a direction, GB/s; None where host and GPU share their memory.
        power: board power, W; None where unknown.
    """

    slug: str
    name: str
    aliases: tuple[str, ...]
    device_names: tuple[str, ...]
    vendor: str
    architecture: str
    memory_kind: MemoryKind
    memory_nominal: Figure
    memory_visible: Figure
    bandwidth: Figure
    bf16: Figure
    context: Figure
    fp8: Figure | None = None
    int8: Figure | None = None
    l2: Figure | None = None
    pcie: Figure | None = None
    power: Figure | None = None

    @property
    def visible_bytes(self) -> int:
        """Memory that a process can see, less than what the box says."""
        return int(self.memory_visible.value * MIB)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Peak memory bandwidth."""
        return self.bandwidth.value * 1e9

    @property
    def bf16_flop_per_s(self) -> float:
        """Dense bf16 rate with fp32 accumulation."""
        return self.bf16.value * 1e12

    @property
    def fp8_flop_per_s(self) -> float | None:
        """Dense fp8 rate, None where the card has none."""
        return None if self.fp8 is None else self.fp8.value * 1e12

    @property
    def l2_bytes(self) -> int:
        """Last-level cache on the die; 0 where unknown."""
        return 0 if self.l2 is None else int(self.l2.value * MIB)

    @property
    def pcie_bytes_per_s(self) -> float:
        """Host link, one direction; within shared memory a copy reads and writes."""
        return self.bandwidth_bytes_per_s / 2 if self.pcie is None else self.pcie.value * 1e9

    @property
    def context_bytes(self) -> int:
        """Device memory of a process before its first tensor."""
        return int(self.context.value * MIB)


def list_gpus() -> tuple[GpuProfile, ...]:
    """Every known profile, by name."""
    return _profiles()


def find_gpu(name: str) -> GpuProfile:
    """The profile of a GPU by name, alias, the driver's name, or the path of a card's file.

    Case, spaces, hyphens, the vendor and its brand do not matter, and the card's own memory may
    follow: ``4090``, ``rtx4090``, ``RTX 4090 24GB``, ``h100 pcie``, ``./my-card.yaml``.

    Raises:
        KvtuneError: no such profile; the message names the nearest ones.
    """
    if name.endswith((".yaml", ".yml")):
        return read_gpu_file(Path(name).expanduser())
    found = _shipped(name) or _names().get(_normal(name)) or _without_memory(name)
    if found is not None:
        return found
    spelled = {alias for card in list_gpus() for alias in (card.slug, *card.aliases)}
    hint = "kvtune gpus lists them; --gpu FILE.yaml describes one."
    asked = re.sub(r"[\s_]+", "-", name.strip().lower())
    raise KvtuneError(f"no GPU is known as {name!r}. {nearest(asked, spelled)}", hint=hint)


def _without_memory(name: str) -> GpuProfile | None:
    """The card whose name is followed by its own memory: ``RTX 4090 24GB``.

    Raises:
        KvtuneError: the card exists with another memory.
    """
    parts = re.fullmatch(r"(.*?)[\s_-]*(\d+)\s*gi?b?", name.strip().lower())
    card = _names().get(_normal(parts[1])) if parts else None
    if parts is None or card is None:
        return None
    if round(card.memory_nominal.value) != int(parts[2]):
        raise KvtuneError(
            f"the {card.name} has {card.memory_nominal.value:g} GiB, not {parts[2]}",
            hint="--gpu-memory gives a card another memory.",
        )
    return card


def read_gpu_file(path: Path) -> GpuProfile:
    """A card that a YAML file describes; it is named after the file.

    Raises:
        KvtuneError: the file is missing, or something in it is; with file, line and key.
    """
    if not path.is_file():
        raise KvtuneError("there is no such card file", where=str(path))
    return parse_gpu(path.stem.lower(), read_text(path), str(path))


def detect_gpu(index: int = 0) -> GpuProfile | None:
    """The profile of the GPU in this machine, None without one (or without its driver).

    Raises:
        KvtuneError: there is a GPU, but no profile of it.
    """
    device = detected_name(index)
    if device is None:
        return None
    for profile in _profiles():
        if device in profile.device_names:
            return profile
    names = [name for card in _profiles() for name in (card.slug, *card.aliases)]
    raise KvtuneError(
        f"this machine's GPU, {device!r}, has no profile. {nearest(device.lower(), names)}",
        hint="name a similar GPU with --gpu; kvtune gpus lists them.",
    )


def detected_name(index: int = 0) -> str | None:
    """What NVML calls the GPU, None where there is no NVML or no such GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, a container without devices: all mean no GPU
        return None
    try:
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
        return name.decode() if isinstance(name, bytes) else str(name)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def smallest_free_bytes() -> int | None:
    """Free memory of the GPU that has least of it, of those that this process may use.

    None where NVML knows of none; without torch.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # as in ``detected_name``
        return None
    try:
        free = [int(pynvml.nvmlDeviceGetMemoryInfo(card).free) for card in _visible(pynvml)]
        return min(free, default=None)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _visible(nvml: Any) -> list[Any]:
    """NVML's handles of the GPUs that CUDA shows this process.

    ``CUDA_VISIBLE_DEVICES`` names them by number or by UUID; none counts behind one that there is
    not (CUDA C++ Programming Guide, environment variables).
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount())]
    found: list[Any] = []
    with suppress(nvml.NVMLError):
        for name in map(str.strip, named.split(",")):
            by_number = name.isdecimal()
            found.append(
                nvml.nvmlDeviceGetHandleByIndex(int(name))
                if by_number
                else nvml.nvmlDeviceGetHandleByUUID(name)
            )
    return found


def parse_gpu(slug: str, text: str, file: str) -> GpuProfile:
    """One profile from YAML text; strict.

    Raises:
        KvtuneError: a key is unknown, missing, of the wrong kind or unit; with file, line, key.
    """
    return _profile(slug, parse(text, file))


def _profile(slug: str, document: Located) -> GpuProfile:
    texts = ("name", "vendor", "architecture")
    fields = document.mapping((*texts, "memory_kind", "figures"), ("aliases", "device_names"))
    required = [key for key in _UNITS if key not in _NOT_EVERYWHERE]
    records = fields["figures"].mapping(required, _NOT_EVERYWHERE)
    figures: dict[str, Any] = {
        key: read_figure(key, _UNITS[key], record) for key, record in records.items()
    }
    if figures["memory_visible"].value * MIB > figures["memory_nominal"].value * GIB:
        records["memory_visible"].fail("is more than memory_nominal; are GB and GiB mixed?")
    return GpuProfile(
        slug=slug,
        memory_kind=cast(MemoryKind, fields["memory_kind"].text(get_args(MemoryKind))),
        name=fields["name"].text(),
        vendor=fields["vendor"].text(VENDORS),
        architecture=fields["architecture"].text(),
        aliases=fields["aliases"].texts() if "aliases" in fields else (),
        device_names=fields["device_names"].texts() if "device_names" in fields else (),
        **figures,
    )


def read_figure(key: str, expected: str, record: Located) -> Figure:
    """The record of one number; its unit must be the one that the key has.

    Raises:
        KvtuneError: another unit, or a value, kind, source or date that is missing or wrong.
    """
    fields = record.mapping(("value", "unit", "kind", "source", "date"), ("interval",))
    unit = fields["unit"].text()
    if unit != expected:
        fields["unit"].fail(f"is {unit!r}, but {key} is given in {expected}")
    value = fields["value"].positive()
    if value > _MOST.get(unit, value):
        fields["value"].fail(f"must be at most {_MOST[unit]:g} {unit}")
    date = fields["date"].word()
    if not _DATE.fullmatch(date):
        fields["date"].fail(f"must be a date like 2024-11, not {date!r}")
    return Figure(
        value=value,
        unit=unit,
        kind=cast(FigureKind, fields["kind"].text(("datasheet", "measured", "assumed"))),
        source=fields["source"].text(),
        date=date,
        interval=_interval(fields["interval"]) if "interval" in fields else None,
    )


def _interval(record: Located) -> tuple[float, float]:
    ends = record.numbers()
    if len(ends) != 2 or ends[0] > ends[1]:
        record.fail("must be two numbers, the lower first")
    return ends[0], ends[1]


def user_folder() -> Path:
    """Where ``kvtune gpus add`` keeps cards and measured bundles."""
    return cache_dir() / "gpus"


def forget_cards() -> None:
    """Read the cards anew when next asked, after one was added."""
    _shipped.cache_clear()
    _profiles.cache_clear()
    _names.cache_clear()


@functools.cache
def _shipped(slug: str) -> GpuProfile | None:
    """The card whose own name this is, for which not all cards need to be read."""
    document = library_file("gpus", slug) if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", slug) else None
    return None if document is None else _profile(slug, document)


@functools.cache
def _profiles() -> tuple[GpuProfile, ...]:
    shipped = [_profile(slug, document) for slug, document in library("gpus")]
    return (*shipped, *(read_gpu_file(path) for path in sorted(user_folder().glob("*.yaml"))))


@functools.cache
def _names() -> dict[str, GpuProfile]:
    known: dict[str, GpuProfile] = {}
    for profile in _profiles():
        for name in names_of(profile):
            if name in known:
                raise KvtuneError(f"two GPUs answer to {name!r}", where=profile.slug)
            known[name] = profile
    return known


def names_of(profile: GpuProfile) -> Iterator[str]:
    """Every name that the card answers to, in the form in which names are compared."""
    names = (profile.slug, *profile.aliases, *profile.device_names)
    yield from dict.fromkeys(_normal(name) for name in names)


_BRANDS = re.compile(
    r"^(nvidia|amd|intel\(r\)|intel|google|geforce|instinct|radeon|tesla|quadro|rtx(?=\w))"
)


def _normal(name: str) -> str:
    """Lower case without separators, vendor or brand: ``NVIDIA GeForce RTX 4090`` is ``4090``."""
    key = re.sub(r"[\s_-]+", "", name.strip().lower())
    while (shorter := _BRANDS.sub("", key)) != key and shorter:
        key = shorter
    return key
