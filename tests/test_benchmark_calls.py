"""Benchmarks call one another's functions, which no type checker sees, with arguments that fit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from inspect import Parameter, Signature
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.py")}


def signature(function: ast.FunctionDef) -> Signature:
    """What a function takes, as far as calls have to fit."""
    given, found = function.args, []
    positional = [*given.posonlyargs, *given.args]
    first_default = len(positional) - len(given.defaults)
    for number, each in enumerate(positional):
        default = Parameter.empty if number < first_default else None
        found.append(Parameter(each.arg, Parameter.POSITIONAL_OR_KEYWORD, default=default))
    if given.vararg:
        found.append(Parameter(given.vararg.arg, Parameter.VAR_POSITIONAL))
    for each, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        default = Parameter.empty if value is None else None
        found.append(Parameter(each.arg, Parameter.KEYWORD_ONLY, default=default))
    if given.kwarg:
        found.append(Parameter(given.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)


def taken(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Local name, module and name there of what is imported from other benchmarks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                yield alias.asname or alias.name, node.module, alias.name


def calls_that_do_not_fit(tree: ast.Module) -> Iterator[str]:
    """Line and reason of each call of an imported function that it cannot take."""
    known = {local: (module, name) for local, module, name in taken(tree)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        spread = any(isinstance(each, ast.Starred) for each in node.args)
        if node.func.id not in known or spread or any(each.arg is None for each in node.keywords):
            continue
        module, name = known[node.func.id]
        for function in MODULES[module].body:
            if isinstance(function, ast.FunctionDef) and function.name == name:
                try:
                    named = dict.fromkeys(str(each.arg) for each in node.keywords)
                    signature(function).bind(*node.args, **named)
                except TypeError as error:
                    yield f"line {node.lineno}: {module}.{name}: {error}"


def defined(tree: ast.Module) -> set[str]:
    """Names that a module has at its top."""
    found = {alias.asname or alias.name for n in ast.walk(tree) for alias in getattr(n, "names", ())
             if isinstance(alias, ast.alias)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_what_is_taken_from_other_benchmarks_is_there_and_called_as_it_is_written(
    name: str,
) -> None:
    missing = [
        f"{module}.{there}"
        for _, module, there in taken(MODULES[name])
        if there not in defined(MODULES[module])
    ]
    assert missing == []
    assert list(calls_that_do_not_fit(MODULES[name])) == []


def test_a_call_that_lacks_an_argument_is_found() -> None:
    tree = ast.parse("from compaction import tables\ntables(1, 2, 3)")
    assert list(calls_that_do_not_fit(tree)) == [
        "line 2: compaction.tables: missing a required argument: 'kept'"
    ]
