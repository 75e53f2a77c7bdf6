"""``kvtune card``: a study's policy on one page, in Markdown, JSON and SVG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import options
from kvtune.cli.output import plain, speaking
from kvtune.cli.studies import Study, find_study

if TYPE_CHECKING:
    from kvtune.cli.policy_card import Card


def command(
    study: Study = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Left out: card, in the run directory."),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """A policy on one page, for papers and model pages."""
    folder = find_study(study)
    from kvtune.cli.card_of_study import card_of
    from kvtune.cli.inputs import check_writable
    from kvtune.tuner.explore.reader import StudyReader

    card = card_of(StudyReader(folder).read())
    target = out or folder / "card"
    check_writable(target, "--out")
    with speaking(as_json, quiet) as output:
        files = write_card(card, target)
        output.show(card.verdict, "", *(f"wrote {path}" for path in files))
        output.finish("card", {"study": folder, "files": files, "card": card})


def write_card(card: Card, folder: Path) -> list[Path]:
    """Write ``card.md``, ``card.json`` and ``card.svg``."""
    from kvtune.cli.card_forms import as_markdown, as_svg
    from kvtune.common.files import write_text

    forms = {
        "card.md": as_markdown(card),
        "card.json": json.dumps(plain(card), indent=2, allow_nan=False) + "\n",
        "card.svg": as_svg(card),
    }
    for name, text in forms.items():
        write_text(folder / name, text)
    return [folder / name for name in forms]


def schema() -> dict[str, Any]:
    """The JSON schema of ``card.json``, which docs/card.schema.json holds."""
    from pydantic import TypeAdapter

    from kvtune.cli.policy_card import Card

    found = TypeAdapter(Card).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
