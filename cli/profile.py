"""``kvtune profile``: measures this machine's GPU into a profile directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtune.cli.options import Json, Quiet
from kvtune.cli.output import Output, speaking

if TYPE_CHECKING:
    from kvtune.profiles.tuned import Class, TunedShape
    from kvtune.runtime.measure.runner import Outcome


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Made, or gone on with.")
    ],
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", metavar="N", min=0.1, help="At most; the most useful first."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few points of each kind.")] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", "-g", metavar="NAME", help="The card's datasheet; left out: by its driver."
        ),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Measure though others use the GPU.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine's GPU: kernels, copies, memory."""
    from kvtune.cli.inputs import check_writable
    from kvtune.profiles.gpus import find_gpu

    check_writable(out, "--out")
    if gpu is not None:
        find_gpu(gpu)
    typed = " ".join(["kvtune", *sys.argv[1:]])
    with speaking(as_json, quiet) as output:
        from kvtune.runtime.measure.session import Request, profile_gpu

        request = Request(out, gpu, minutes, quick, shared, typed)
        outcome = profile_gpu(request, output.progress)
        output.show(*_sentences(outcome, out))
        _finish(output, outcome, out)


def _sentences(outcome: Outcome, out: Path) -> list[str]:
    said = [f"{outcome.measured} points measured, {outcome.kept} were there, in {out}"]
    if outcome.left:
        said.append(f"{outcome.left} points are left; the same command goes on with them")
    if outcome.failed:
        said.append(f"{len(outcome.failed)} points could not be measured")
    said += [_tuned(*entry) for entry in outcome.tuned.items()]
    if outcome.reasons:
        said.append(f"the GPU was slowed down at times by: {', '.join(sorted(outcome.reasons))}")
    return said


def _tuned(of: Class, best: TunedShape) -> str:
    kind, head_dim = of
    shape = ", ".join(f"{name} {value}" for name, value in best.shape.items())
    share = f"{best.time_share:.2f} of the built-in shape's time"
    return f"decode attention over {kind}, heads of {head_dim}: {shape}; {share}"


def _finish(output: Output, outcome: Outcome, out: Path) -> None:
    output.finish(
        "profile",
        {
            "out": out,
            "measured": outcome.measured,
            "kept": outcome.kept,
            "left": outcome.left,
            "failed": [{"point": point, "reason": reason} for point, reason in outcome.failed],
            "throttle": sorted(outcome.reasons),
            "tuned": [
                {"kind": kind, "head_dim": head_dim, "best": best}
                for (kind, head_dim), best in outcome.tuned.items()
            ],
        },
    )
