"""How long functions are and how many parameters they take, outside kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import kvtune

ROOT = Path(kvtune.__file__).parent
PACKAGES = (
    "cli",
    "common",
    "policies",
    "profiles",
    "runtime",
    "simulator",
    "traces",
    "tui",
    "tuner",
)
LINES, PARAMETERS = 60, 10
GIVEN = {
    "runtime/serving/vllm_attention.py:__init__",  # vLLM calls it with these parameters
    "tuner/library.py:estimate",  # the options of its command, by name
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Size(NamedTuple):
    """Of one function."""

    lines: int
    parameters: int


@cache
def functions() -> dict[str, Size]:
    """Every function by its place; a place that has several of one name, the largest of them."""
    found: dict[str, Size] = {}
    for place, size in read_functions():
        found[place] = Size(*map(max, zip(size, found.get(place, size), strict=True)))
    return found


def read_functions() -> Iterator[tuple[str, Size]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if not place.startswith("runtime/kernels/"):
                for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        yield f"{place}:{node.name}", Size(lines(node), parameters(node))


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything that holds or is a statement; expressions, most of a tree, hold no functions."""
    yield tree
    for part in ("body", "orelse", "handlers", "finalbody", "cases"):
        below = getattr(tree, part, ())
        for node in below if isinstance(below, list) else ():
            yield from statements(node)


def parameters(function: Function) -> int:
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def lines(function: Function) -> int:
    """Of its body; a command's signature has a line an option."""
    return (function.end_lineno or function.lineno) - function.body[0].lineno + 1


def test_no_function_is_longer_than_a_screen() -> None:
    assert len(functions()) > 1000
    assert {name: size for name, size in functions().items() if size.lines > LINES} == {}


def test_no_function_takes_more_than_ten_parameters() -> None:
    """But commands, which have one an option."""
    many = {name for name, size in functions().items() if size.parameters > PARAMETERS}
    assert {name for name in many if not name.startswith("cli/")} <= GIVEN
