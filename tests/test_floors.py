"""How deep the simulator is, and that no module imports what imports it."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import kvtune

ROOT = Path(kvtune.__file__).parent
FLOORS = 5
ROOMS = (
    "cli", "common", "policies", "profiles", "runtime", "simulator", "traces", "tui", "tuner",
)  # fmt: skip
"""Whatever else lies in the folder, an environment of CI's among it, is none of the package."""


def module_of(path: Path) -> str:
    parts = ("kvtune", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in (ROOT / "simulator").rglob("*.py")}


def imported(source: ast.AST) -> set[str]:
    """Names of all modules that a source may import: inside functions and for types too."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports from a module down; the simulator has no circles."""
    below = imported(ast.parse(MODULES[module].read_text("utf-8"))) & MODULES.keys() - {module}
    return (module, *max(map(chain, sorted(below)), key=len, default=()))


def test_imports_are_found_wherever_they_stand() -> None:
    source = "from a.b import c\nif x:\n    import d.e\ndef f():\n    from g import (h, i as j)\n"
    assert imported(ast.parse(source)) == {"a.b", "a.b.c", "d.e", "g", "g.h", "g.i"}


def test_the_simulator_is_at_most_five_floors_deep() -> None:
    assert len(MODULES) > 30
    assert len(longest := max(map(chain, MODULES), key=len)) <= FLOORS, " -> ".join(longest)


def test_no_module_imports_what_imports_it() -> None:
    """Inside functions too; imports for types alone run nothing and may point both ways."""
    sources = {
        module_of(path): path.read_text("utf-8")
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    below = {
        name: (used(source) & sources.keys()) - {name, "kvtune"} for name, source in sources.items()
    }
    assert len(list(TopologicalSorter(below).static_order())) == len(sources) > 300


def used(source: str) -> set[str]:
    """The same without what stands under ``if TYPE_CHECKING``."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    return imported(tree)
