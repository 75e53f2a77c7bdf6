"""What is written here: each file is parsed once, for whoever asks how modules are made."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import kvtune

ROOT = Path(kvtune.__file__).parent
ROOMS = (
    "benchmarks", "cli", "common", "constraints", "docs", "policies", "profiles", "runtime",
    "simulator", "traces", "tui", "tuner",
)  # fmt: skip
"""Whatever else lies in the folder, an environment of CI's among it, is none of the package."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Size(NamedTuple):
    """Of one function."""

    lines: int
    parameters: int


@dataclass(frozen=True)
class Source:
    """One file.

    Args:
        imports: names of all modules that it may import: inside functions and for types too.
        used: the same without what stands under ``if TYPE_CHECKING``.
        functions: their names and sizes.
    """

    imports: frozenset[str]
    used: frozenset[str]
    functions: tuple[tuple[str, Size], ...]

    @staticmethod
    def of(text: str) -> Source:
        """Read a file's text."""
        tree = ast.parse(text)
        functions = [
            (node.name, Size(lines(node), parameters(node)))
            for node in statements(tree)
            if isinstance(node, Function)
        ]
        return Source(imported(tree), imported(tree, types=False), tuple(functions))


@cache
def read(path: Path) -> Source:
    return Source.of(path.read_text(encoding="utf-8"))


def sources() -> list[Path]:
    """All that is written here but tests."""
    inside = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [*sorted(ROOT.glob("*.py")), *inside]


def module_of(path: Path) -> str:
    parts = ("kvtune", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def statements(tree: ast.AST, types: bool = True) -> Iterator[ast.AST]:
    """Everything that holds or is a statement; expressions, most of a tree, hold none.

    Args:
        tree: of a file.
        types: what stands under ``if TYPE_CHECKING`` too.
    """
    yield tree
    for part in ("body", "orelse", "handlers", "finalbody", "cases"):
        below = getattr(tree, part, ())
        if part == "body" and not types and isinstance(tree, ast.If):
            below = [] if ast.unparse(tree.test) == "TYPE_CHECKING" else below
        for node in below if isinstance(below, list) else ():
            yield from statements(node, types)


def imported(tree: ast.AST, types: bool = True) -> frozenset[str]:
    found: set[str] = set()
    for node in statements(tree, types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def parameters(function: Function) -> int:
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def lines(function: Function) -> int:
    """Of its body; a command's signature has a line an option."""
    return (function.end_lineno or function.lineno) - function.body[0].lineno + 1
