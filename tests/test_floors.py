"""How deep the simulator is: modules that import one another, whatever is imported and where."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import kvtune

ROOT = Path(kvtune.__file__).parent
FLOORS = 5


def module_of(path: Path) -> str:
    parts = ("kvtune", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in (ROOT / "simulator").rglob("*.py")}


def imported(source: str) -> set[str]:
    """Names of all modules that a source may import: inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports from a module down; the simulator has no circles."""
    below = imported(MODULES[module].read_text("utf-8")) & MODULES.keys() - {module}
    return (module, *max(map(chain, sorted(below)), key=len, default=()))


def test_imports_are_found_wherever_they_stand() -> None:
    source = "from a.b import c\nif x:\n    import d.e\ndef f():\n    from g import (h, i as j)\n"
    assert imported(source) == {"a.b", "a.b.c", "d.e", "g", "g.h", "g.i"}


def test_the_simulator_is_at_most_five_floors_deep() -> None:
    assert len(MODULES) > 30
    assert len(longest := max(map(chain, MODULES), key=len)) <= FLOORS, " -> ".join(longest)
