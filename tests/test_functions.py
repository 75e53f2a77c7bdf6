"""How long functions are and how many parameters they take, outside kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

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


@cache
def functions() -> list[tuple[str, Function]]:
    """Every function with its place."""
    return list(read_functions())


def read_functions() -> Iterator[tuple[str, Function]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if not place.startswith("runtime/kernels/"):
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        yield f"{place}:{node.name}", node


def parameters(function: Function) -> int:
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def lines(function: Function) -> int:
    """Of its body; a command's signature has a line an option."""
    return (function.end_lineno or function.lineno) - function.body[0].lineno + 1


def test_no_function_is_longer_than_a_screen() -> None:
    found = dict(functions())
    assert len(found) > 1000
    assert {name: lines(each) for name, each in found.items() if lines(each) > LINES} == {}


def test_no_function_takes_more_than_ten_parameters() -> None:
    """But commands, which have one an option."""
    ours = {name: each for name, each in functions() if not name.startswith("cli/")}
    many = {name: parameters(each) for name, each in ours.items() if parameters(each) > PARAMETERS}
    assert many.keys() <= GIVEN
