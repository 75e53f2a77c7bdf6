"""``kvtune gpus``: the cards that are known, and one card's figures with their sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.options import Json
from kvtune.cli.output import Output, speaking, table
from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.profiles.gpus import Figure, GpuProfile

_FIGURES = (
    "memory_nominal", "memory_visible", "bandwidth", "bf16", "fp8", "int8", "l2", "pcie", "power",
    "context",
)  # fmt: skip


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME | add]", help="A card, to see all its figures and their sources."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="With add: a card's .yaml, or a bundle of kvtune profile (a folder or .zip).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Known GPUs, one GPU's figures, or add FILE to keep another.

    FILE is a card's .yaml or a bundle that kvtune profile measured.
    """
    if (name == "add") != (file is not None):
        raise KvtuneError(
            "a file is kept by: kvtune gpus add FILE",
            hint="kvtune gpus NAME shows one card; kvtune gpus lists all.",
        )
    with speaking(as_json, quiet=as_json) as output:
        if file is not None:
            _add(output, file)
        else:
            _one(output, name) if name else _all(output)


def _add(output: Output, file: Path) -> None:
    from kvtune.profiles.added import add

    added = add(file.expanduser())
    what = f"measured kernels of {added.slug} ({added.points} points)" if added.points else "card"
    output.show(f"added the {what}: --gpu {added.slug} uses it")
    output.finish("gpus", {"added": added})


def _all(output: Output) -> None:
    from kvtune.profiles.gpus import list_gpus

    rows = [_row(gpu) for gpu in list_gpus()]
    columns = ("name", "card", "memory it shows", "bandwidth", "bf16 TFLOP/s", "fp8 TFLOP/s")
    output.show(table("", columns, rows, left=(0, 1)), "", *_below(list_gpus()))
    output.finish("gpus", {"gpus": [_plain(gpu) for gpu in list_gpus()]})


def _below(gpus: Sequence[GpuProfile]) -> list[str]:
    from kvtune.profiles.elsewhere import SYSTEM_OF_CARD, systems_folder
    from kvtune.profiles.measured import find_measured

    measured = [gpu.slug for gpu in gpus if find_measured(gpu.slug)]
    known = [f"with measured kernels: {', '.join(measured)}"] if measured else []
    if systems_folder() is not None:
        known.append(f"with kernels that NVIDIA measured (--stack): {', '.join(SYSTEM_OF_CARD)}")
    return [*known, "kvtune gpus NAME tells the sources."]


def _row(gpu: GpuProfile) -> tuple[str, ...]:
    from kvtune.common.units import GIB

    fp8 = f"{gpu.fp8.value:g}" if gpu.fp8 else "-"
    return (
        gpu.slug,
        gpu.name,
        f"{gpu.visible_bytes / GIB:.2f} GiB",
        f"{gpu.bandwidth.value:g} {gpu.bandwidth.unit}",
        f"{gpu.bf16.value:g}",
        fp8,
    )


def _one(output: Output, name: str) -> None:
    from kvtune.profiles.gpus import find_gpu

    gpu = find_gpu(name)
    output.show(_sources(gpu), "", "also called: " + (", ".join(gpu.aliases) or "-"))
    output.finish("gpus", {"gpus": [_plain(gpu)]})


def _sources(gpu: GpuProfile) -> RenderableType:
    from kvtune.profiles.measured import find_measured

    rows = [
        (key.replace("_", " "), _value(f), f.kind, f.date, f.source)
        for key, f in _figures(gpu).items()
    ]
    measured = find_measured(gpu.slug)
    rows += [
        (key.replace("_", " "), f"{f.value:g} {f.unit}", f.kind, f.date, f.source)
        for key, f in (measured.figures if measured else {}).items()
    ]
    return table(gpu.name, ("figure", "value", "kind", "date", "source"), rows, left=(0, 2, 3, 4))


def _value(figure: Figure) -> str:
    interval = figure.interval
    ends = f" [{interval[0]:g}, {interval[1]:g}]" if interval else ""
    return f"{figure.value:g}{ends} {figure.unit}"


def _figures(gpu: GpuProfile) -> dict[str, Figure]:
    return {key: figure for key in _FIGURES if (figure := getattr(gpu, key)) is not None}


def _plain(gpu: GpuProfile) -> dict[str, Any]:
    return {
        "name": gpu.slug,
        "card": gpu.name,
        "aliases": gpu.aliases,
        "vendor": gpu.vendor,
        "architecture": gpu.architecture,
        "visible_bytes": gpu.visible_bytes,
        "figures": _figures(gpu),
        "measured": _measured(gpu),
    }


def _measured(gpu: GpuProfile) -> dict[str, Any] | None:
    from kvtune.profiles.measured import find_measured

    profile = find_measured(gpu.slug)
    if profile is None:
        return None
    return {
        "capture": profile.capture,
        "figures": profile.figures,
        "points": len(profile.rows),
    }
