"""The keys that do something now, on one line; those that do not fit are left out, not cut.

Textual's own footer is a widget a key, made anew whenever the focus moves, and slow to open.
"""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.app import RenderResult
from textual.screen import Screen
from textual.widget import Widget


class Keys(Widget):
    """A line of keys with their words; a click on one presses it."""

    DEFAULT_CSS = """
    Keys { dock: bottom; height: 1; background: $footer-background; color: $footer-foreground; }
    """

    def on_mount(self) -> None:
        """Draw again when other keys do something; keys are not drawn as links."""
        self.auto_links = False
        self.screen.bindings_updated_signal.subscribe(self, self._changed)

    def _changed(self, _: Screen[object]) -> None:
        self.refresh()

    def render(self) -> RenderResult:
        """``x Axes  k Colour``, as many as there is room for."""
        key_style, line = Style(color=self._key_colour, bold=True), Text(no_wrap=True)
        for shown, words, key in self._shown():
            if line.cell_len + len(shown) + len(words) + 2 > self.size.width:
                break
            press = Style(meta={"@click": f"app.simulate_key({key!r})"})
            line.append(" ").append(shown, key_style + press).append(f" {words}", press)
        return line

    @property
    def _key_colour(self) -> str:
        return self.app.theme_variables["footer-key-foreground"]

    def _shown(self) -> list[tuple[str, str, str]]:
        """Key as shown, what it does, key as pressed; an action that two keys do stands once."""
        found: dict[str, tuple[str, str, str]] = {}
        for _, binding, enabled, _ in self.screen.active_bindings.values():
            if binding.show and enabled:
                shown = self.app.get_key_display(binding)
                found.setdefault(binding.action, (shown, binding.description, binding.key))
        return list(found.values())
