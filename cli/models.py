"""``kvtune models``: the shapes that are known, and whose quality is measured on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import options
from kvtune.cli.options import Json
from kvtune.cli.output import Output, speaking, table
from kvtune.common.words import count

if TYPE_CHECKING:
    from kvtune.profiles.shape import ModelShape


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A model, to see its shape and source: a known name, a folder, a GGUF file.",
            autocompletion=options.known_models,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Models known by name, or one model's shape and source."""
    with speaking(as_json, quiet=as_json) as output:
        _one(output, name) if name else _all(output)


def _one(output: Output, name: str) -> None:
    from kvtune.tuner.target import read_model

    _, shape = read_model(name)
    rows = [(key.replace("_", " "), _words(value)) for key, value in _plain(shape).items()]
    output.show(table("", ("", ""), [row for row in rows if row[1]], left=(0, 1)))
    output.finish("models", {"models": [_plain(shape)]})


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return count(value) if isinstance(value, int) else str(value)


def _all(output: Output) -> None:
    from kvtune.profiles.models import list_models

    shapes = list_models()
    columns = (
        "name", "parameters", "layers", "KV heads", "head dim", "KV B/token", "context", "weights"
    )  # fmt: skip
    output.show(table("", columns, [_row(shape) for shape in shapes], left=(0, 7)), "")
    output.show(
        "weights: fetched = kvtune gets them by itself; your folder = give --model a folder\n"
        "with weights, else quality is that of a stand-in, and every answer says so."
    )
    output.finish("models", {"models": [_plain(shape) for shape in shapes]})


def _fetched(shape: ModelShape) -> bool:
    from kvtune.traces.models import KNOWN

    return shape.name in KNOWN


def _row(shape: ModelShape) -> tuple[str, ...]:
    return (
        shape.name,
        f"{shape.parameters / 1e9:.3g} B",
        str(shape.layers),
        str(shape.cache_heads),
        str(shape.head_dim),
        count(shape.kv_bytes_per_token()),
        count(shape.max_context),
        "fetched" if _fetched(shape) else "your folder",
    )


def _plain(shape: ModelShape) -> dict[str, Any]:
    names = (
        "name", "aliases", "parameters", "layers", "query_heads", "kv_heads", "head_dim",
        "hidden_size", "vocab_size", "max_context", "source",
    )  # fmt: skip
    return {key: getattr(shape, key) for key in names} | {
        "kv_bytes_per_token": shape.kv_bytes_per_token(),
        "weights_fetched": _fetched(shape),
    }
