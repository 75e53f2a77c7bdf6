"""Write the pages below ``docs/reference`` from the code: ``python docs/reference.py``.

A test asserts that the committed pages are what this prints.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvtune.cli.app import build
from kvtune.cli.help import COMMANDS, EXAMPLES
from kvtune.cli.policies import Part, bound_words, known_parts
from kvtune.policies.policy_file.parts import ModelFacts, Provenance, Quality, Serving
from kvtune.policies.policy_file.writer import HEADER

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/reference.py from the code; edit that. -->\n"


def pages() -> dict[str, str]:
    """The text of each page, by its file's name."""
    return {"commands.md": commands(), "policy-file.md": policy_file()}


# --- commands ----------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its options and examples, in the order of ``kvtune --help``."""
    app = build.__wrapped__()  # commands keep the help option that they were first asked with
    known = dict(_commands(app, ()))
    order = [name for names in COMMANDS.values() for name in names]
    paths = sorted(known, key=lambda path: order.index(path[0]))
    head = (
        f"{NOTE}\n# Commands\n\nWhat `kvtune COMMAND --help` prints, for all commands. Defaults "
        "of options can be set in a [file](../configuration.md); what `--json` prints is "
        "[described apart](../json.md).\n"
    )
    return head + "".join(_command(path, known[path]) for path in paths)


def _commands(group: Any, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        path = (*above, name)
        if not hasattr(command, "commands") or command.invoke_without_command:
            yield path, command
        if hasattr(command, "commands"):
            yield from _commands(command, path)


def _command(path: tuple[str, ...], command: Any) -> str:
    names = build().context_settings["help_option_names"]
    context = command.context_class(
        command, info_name=f"kvtune {' '.join(path)}", help_option_names=names
    )
    usage = " ".join([context.info_name, *command.collect_usage_pieces(context)])
    records = [p.get_help_record(context) for p in command.get_params(context)]
    rows = [f"- `{name}`: {_spaced(text)}" for name, text in filter(None, records)]
    examples = EXAMPLES.get(" ".join(path), ())
    fence = ["```sh", *examples, "```", ""] if examples else []
    about = inspect.cleandoc(command.help or "")
    lines = [f"\n## kvtune {' '.join(path)}", "", about, "", f"    {usage}", "", *rows, "", *fence]
    return "\n".join(lines)


def _spaced(text: str) -> str:
    """One line; what Markdown would read is escaped."""
    return re.sub(r"([<>*_\[\]])", r"\\\1", " ".join(text.split()))


# --- policy files ------------------------------------------------------------------------------


def policy_file() -> str:
    """Keys of a policy file, and everything that its options may name."""
    about = "\n".join(line[2:] for line in HEADER.splitlines())
    sections = {
        "model": (ModelFacts, "The model that it is for; left out where any shape will do."),
        "serving": (Serving, "What it was planned for."),
        "provenance": (Provenance, "Where it comes from; written by the search."),
        "provenance: quality": (Quality, "What it loses, by whose trace."),
    }
    parts: dict[str, list[Part]] = {}
    for part in known_parts():
        parts.setdefault(part.kind, []).append(part)
    return "\n".join(
        [
            f"{NOTE}\n# Policy files\n\n`policy.yaml` in a run directory is one; `kvtune estimate "
            "--policy`, `simulate`, `validate` and `export` read one. Every key that is not "
            "listed here is refused, with its line.\n",
            f"```text\n{about}\n```\n\n```yaml\n{EXAMPLE}```\n",
            "| key | |\n|---|---|\n" + "".join(f"| `{k}` | {v} |\n" for k, v in KEYS.items()),
            *(_section(key, *found) for key, found in sections.items()),
            *(_kinds(kind, found) for kind, found in parts.items()),
        ]
    )


EXAMPLE = """\
kvtune_policy: 1
options:
  wide: {method: full, keys: int4, values: int4}
  lean: {method: {name: snapkv, window: 64}, budget: 12.5%, keys: int4, values: int2}
policy: lean
layers: {0: wide, 5: wide}
"""
KEYS = {
    "kvtune_policy": "version of the format: 1, or 2 where a budget has a floor; needed",
    "name": "for tables and plots",
    "options": "what may be done to a head, by names of your own",
    "policy": "one option for every head, written out or by name; or",
    "heads": "instead: a line a layer, an option's name a KV head",
    "layers": "beside `policy`: exceptions by layer, one option or one a KV head",
    "allocator": "moves budgets between heads",
    "model, serving, provenance": "as below",
}


def _section(key: str, kind: type[Any], about: str) -> str:
    """The keys of a section, as the dataclass that it is read into describes them."""
    described = _arguments(inspect.getdoc(kind) or "")
    rows = [f"| `{f.name}` | {described[f.name]} |" for f in fields(kind)]
    return "\n".join([f"## `{key}`", "", about, "", "| key | |", "|---|---|", *rows, ""])


def _arguments(doc: str) -> dict[str, str]:
    """What a docstring's ``Args:`` says of each name, on one line."""
    _, _, args = doc.partition("Args:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", args, re.M)
    return {name: " ".join(text.split()).replace("``", "`") for name, text in found}


def _kinds(kind: str, parts: list[Part]) -> str:
    return "\n".join([f"## {kind.capitalize()}s", "", *(_part(part) for part in parts)])


def _part(part: Part) -> str:
    rows = [
        f"| `{p['name']}` | {p['type']} | {p['default']} {p['unit']} | {_range(p)} | {p['doc']} |"
        for p in part.parameters
    ]
    table = ["| parameter | | default | range | |", "|---|---|---|---|---|", *rows, ""]
    summary = part.summary.replace("``", "`")
    source = f" ({_spaced(part.source)})" if part.source else ""
    return "\n".join([f"### `{part.name}`", "", f"{summary}{source}", "", *(table if rows else [])])


def _range(parameter: dict[str, Any]) -> str:
    low, high = parameter["low"], parameter["high"]
    return "" if low is None and high is None else f"{bound_words(low)} to {bound_words(high)}"


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
