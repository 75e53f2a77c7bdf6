"""``kvtune policies``: methods, formats and allocators, their parameters and sources."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from kvtune.cli.options import Json
from kvtune.cli.output import speaking, table
from kvtune.common.words import count
from kvtune.tuner.left_out import LEFT_OUT

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(help="What may be done to a cache; show NAME explains.")


@dataclass(frozen=True)
class Part:
    """One method, format or allocator, as it declares itself.

    Args:
        name: as in a policy file.
        kind: method, format or allocator.
        summary: its docstring's first line.
        description: the whole docstring.
        source: where it was published.
        parameters: name, type, default, unit, low, high, doc of each.
        left_out_because: why no menu of a search has it; None where one has.
    """

    name: str
    kind: str
    summary: str
    description: str
    source: str
    parameters: tuple[dict[str, Any], ...]
    left_out_because: str | None = None


@app.callback(invoke_without_command=True)
def listed(context: typer.Context, as_json: Json = False) -> None:
    """What may be done to a cache; show NAME explains."""
    if context.invoked_subcommand is not None:
        return
    parts = list(known_parts())
    rows = [(p.name, p.kind, _brief(p), p.source) for p in parts]
    with speaking(as_json, quiet=as_json) as output:
        columns = ("name", "kind", "parameters", "source")
        output.show(table("", columns, rows, left=(0, 1, 2, 3)), "")
        output.show("kvtune policies show NAME explains one and its parameters.")
        output.finish("policies", {"policies": parts})


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that kvtune policies lists.")],
    as_json: Json = False,
) -> None:
    """Explain one: idea, source, parameters."""
    parts = _named(name)
    with speaking(as_json, quiet=as_json) as output:
        for part in parts:
            apart = [""] if part is not parts[0] else []
            output.show(*apart, f"{part.name} ({part.kind})", "", _flowing(part.description))
            if part.parameters:
                output.show("", _parameters(part))
            if part.left_out_because:
                output.show("", f"No menu of a search has it: {part.left_out_because}.")
        output.finish("policies show", {"policies": parts})


def _flowing(text: str) -> str:
    """Lines of prose joined, for the screen to break; pseudo-code and ``Cost:`` keep theirs."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        each if re.search(r"^ | = |<-", each, re.M) else re.sub(r"\n(?![A-Z]\w+:)", " ", each)
        for each in paragraphs
    )


def _named(name: str) -> list[Part]:
    """The part of that name, or those of a combination: ``snapkv+adakv``."""
    from kvtune.common.errors import KvtuneError, nearest
    from kvtune.policies.policy_file.named import words_of

    found = _registered()
    named = {name: (kind, cls) for kind, classes in found.items() for name, cls in classes.items()}
    wanted = words_of(name) or [name]
    for word in wanted:
        if word not in named:
            raise KvtuneError(
                f"no policy is known as {word!r}. {nearest(word, named)}",
                hint="kvtune policies lists them.",
            )
    return [_part(named[word][0], word, named[word][1]) for word in wanted]


def known_parts() -> Iterator[Part]:
    """Everything registered, methods first."""
    for kind, found in _registered().items():
        for name in sorted(found):
            yield _part(kind, name, found[name])


def _registered() -> dict[str, dict[str, type[Any]]]:
    """Classes by kind and name."""
    from kvtune.policies.allocator import allocators
    from kvtune.policies.format import formats
    from kvtune.policies.method import methods

    return {"method": {**methods()}, "format": {**formats()}, "allocator": {**allocators()}}


def _part(kind: str, name: str, cls: type[Any]) -> Part:
    description = inspect.getdoc(cls) or ""
    summary = description.split("\n", 1)[0]
    hints = get_type_hints(cls)
    parameters = tuple(_parameter(f, hints[f.name]) for f in dataclasses.fields(cls))
    reason = LEFT_OUT.get(name)
    return Part(name, kind, summary, description, cls.source, parameters, reason)


def _parameter(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    known = field.metadata
    return {
        "name": field.name,
        "type": _type_name(hint),
        "default": field.default,
        "unit": known.get("unit", ""),
        "low": known.get("low"),
        "high": known.get("high"),
        "doc": known.get("doc", ""),
    }


def _type_name(hint: Any) -> str:
    """``int``, ``int or none``, ``max or mean``."""
    if get_origin(hint) is None:
        return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))
    return " or ".join(arg if isinstance(arg, str) else _type_name(arg) for arg in get_args(hint))


def _brief(part: Part) -> str:
    """``window 32 tokens, kernel 7 tokens``."""
    shown = (f"{p['name']} {_default(p)}" for p in part.parameters)
    return ", ".join(shown) or "-"


def _default(parameter: dict[str, Any]) -> str:
    default, unit = parameter["default"], parameter["unit"]
    if default is None:
        return "none"
    text = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{text} {unit}".strip()


def _parameters(part: Part) -> RenderableType:
    rows = [(p["name"], p["type"], _default(p), _range(p), p["doc"]) for p in part.parameters]
    columns = ("parameter", "type", "default", "range", "what it does")
    return table("", columns, rows, left=(0, 1, 2, 3, 4))


def _range(parameter: dict[str, Any]) -> str:
    low, high = parameter["low"], parameter["high"]
    if low is None and high is None:
        return "-"
    return f"{bound_words(low)}..{bound_words(high)}"


def bound_words(end: float | None) -> str:
    """``16 777 216`` and ``0.5``; nothing for no bound."""
    if end is None:
        return ""
    return count(int(end)) if float(end).is_integer() else f"{end:g}"
