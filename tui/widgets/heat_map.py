"""Layers across, KV heads down: how much each head keeps, in how many bits, by which method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Literal

import numpy as np
from rich.text import Text
from textual.events import MouseMove

from kvtune.tui.palette import BARS, Colours, colours_of, level_of, ramp
from kvtune.tui.widgets.lines import Lines
from kvtune.tuner.explore.axes import option_bits
from kvtune.tuner.explore.compare import HeadMap

Shade = Literal["budget", "bits", "method"]
SHADES: tuple[Shade, ...] = ("budget", "bits", "method")
_MARGIN = 3  # columns of row labels
Cell = Callable[[int, int], tuple[str, str]]
"""Glyph and colour of a layer's head."""
_METHOD_COLOURS = ("muted", "primary", "accent", "warning", "success", "error", "secondary")


class HeatMap(Lines[tuple[HeadMap | None, Shade]]):
    """One cell a KV head; layers that do not fit on a line go on below."""

    heads: HeadMap | None = None
    shade: Shade = "budget"

    def show(self, heads: HeadMap | None, shade: Shade) -> None:
        """Draw a policy, or the sentence that there is none."""
        self.draw((heads, shade))

    def lay(self, content: tuple[HeadMap | None, Shade], width: int) -> list[Text]:
        """The map, with layer numbers above and a legend below."""
        self.heads, self.shade = content
        console, colours = self.app.console, colours_of(self.app)
        if self.heads is None:
            words = Text("Only the loss of this baseline is known, not its heads.", end="")
            return list(words.wrap(console, max(width, 1)))
        layers, (wide, across) = len(self.heads.options), self._columns(width)
        cell = self._cells(self.heads, colours)
        lines: list[Text] = []
        for at in range(0, layers, across):
            lines += self._block(range(at, min(at + across, layers)), wide, cell, colours["muted"])
        return lines + list(self._legend(self.heads, colours).wrap(console, max(width, 1)))

    def _columns(self, width: int) -> tuple[int, int]:
        """Columns of a layer, as many as there is room for, up to four; and layers on a line."""
        layers = len(self.heads.options) if self.heads else 1
        wide = min(max((width - _MARGIN) // layers, 1), 4)
        return wide, max((width - _MARGIN) // wide, 8)

    def _block(self, layers: range, wide: int, cell: Cell, muted: str) -> Iterator[Text]:
        assert self.heads is not None  # noqa: S101 - drawn only with heads
        yield Text(f"{'':{_MARGIN}}{ruler(layers, wide)}", muted, end="")
        for head in range(len(self.heads.options[0])):
            line = Text(f"{head:>2} ", muted, end="")
            cells = [cell(layer, head) for layer in layers]
            for colour, run in groupby(cells, key=itemgetter(1)):
                line.append("".join(glyph * wide for glyph, _ in run), colour)
            yield line

    def _cells(self, heads: HeadMap, colours: Colours) -> Cell:
        """What stands for a layer's head: glyph and colour."""
        if self.shade == "budget":
            shades = [ramp(colours, level / 8) for level in range(9)]
            levels = [[level_of(share) for share in row] for row in heads.share.tolist()]
            return lambda layer, head: (BARS[levels[layer][head]], shades[levels[layer][head]])
        if self.shade == "bits":
            widths = {o: option_bits(o)[0] for row in heads.options for o in row}
            shown = {o: (bits_glyph(w), ramp(colours, w / 16)) for o, w in widths.items()}
            return lambda layer, head: shown[heads.options[layer][head]]
        marks = {
            name: (glyph, colours[_METHOD_COLOURS[index % 7]])
            for index, (name, glyph) in enumerate(method_glyphs(heads).items())
        }
        return lambda layer, head: marks[heads.options[layer][head].method.name]

    def _legend(self, heads: HeadMap, colours: Colours) -> Text:
        if self.shade == "method":
            return Text("  ").join(
                Text.assemble((glyph, colours[_METHOD_COLOURS[index % 7]]), f" {name}")
                for index, (name, glyph) in enumerate(method_glyphs(heads).items())
            )
        if self.shade == "bits":
            return Text("bits of keys and values, the narrower; F is 16")
        kept = 100 * float(np.mean(heads.share))
        legend = Text("kept tokens: ")
        for level in (1, 3, 5, 7, 8):
            legend.append(BARS[level], ramp(colours, level / 8))
            legend.append(f" {share_words(level)}  ")
        return legend.append(f"mean {kept:.3g} %")

    def on_mouse_move(self, event: MouseMove) -> None:
        """Say in a tooltip what the head under the mouse gets."""
        self.tooltip = self._words_at(event.x, event.y)

    def _words_at(self, x: int, y: int) -> str | None:
        if self.heads is None:
            return None
        block, row = divmod(y, len(self.heads.options[0]) + 1)
        wide, across = self._columns(self.size.width)
        column, head = (x - _MARGIN) // wide, row - 1
        layer = block * across + column
        if head < 0 or x < _MARGIN or column >= across:
            return None
        if layer >= len(self.heads.options):
            return None
        option = self.heads.options[layer][head]
        tokens = int(self.heads.tokens[layer, head])
        return f"layer {layer}, KV head {head}: {option.label}, {tokens} tokens"


def ruler(layers: range, wide: int = 1) -> str:
    """Layer numbers, one every eight layers at its column."""
    line = [" "] * (wide * len(layers))
    for place, layer in enumerate(layers):
        if layer % 8 == 0:
            for column, digit in enumerate(str(layer), start=wide * place):
                if column < len(line):
                    line[column] = digit
    return "".join(line)


def share_words(level: int) -> str:
    """The largest share that a level stands for."""
    return "all" if level == 8 else f"1/{2 ** (8 - level)}"


def bits_glyph(width: float) -> str:
    """One character: ``2``, ``4``, ``8``, ``F``."""
    return "F" if width >= 16 else f"{width:.0f}"


def method_glyphs(heads: HeadMap) -> dict[str, str]:
    """A character for each method that the map uses: a letter of its name that no other has."""
    names = sorted({option.method.name for layer in heads.options for option in layer})
    found: dict[str, str] = {}
    for name in names:
        free = [letter for letter in f"{name}0123456789" if letter not in found.values()]
        found[name] = "█" if name == "full" else free[0]
    return found
