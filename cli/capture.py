"""``kvtune capture``: record what every head attends to, for replay of any policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.traces.trace import Trace


def command(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the trace.")],
    workload: options.Workload = "small",
    text: options.Texts = None,
    probes: Annotated[
        int | None,
        typer.Option(
            "--probes", metavar="S", min=1, help="Probes a sample; 4 on a CPU, 16 on a GPU."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            min=2,
            help="Tokens of every sample, in place of the workload's 1024 or 2048; as many are "
            "observed as before.",
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Record an attention trace of a model."""
    from kvtune.cli.inputs import check_writable
    from kvtune.tuner.target import read_texts, read_weights

    check_writable(out, "--out")
    texts, name = read_texts(text or ()), read_weights(model)[0]
    with speaking(as_json, quiet) as output:
        from kvtune.tuner.library import capture

        trace = capture(
            name,
            out,
            workload=workload,
            texts=texts,
            probes=probes,
            tokens=tokens,
            seed=seed,
            device=device,
            progress=output.progress,
        )
        output.show(_summary(trace), "", f"next: kvtune simulate POLICY.yaml --trace {out}")
        output.finish("capture", _answer(trace))


def _summary(trace: Trace) -> RenderableType:
    facts = trace.manifest
    rows = [
        ("model", f"{facts['model']['name']}, fingerprint {trace.fingerprint[:12]}"),
        ("workload", facts["workload"]["description"]),
        ("probes", f"{trace.probes} a sample"),
        ("dtype", facts["dtype"]["reason"]),
        ("trace", str(trace.root)),
    ]
    return table("Captured", ("", ""), rows, left=(0, 1))


def _answer(trace: Trace) -> dict[str, Any]:
    facts = trace.manifest
    return {
        "trace": str(trace.root),
        "sha256": trace.content_sha256,
        "model": facts["model"],
        "dtype": facts["dtype"],
        "probes": trace.probes,
        "seed": facts["seed"],
        "workload": facts["workload"],
        "samples": [
            {"id": s.id, "split": s.split, "kind": s.kind, "tokens": len(s.token_ids),
             "observed": s.observed, "answer_accuracy": s.answer_accuracy}
            for s in trace.samples
        ],
        "versions": facts["versions"],
    }  # fmt: skip
