"""How deep the simulator is, and that no module imports what imports it."""

from __future__ import annotations

from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from kvtune.tests.own_sources import ROOT, Source, module_of, read, sources

FLOORS = 5
MODULES = {module_of(path): path for path in (ROOT / "simulator").rglob("*.py")}


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports from a module down; the simulator has no circles."""
    below = read(MODULES[module]).imports & MODULES.keys() - {module}
    return (module, *max(map(chain, sorted(below)), key=len, default=()))


def in_order(modules: dict[str, Source]) -> list[str]:
    """Modules, each behind those that it imports.

    Raises:
        CycleError: some import each other.
    """
    below = {
        name: (source.used & modules.keys()) - {name, "kvtune"} for name, source in modules.items()
    }
    return list(TopologicalSorter(below).static_order())


def test_imports_are_found_wherever_they_stand() -> None:
    source = "from a.b import c\nif x:\n    import d.e\ndef f():\n    from g import (h, i as j)\n"
    assert Source.of(source).imports == {"a.b", "a.b.c", "d.e", "g", "g.h", "g.i"}


def test_the_simulator_is_at_most_five_floors_deep() -> None:
    assert len(MODULES) > 30
    assert len(longest := max(map(chain, MODULES), key=len)) <= FLOORS, " -> ".join(longest)


def test_no_module_imports_what_imports_it() -> None:
    """Inside functions too; imports for types alone run nothing and may point both ways."""
    modules = {module_of(path): read(path) for path in sources()}
    assert len(in_order(modules)) == len(modules) > 400


def test_a_circle_is_found_and_imports_for_types_alone_are_none() -> None:
    way = {
        "kvtune.a": Source.of("import kvtune.b"),
        "kvtune.b": Source.of("def f():\n    from kvtune import c"),
    }
    back = Source.of("if TYPE_CHECKING:\n    import kvtune.a")
    assert back.imports == {"kvtune.a"}
    assert in_order({**way, "kvtune.c": back}) == ["kvtune.c", "kvtune.b", "kvtune.a"]
    with pytest.raises(CycleError):
        in_order({**way, "kvtune.c": Source.of("import kvtune.a")})
