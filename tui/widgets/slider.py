"""One value out of a few, on a line: arrows, mouse, home and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.text import Text
from textual import events
from textual.binding import Binding
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from kvtune.tui.palette import colours_of

T = TypeVar("T")
_LABEL, _VALUE = 9, 22  # columns


@dataclass(frozen=True)
class Stop(Generic[T]):
    """A place of the knob: what it stands for, in words."""

    value: T
    words: str


class Slider(Widget, Generic[T], can_focus=True):
    """``context  ━━━━━●────────  32k``."""

    DEFAULT_CSS = """
    Slider { height: 1; }
    Slider:focus { background: $boost; text-style: bold; }
    """
    BINDINGS = [  # noqa: RUF012
        Binding("left", "move(-1)", "Less", tooltip="One step down"),
        Binding("right", "move(1)", "More", tooltip="One step up"),
        Binding("home", "move(-999)", "Least", show=False),
        Binding("end", "move(999)", "Most", show=False),
    ]
    place: reactive[int] = reactive(0, init=False)

    @dataclass
    class Moved(Message):
        """The knob is somewhere else now."""

        slider: Slider[object]

    def __init__(self, label: str, *, id: str) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.label = label
        self.stops: Sequence[Stop[T]] = ()

    def offer(self, stops: Sequence[Stop[T]], place: int) -> None:
        """Give it places, and put the knob on one, without a message."""
        self.stops = stops
        self.set_reactive(Slider.place, place)
        self.refresh()

    @property
    def value(self) -> T:
        """What the knob stands on."""
        return self.stops[self.place].value

    def validate_place(self, place: int) -> int:
        """Keep the knob on the line."""
        return max(0, min(place, len(self.stops) - 1))

    def watch_place(self) -> None:
        """Tell that it moved."""
        self.post_message(self.Moved(self))  # type: ignore[arg-type]

    def action_move(self, by: int) -> None:
        """Move the knob."""
        self.place += by

    @property
    def _track(self) -> int:
        return max(self.size.width - _LABEL - _VALUE - 2, 4)

    def on_click(self, event: events.Click) -> None:
        """Put the knob where the mouse is."""
        last = len(self.stops) - 1
        self.place = round((event.x - _LABEL) / max(self._track - 1, 1) * last)

    def render(self) -> Text:
        """Label, line with knob, value."""
        if not self.stops:
            return Text(self.label)
        colours = colours_of(self.app)
        last = max(len(self.stops) - 1, 1)
        knob = round(self.place / last * (self._track - 1))
        text = Text(f"{self.label:<{_LABEL}}", no_wrap=True)
        text.append("━" * knob, colours["primary"])
        text.append("●", colours["accent"])
        text.append("─" * (self._track - knob - 1), colours["muted"])
        return text.append(f"  {self.stops[self.place].words}")
