"""Tables and lines on narrow screens, in pipes, and with hostile names in them."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.cli.layout import Grid
from kvtune.cli.output import Output, one_line, table
from kvtune.common.estimate import Estimate
from kvtune.common.words import figure, printable
from kvtune.tuner.would_fit import two_digits_below

WORDS = st.text("abcdefgh ", min_size=1, max_size=40).map(lambda text: " ".join(text.split()))
FIGURE = st.sampled_from(["-", "1 234", "0.0146 [0.0074, 0.029]", "19.4 ms [15.4 ms, 23.6 ms]"])


def shown(width: int, *parts: Any) -> str:
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        Output(stream, as_json=False, quiet=False).show(*parts)
    return stream.getvalue()


@given(st.lists(st.tuples(WORDS, FIGURE, FIGURE, WORDS), min_size=1, max_size=4), st.data())
def test_a_table_loses_no_character_at_any_width(rows: list[Any], data: st.DataObject) -> None:
    width = data.draw(st.integers(40, 140))
    columns = ("policy of some name", "predicted KL", "tokens a second", "what is said of it")
    text = shown(width, table("", columns, rows, left=(0, 3)))
    cells = [*columns, *(cell for row in rows for cell in row)]
    assert sorted(text.split()) == sorted(word for cell in cells for word in cell.split())
    assert max(map(len, text.splitlines())) <= width


def test_columns_stand_below_others_where_they_have_no_room() -> None:
    rows = [("snapkv+adakv", *["0.0146 [0.0074, 0.029]"] * 4), ("h2o", "1", "2", "3", "4")]
    lines = shown(42, table("", ("policy", "a", "b", "c", "d"), rows)).splitlines()
    assert lines == [
        "policy                             a",
        "                       b",
        "                       c",
        "                       d",
        "snapkv+adakv  0.0146 [0.0074, 0.029]",
        *["  0.0146 [0.0074, 0.029]"] * 3,
        "h2o                                1",
        *[f"                       {n}" for n in (2, 3, 4)],
    ]


@given(st.lists(st.tuples(WORDS, FIGURE), min_size=1, max_size=4))
def test_a_form_is_no_wider_than_asked_where_any_is(rows: list[tuple[str, ...]]) -> None:
    grid = Grid(("policy", "KL"), tuple(rows), frozenset({0}))
    narrowest = grid.fitted(1).width
    for width in range(narrowest, grid.width + 1):
        assert grid.fitted(width).width <= width


def test_names_stay_on_one_line_while_intervals_can_go_below() -> None:
    row = ("uniform h2o int3+4", *["0.0146 [0.0074, 0.029]"] * 3)
    lines = shown(72, table("", ("policy", "a", "b", "c"), [row])).splitlines()
    assert lines[1].split("  ")[0] == "uniform h2o int3+4"
    assert lines[2].count("[0.0074, 0.029]") == 3


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("120", 120), ("", 100), ("x", 100)])
def test_what_is_piped_follows_columns(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    stream = io.StringIO()
    Output(stream, as_json=False, quiet=False).show("word " * 200)
    longest = max(map(len, stream.getvalue().splitlines()))
    assert width - 5 <= longest <= width


def test_a_command_is_one_line_however_long() -> None:
    command = "next: kvtune export " + "a-folder/" * 30
    assert command in shown(60, "before", one_line(command), "after").splitlines()


HOSTILE = ["\x1b[2J", "\x1b]0;title\x07", "\r", "\x9b31m", "\u202e", "\x00", "\u2028"]


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_of_names_never_reach_the_terminal(text: str) -> None:
    name = f"plan{text}name"
    out = shown(80, name, one_line(name), table(name, ("a", "b"), [(name, name)], caption=name))
    assert text not in out
    assert out.count("plan\\") == 6
    assert printable("übrig 10 µs\t日本\n") == "übrig 10 µs\t日本\n"


def test_errors_spell_control_characters_out(capsys: pytest.CaptureFixture[str]) -> None:
    from kvtune.cli.failures import exit_code
    from kvtune.common.errors import DoesNotFitError

    def fails() -> None:
        raise DoesNotFitError("bad\x1b[31m", hint="hint\x07")

    assert exit_code(fails) == 3
    assert capsys.readouterr().err == "error: bad\\x1b[31m\n\nhint: hint\\x07\n"


@given(st.floats(0.001, 9e5), st.floats(0.001, 1), st.floats(0.001, 1))
def test_an_interval_holds_its_value_as_it_is_shown(
    value: float, below: float, above: float
) -> None:
    """4.03 [4, 4] would say that the value lies outside."""
    low, high = value * (1 - below / 9), value * (1 + above / 9)
    text = figure(Estimate(value, low, high, "1/s", "fitted"), tier=False)
    numbers = re.findall(r"[0-9.e+-]+", re.sub(r"(?<=\d) (?=\d)", "", text))
    middle, least, most = (float(number) for number in numbers)
    assert least <= middle <= most


@given(st.floats(1e-4, 100))
def test_a_share_that_fits_still_fits_when_it_is_typed(percent: float) -> None:
    typed = float(two_digits_below(percent))
    assert 0.9 * percent <= typed <= percent * (1 + 1e-12)
