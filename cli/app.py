"""The command line as a whole: names, order and what ``kvtune`` alone prints."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Annotated, Any

import typer
from typer.main import get_command

import kvtune
from kvtune.cli.config import Defaults, read_defaults
from kvtune.cli.help import COMMANDS, Command, Group

_GROUPS = {"policies": "policies", "heads": "heads", "tables": "sources"}
"""Commands that have commands of their own, and the module of each; others are called as theirs."""
_ABOUT = """\
What may be done to the KV cache, head by head, and what it costs.

Start with: kvtune search --model llama-8b --gpu 4090 --mem 16GB
"""


def _known() -> list[str]:
    """All commands, in the order of ``kvtune --help``."""
    return [name for names in COMMANDS.values() for name in names]


@cache
def build(only: str | None = None) -> Any:
    """The click command that runs kvtune; no command's own work is imported for it.

    Args:
        only: the one command to import and describe, since all of them take a tenth of a second;
            None for all.
    """
    app = typer.Typer(
        name="kvtune",
        help=_ABOUT,
        cls=Group,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback(invoke_without_command=True)(_alone)
    for name in [only] if only else _known():
        module = importlib.import_module(f"kvtune.cli.{_GROUPS.get(name, name).replace('-', '_')}")
        if name in _GROUPS:
            app.add_typer(module.app, name=name)
        else:
            app.command(name=name, cls=Command)(module.command)
    return get_command(app)


def run(words: list[str]) -> Any:
    """Run a command with the defaults of configuration files; help and completion need none."""
    plain = {"--help", "-h", "--version"} & set(words) or "_KVTUNE_COMPLETE" in os.environ
    defaults = Defaults() if plain else read_defaults(build)
    named = words[0] if words and words[0] in _known() else None
    return build(named).main(
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
