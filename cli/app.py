"""The command line as a whole: names, order and what ``kvtune`` alone prints."""

from __future__ import annotations

import os
from functools import cache
from typing import Annotated, Any

import typer
from typer.main import get_command

import kvtune
from kvtune.cli import (
    bench,
    capture,
    card,
    compare,
    estimate,
    export,
    gpus,
    heads,
    import_policy,
    models,
    policies,
    profile,
    report,
    search,
    serve_sim,
    simulate,
    sources,
    tui,
    validate,
    worker,
)
from kvtune.cli.config import Defaults, read_defaults
from kvtune.cli.help import Command, Group

_COMMANDS = (
    *(search, worker, tui, report, card, validate, bench, compare, simulate, estimate, serve_sim),
    *(capture, export, import_policy),
    *(profile, gpus, models),
)
_ABOUT = """\
What may be done to the KV cache, head by head, and what it costs.

Start with: kvtune search --model llama-8b --gpu 4090 --mem 16GB
"""


@cache
def build() -> Any:
    """The click command that runs kvtune; no command's own work is imported for it."""
    app = typer.Typer(
        name="kvtune",
        help=_ABOUT,
        cls=Group,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback(invoke_without_command=True)(_alone)
    for module in _COMMANDS:
        name = module.__name__.rsplit(".", 1)[-1].replace("_", "-")
        app.command(name=name, cls=Command)(module.command)
    app.add_typer(policies.app, name="policies")
    app.add_typer(heads.app, name="heads")
    app.add_typer(sources.app, name="tables")
    return get_command(app)


def run(app: Any, words: list[str]) -> Any:
    """Run a command with the defaults of configuration files; help and completion need none."""
    plain = {"--help", "-h", "--version"} & set(words) or "_KVTUNE_COMPLETE" in os.environ
    defaults = Defaults() if plain else read_defaults(app)
    return app.main(
        args=words,
        prog_name="kvtune",
        standalone_mode=False,
        default_map=defaults.values,
        obj=defaults,
    )


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvtune {kvtune.__version__}")
        raise typer.Exit


def _alone(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_alone.__doc__ = _ABOUT
