"""Keys and marks, on one page."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

from kvtune.tui.palette import CHOSEN, FRONT, MARKED, OTHER, SELECTED

_MOVES = (
    ("left right", "Along the front; page up, page down by ten; home, end"),
    ("click", "The plan nearest to the mouse"),
    ("+ - 0", "Zoom, and the whole plot again; drag to pan"),
    ("s r /", "In the table of plans: sort by the next column, turn round, search; escape leaves"),
    ("tab", "Between plot, sliders and plan"),
    ("ctrl+p", "Every command by name"),
    ("t", "Light or dark"),
    ("q", "Quit"),
)
_MARKS = (
    (FRONT, "on the front: no other plan is better in both figures"),
    (OTHER, "another plan"),
    (CHOSEN, "the plan that the search chose, or the best so far"),
    (SELECTED, "the plan on the right, with its interval"),
    (MARKED, "marked, to compare others with"),
    ("u p a l g", "baselines at the plan's bytes: uniform, pyramid, AdaKV, per layer, greedy"),
)
_TIERS = (
    "Every figure says how it was obtained. Loss: table (predicted), replay (exact for one plan), "
    "live (the model ran). Memory and time: measured, interpolated, fitted, transferred, "
    "datasheet, assumed; exact is counted. Intervals: 95 % over samples for loss, else 10-90 %."
)


class HelpScreen(ModalScreen[None]):
    """Made from the bindings of the screen that it explains."""

    BINDINGS = [("escape,question_mark,q", "app.pop_screen", "Back")]  # noqa: RUF012

    def __init__(self, explained: Screen[None]) -> None:
        super().__init__(classes="dialog")
        self.explained = explained

    def compose(self) -> ComposeResult:
        """Keys, marks, tiers."""
        with VerticalScroll(id="box") as box:
            box.border_title = "Keys and marks"
            box.border_subtitle = "escape goes back"
            yield Static(self._keys())
            yield Static(_two_columns(_MARKS))
            yield Static(Text("\n" + _TIERS))

    def _keys(self) -> Table:
        bound = [b for b in self.explained.BINDINGS if isinstance(b, Binding)]
        rows = [(b.key_display or b.key, b.tooltip or b.description) for b in bound]
        return _two_columns((*_MOVES[:3], *rows, *_MOVES[3:]))


def _two_columns(rows: tuple[tuple[str, str], ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold", width=10)
    table.add_column()
    for key, words in rows:
        table.add_row(Text(key), Text(words))
    return table
