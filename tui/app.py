"""The explorer: one study, live while its search runs in another terminal."""

from __future__ import annotations

from collections.abc import Iterable

from textual import work
from textual.app import App, SystemCommand
from textual.screen import Screen
from textual.worker import get_current_worker

from kvtune.common.errors import KvtuneError
from kvtune.common.garbage import kept_for_good
from kvtune.tui.feed import Feed
from kvtune.tui.messages import Arrived, Lost
from kvtune.tui.screens.explorer import ExplorerScreen
from kvtune.tuner.explore.study import Study

_INTERVAL_S = 1.0
DARK, LIGHT = "textual-dark", "textual-light"


class Explorer(App[None]):
    """Asks the feed again and again, in a thread, and hands snapshots to the screen.

    Args:
        feed: where snapshots come from.
        interval_s: seconds between two reads; 0 for a single one.
    """

    TITLE = "kvtune"
    CSS_PATH = "explorer.tcss"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS = [("q", "quit", "Quit"), ("t", "theme", "Light or dark")]  # noqa: RUF012

    def __init__(self, feed: Feed, interval_s: float = _INTERVAL_S) -> None:
        super().__init__()
        self.feed, self.interval_s = feed, interval_s
        self.study: Study | None = None

    def get_default_screen(self) -> Screen[None]:
        """The plot and the plan."""
        return ExplorerScreen()

    def on_ready(self) -> None:
        """Read as soon as there is a screen to draw on, then every second."""
        self.read()
        if self.interval_s:
            self.set_interval(self.interval_s, self.read)

    @work(thread=True, exclusive=False, group="feed")
    def read(self) -> None:
        """One look at the storage; a slow one is not overtaken by the next."""
        if any(w for w in self.workers if w.group == "feed" and w is not get_current_worker()):
            return
        try:
            study = self.feed.read() if self.study else self._first_read()
        except KvtuneError as error:
            self.post_message(Lost(error))
        else:
            self.post_message(Arrived(study))

    def _first_read(self) -> Study:
        with kept_for_good():
            return self.feed.read()

    async def on_arrived(self, message: Arrived) -> None:
        """Show the snapshot, if anything in it is new."""
        self.study = message.study
        await self.main.arrived(message.study)

    def on_lost(self, message: Lost) -> None:
        """Say what is wrong, and keep what was seen."""
        self.main.lost(message.error)

    @property
    def main(self) -> ExplorerScreen:
        """The screen that is always there, below any other."""
        screen = self.screen_stack[0]
        assert isinstance(screen, ExplorerScreen)  # noqa: S101 - the default screen
        return screen

    def action_theme(self) -> None:
        """Light or dark."""
        self.theme = LIGHT if self.current_theme.dark else DARK

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: everything that a key does on the main screen, and Textual's own."""
        yield from super().get_system_commands(screen)
        if screen is self.main:
            for title, help_text, action in self.main.commands():
                yield SystemCommand(title, help_text, action)
