"""How the report's pictures are drawn: colours, style, and one drawing saved as SVG and as PNG.

Drawn by matplotlib: the same few lines give both formats without a browser or a system library.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes"], None]

COLOURS = {
    "paper": "#ffffff",
    "ink": "#1c2733",
    "soft": "#5a6a79",
    "line": "#d5dce3",
    "blue": "#0d64b2",
    "green": "#10804a",
    "red": "#c0314b",
    "amber": "#b86e00",
}
NARROW = 4.5
"""Inches of a picture for a phone's width."""

FAMILIES = {
    "kvtune": "green",
    "layers": "blue",
    "greedy": "amber",
    "uniform": "red",
    "pyramid": "soft",
    "adakv": "ink",
}
"""The colour that a policy has in every picture."""


@contextmanager
def _style() -> Iterator[None]:
    """Text stays text, identifiers stay the same, lines are quiet."""
    import matplotlib as mpl

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kvtune",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": COLOURS["ink"],
        "axes.edgecolor": COLOURS["soft"],
        "axes.labelcolor": COLOURS["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "grid.color": COLOURS["line"],
        "xtick.color": COLOURS["soft"],
        "ytick.color": COLOURS["soft"],
        "legend.frameon": False,
    }
    with mpl.rc_context(settings):
        yield


def rendered(
    draw: Draw, width: float, height: float, kinds: Sequence[str] = ("svg", "png")
) -> dict[str, bytes]:
    """A picture of ``width`` x ``height`` inches, in each of the formats."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not again for every saved file
        return {kind: _saved(figure, kind) for kind in kinds}


def _saved(figure: Figure, kind: str) -> bytes:
    """The figure in one format; ``Figure.savefig`` would draw it twice for each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    canvas: Any  # matplotlib declares no types of these methods
    if kind == "svg":
        canvas = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata={"Date": None})
    else:
        figure.set_facecolor("white")
        figure.set_dpi(144)
        canvas = FigureCanvasAgg(figure)
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def inline(svg: bytes, name: str) -> str:
    """An SVG for the page: no header, identifiers of its own, colours that follow the theme."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*pt" height="[^"]*pt"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)
    for colour, code in COLOURS.items():
        text = text.replace(code, f"var(--{colour})")
    return text


def inches(axes: Axes) -> tuple[float, float]:
    """Width and height of the whole picture."""
    figure = axes.get_figure(root=True)
    assert figure is not None  # noqa: S101 - the axes are drawn on one
    width, height = figure.get_size_inches()
    return float(width), float(height)


def legend_columns(axes: Axes, most: int) -> int:
    """Fewer where the picture is narrow."""
    return most if inches(axes)[0] > NARROW else max(1, most // 2)
