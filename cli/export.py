"""``kvtune export``: a policy as the configuration of a serving stack, and what that loses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.policies.document import ModelFacts
    from kvtune.policies.exporter import Export


def command(
    policy: options.PolicyFile,
    to: Annotated[
        str, typer.Option("--to", metavar="STACK", help="transformers, vllm or llama-cpp.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Path or name that the stack loads."),
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", metavar="TOKENS", help="Left out: the file's own.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", min=1, help="Left out: the file's own.")
    ] = None,
    allow_stand_in: Annotated[
        bool,
        typer.Option("--allow-stand-in", help="Export a plan found on another model's trace."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse unless everything can be kept.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """A policy as a serving stack's configuration."""
    from kvtune.cli.inputs import check_writable, read_policy_path
    from kvtune.common.units import parse_tokens
    from kvtune.policies.document import read_policy
    from kvtune.policies.exporter import find_exporter, write_export

    exporter = find_exporter(to)()
    document = read_policy(read_policy_path(policy))
    check_writable(out, "--out")
    made = exporter.export(
        document,
        model=model or "",
        facts=_facts(model) if document.model is None and model else None,
        context_tokens=parse_tokens(context) if context else None,
        batch=batch,
        allow_stand_in=allow_stand_in,
        strict=strict,
    )
    paths = write_export(made, out)
    quality = document.provenance.quality if document.provenance else None
    with speaking(as_json, quiet=as_json) as output:
        output.show(_report(made, str(quality or "not known")), "")
        output.show(*(f"note: {note}" for note in made.notes), *(f"wrote {p}" for p in paths))
        answer = {key: getattr(made, key) for key in ("stack", "proof", "report", "notes")}
        output.finish("export", answer | {"files": paths, "quality": str(quality or "not known")})


def _facts(model: str) -> ModelFacts:
    """The shape of a model that the policy file does not name."""
    from kvtune.cli.inputs import read_model
    from kvtune.policies.document import ModelFacts

    shape = read_model(model)[1]
    return ModelFacts(shape.name, shape.layers, shape.kv_heads, shape.head_dim)


def _report(made: Export, quality: str) -> RenderableType:
    return table(
        f"Export to {made.stack}",
        ("field", "status", "what became of it"),
        [(line.field, line.status, line.detail) for line in made.report],
        left=(0, 1, 2),
        caption=f"proof: {made.proof}; quality: {quality}",
    )
