"""Where one policy gives a head more bytes than another, layer by layer."""

from __future__ import annotations

from rich.text import Text
from textual.widget import Widget

from kvtune.tui.palette import colours_of
from kvtune.tui.widgets.heat_map import ruler
from kvtune.tuner.explore.plans import Floats

_MARGIN = 3
_STEPS = ((4.0, "▲", "success"), (1.01, "▴", "success"), (0.99, "=", "muted"),
          (0.25, "▾", "error"), (0.0, "▼", "error"))  # fmt: skip


class RatioMap(Widget):
    """One mark a KV head: far more, more, alike, fewer, far fewer."""

    DEFAULT_CSS = "RatioMap { height: auto; }"

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.ratio: Floats | None = None

    def show(self, ratio: Floats | None) -> None:
        """Draw ratios ``[L, H]``, or nothing."""
        self.ratio = ratio
        self.refresh(layout=True)

    def render(self) -> Text:
        """The map and its legend."""
        if self.ratio is None:
            return Text("")
        across = max(self.size.width - _MARGIN, 8)
        layers = len(self.ratio)
        blocks = [
            self._block(self.ratio, range(at, min(at + across, layers)))
            for at in range(0, layers, across)
        ]
        return Text("\n").join([*blocks, Text("▲ over 4 x  ▴ more  = alike  ▾ fewer  ▼ under 1/4")])

    def _block(self, ratios: Floats, layers: range) -> Text:
        colours = colours_of(self.app)
        lines = [Text(f"{'':{_MARGIN}}{ruler(layers)}", colours["muted"])]
        for head in range(ratios.shape[1]):
            line = Text(f"{head:>2} ", colours["muted"], no_wrap=True)
            for layer in layers:
                glyph, colour = mark(float(ratios[layer, head]))
                line.append(glyph, colours[colour])
            lines.append(line)
        return Text("\n", no_wrap=True).join(lines)


def mark(ratio: float) -> tuple[str, str]:
    """Glyph and colour of a ratio."""
    for least, glyph, colour in _STEPS:
        if ratio >= least:
            return glyph, colour
    return _STEPS[-1][1:]
