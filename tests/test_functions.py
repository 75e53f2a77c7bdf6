"""How long functions are and how many parameters they take, outside kernels."""

from __future__ import annotations

from functools import cache

from kvtune.tests.own_sources import ROOMS, ROOT, Size, Source, read, sources

LINES, PARAMETERS = 60, 10
GIVEN = {
    "runtime/serving/vllm_attention.py:__init__",  # vLLM calls it with these parameters
    "tuner/library.py:estimate",  # the options of its command, by name
}


@cache
def functions() -> dict[str, Size]:
    """Every function by its place; a place that has several of one name, the largest of them."""
    found: dict[str, Size] = {}
    for path in sources():
        file = path.relative_to(ROOT).as_posix()
        if not file.startswith("runtime/kernels/"):
            for name, size in read(path).functions:
                place = f"{file}:{name}"
                found[place] = Size(*map(max, zip(size, found.get(place, size), strict=True)))
    return found


def test_a_long_function_and_many_parameters_are_seen_wherever_they_stand() -> None:
    body = "\n".join(["            x = 1"] * 61)
    inner = f"        async def inner(a, /, b, *, c):\n{body}\n"
    text = f"class A:\n    def outer(self, a, b):\n{inner}"
    assert dict(Source.of(text).functions) == {"outer": Size(62, 2), "inner": Size(61, 3)}


def test_every_room_is_looked_at() -> None:
    """All folders that hold modules, but that of tests."""
    rooms = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert rooms - {"tests"} == {*ROOMS}
    assert all(any(path.is_relative_to(ROOT / room) for path in sources()) for room in ROOMS)


def test_no_function_is_longer_than_a_screen() -> None:
    assert len(functions()) > 1000
    assert {name: size for name, size in functions().items() if size.lines > LINES} == {}


def test_no_function_takes_more_than_ten_parameters() -> None:
    """But commands, which have one an option."""
    many = {name for name, size in functions().items() if size.parameters > PARAMETERS}
    assert {name for name in many if not name.startswith("cli/")} <= GIVEN
