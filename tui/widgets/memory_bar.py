"""Where the memory goes: weights, overhead, prefill, cache, and what is free."""

from __future__ import annotations

from rich.text import Text

from kvtune.common.units import GIB
from kvtune.common.words import figure
from kvtune.tui.memory_parts import MemoryParts
from kvtune.tui.palette import Colours, colours_of
from kvtune.tui.widgets.lines import Lines

_GLYPHS = {"weights": "█", "overhead": "▓", "prefill": "▒", "cache": "▚", "free": "·"}
_COLOURS = {
    "weights": "primary",
    "overhead": "secondary",
    "prefill": "success",
    "cache": "accent",
    "free": "muted",
}


class MemoryBar(Lines[MemoryParts]):
    """One bar as wide as the widget, and its parts in words below."""

    def lay(self, content: MemoryParts, width: int) -> list[Text]:
        """The bar and its words."""
        colours, sizes = colours_of(self.app), content.sizes()
        bar = Text(end="")
        for (name, _), cells in zip(sizes.items(), widths(sizes, width), strict=True):
            bar.append(_GLYPHS[name] * cells, colours[_COLOURS[name]])
        over = content.peak.value > content.budget.limit_bytes
        style, verdict = (colours["error"], "does not fit") if over else ("", "fits")
        limit = content.budget.limit_bytes / GIB
        words = f"peak {figure(content.peak)}", f"{verdict} in {limit:.2f} GiB"
        return [
            bar,
            *_legend(sizes, width, colours),
            *(Text(line, style, end="") for line in words),
        ]


def _legend(sizes: dict[str, float], width: int, colours: Colours) -> list[Text]:
    """The parts, as many a line as there is room for."""
    across, lines = max(width // 20, 1), list[Text]()
    for index, (name, size) in enumerate(sizes.items()):
        if index % across == 0:
            lines.append(Text(end=""))
        lines[-1].append(_GLYPHS[name], colours[_COLOURS[name]])
        lines[-1].append(f" {name:<8} {size / GIB:6.2f}   ")
    return lines


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
