"""``kvtune tables``: models whose tables stand in where a model's weights are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking, table
from kvtune.common.stored import require_file

if TYPE_CHECKING:
    from kvtune.simulator.quality.tables import Tables

app = typer.Typer(help="Models whose tables stand in where weights are not at hand.")


@app.callback(invoke_without_command=True)
def listed(context: typer.Context, as_json: options.Json = False) -> None:
    """Models whose tables stand in where weights are not at hand."""
    if context.invoked_subcommand is not None:
        return
    from kvtune.tuner.source_models import added, packaged_tables

    found = [(packaged_tables()[0], None), *added()]
    sources = [_plain(tables, path) for tables, path in found]
    columns = ("model", "prompts of", "samples", "file")
    rows = [(s["model"], f"{s['prompt_tokens']} tokens", str(s["samples"]), s["file"] or "packaged")
            for s in sources]  # fmt: skip
    with speaking(as_json, quiet=as_json) as output:
        output.show(table("", columns, rows, left=(0, 3)), "")
        output.show("A search without weights spans all of them. Removing a file removes a source.")
        output.finish("tables", {"sources": sources})


@app.command()
def pack(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A folder that kvtune capture wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What to call it; left out: the model's name."),
    ] = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write what every option loses on a model, if all heads have it, as one small file."""
    from kvtune.cli.inputs import check_writable
    from kvtune.traces.trace import open_trace

    recorded = open_trace(trace)
    check_writable(out.parent, "--out")
    called = name or Path(str(recorded.manifest["model"]["name"])).name
    with speaking(as_json, quiet) as output:
        from kvtune.traces.models import best_device
        from kvtune.tuner import source_models

        digest = source_models.pack(recorded, called, out, device or best_device(), output.progress)
        output.show(f"{out}: {called}, sha256 {digest}", "")
        output.show(f"next: kvtune tables add {out} --sha256 {digest}, on any machine")
        output.finish("tables pack", {"model": called, "file": str(out), "sha256": digest})


@app.command()
def add(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that kvtune tables pack wrote.")
    ],
    sha256: Annotated[
        str | None,
        typer.Option("--sha256", metavar="DIGEST", help="Refuse a file with any other hash."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check a packed file and let its model stand in beside the others."""
    require_file(file, "kvtune tables pack writes one.")
    from kvtune.tuner import source_models

    tables, kept = source_models.add(file, sha256)
    with speaking(as_json, quiet=as_json) as output:
        output.show(f"{tables.model} stands in from now on; kept as {kept}")
        output.finish("tables add", _plain(tables, kept))


def _plain(tables: Tables, path: Path | None) -> dict[str, Any]:
    return {
        "model": tables.model,
        "prompt_tokens": tables.prompt_tokens,
        "samples": len(tables.samples),
        "file": None if path is None else str(path),
        "sha256": None if path is None else path.stem,
    }
