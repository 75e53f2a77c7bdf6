"""Where the memory goes: weights, overhead, prefill, cache, and what is free."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text
from textual.widget import Widget

from kvtune.common.estimate import Estimate
from kvtune.common.units import GIB
from kvtune.common.words import figure
from kvtune.simulator.memory.plan import MemoryPlan
from kvtune.tui.palette import colours_of

_GLYPHS = {"weights": "█", "overhead": "▓", "prefill": "▒", "cache": "▚", "free": "·"}
_COLOURS = {
    "weights": "primary",
    "overhead": "secondary",
    "prefill": "success",
    "cache": "accent",
    "free": "muted",
}


@dataclass(frozen=True)
class MemoryParts:
    """A plan's memory.

    Args:
        budget: the fixed parts and the limit.
        peak: of everything together.
    """

    budget: MemoryPlan
    peak: Estimate

    def sizes(self) -> dict[str, float]:
        """Bytes by part; the cache is the peak less the rest, what is free may be nothing."""
        fixed = {key: getattr(self.budget, key).value for key in ("weights", "overhead", "prefill")}
        cache = max(self.peak.value - sum(fixed.values()), 0.0)
        free = max(self.budget.limit_bytes - self.peak.value, 0.0)
        return fixed | {"cache": cache, "free": free}


class MemoryBar(Widget):
    """One bar as wide as the widget, and its parts in words below."""

    DEFAULT_CSS = "MemoryBar { height: auto; }"

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.parts: MemoryParts | None = None

    def show(self, parts: MemoryParts) -> None:
        """Draw these parts of the memory."""
        first, self.parts = self.parts is None, parts
        self.refresh(layout=first)  # as high for every plan

    def render(self) -> Text:
        """The bar and its words."""
        if self.parts is None:
            return Text("")
        colours, sizes = colours_of(self.app), self.parts.sizes()
        bar = Text(no_wrap=True)
        for (name, _), cells in zip(sizes.items(), widths(sizes, self.size.width), strict=True):
            bar.append(_GLYPHS[name] * cells, colours[_COLOURS[name]])
        return Text("\n").join([bar, self._legend(sizes), self._words()])

    def _legend(self, sizes: dict[str, float]) -> Text:
        """Parts in pairs, as many a line as there is room for."""
        colours, legend = colours_of(self.app), Text()
        across = max(self.size.width // 20, 1)
        for index, (name, size) in enumerate(sizes.items()):
            if index:
                legend.append("\n" if index % across == 0 else " ")
            legend.append(_GLYPHS[name], colours[_COLOURS[name]])
            legend.append(f" {name:<8} {size / GIB:6.2f}  ")
        return legend

    def _words(self) -> Text:
        assert self.parts is not None  # noqa: S101 - drawn only with parts
        limit = self.parts.budget.limit_bytes / GIB
        over = self.parts.peak.value > self.parts.budget.limit_bytes
        style = colours_of(self.app)["error"] if over else ""
        verdict = "does not fit" if over else "fits"
        words = f"peak {figure(self.parts.peak)}\n{verdict} in {limit:.2f} GiB"
        return Text(words, style)


def widths(sizes: dict[str, float], cells: int) -> list[int]:
    """Cells of each part; they fill the bar, and a part that is there has at least one."""
    total = sum(sizes.values()) or 1.0
    exact = [size / total * cells for size in sizes.values()]
    found = [max(round(e), 1) if e > 0 else 0 for e in exact]
    while sum(found) > cells > 0:
        found[found.index(max(found))] -= 1
    while sum(found) < cells:
        found[found.index(max(found))] += 1
    return found
