"""The report's pictures, drawn once and saved as SVG for the page and as PNG beside it.

Drawn by matplotlib: the same few lines give both formats without a browser or a system library.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtune.common.estimate import Estimate
from kvtune.common.units import GIB
from kvtune.tui.memory_parts import MemoryParts
from kvtune.tui.palette import short, words_of
from kvtune.tui.report import hover
from kvtune.tuner.explore.axes import option_bits
from kvtune.tuner.explore.compare import HeadMap
from kvtune.tuner.explore.plans import Floats
from kvtune.tuner.explore.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

Draw = Callable[["Axes"], None]

COLOURS = {
    "ink": "#1c2733",
    "soft": "#5a6a79",
    "line": "#d5dce3",
    "blue": "#0d64b2",
    "green": "#10804a",
    "red": "#c0314b",
    "amber": "#b86e00",
}
FAMILIES = {
    "kvtune": "green",
    "layers": "blue",
    "greedy": "amber",
    "uniform": "red",
    "pyramid": "soft",
    "adakv": "ink",
}
"""The colour that a policy has in every picture."""

_PARTS = {
    "weights": "blue",
    "overhead": "soft",
    "prefill": "green",
    "cache": "amber",
    "free": "line",
}


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


# --- the pictures ------------------------------------------------------------------------------


def front_chart(view: View) -> Draw:
    """All plans, the front, the chosen plan with its interval, baselines and limits."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(view.x.words)
        axes.set_ylabel(view.y.words)
        axes.grid(True, which="major", linewidth=0.6)
        _plans(axes, view)
        _chosen(axes, view)
        _baselines(axes, view)
        for line in view.lines:
            mark = axes.axvline if line.axis is view.x else axes.axhline
            mark(line.value, color=COLOURS["soft"], linestyle=":", linewidth=1.2, label=line.words)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: short(value))
            axis.set_minor_formatter(_plain_labels())
        columns = _legend_columns(axes, 5)
        axes.figure.legend(fontsize=8, ncols=columns, loc="outside lower center")

    return draw


def _plain_labels() -> Formatter:
    """Labels between powers of ten where there are few of these, as text.

    Matplotlib's own are formulas, and reading these took a tenth of the report's time.
    """
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return short(x) if super().__call__(x, pos) else ""

    return Plain()


def _plans(axes: Axes, view: View) -> None:
    others = np.setdiff1d(view.rows, view.front)
    axes.scatter(
        view.across[others, 0],
        view.upward[others, 0],
        s=10,
        alpha=0.4,
        linewidth=0,
        color=COLOURS["soft"],
        label="other plans",
        rasterized=len(others) > 2000,
    )
    front = view.front
    axes.plot(
        view.across[front, 0],
        view.upward[front, 0],
        "o-",
        color=COLOURS["blue"],
        markersize=5,
        linewidth=1,
        label="front",
        gid=hover.FRONT,
    )


def _chosen(axes: Axes, view: View) -> None:
    row = view.study.chosen
    if row is None:
        return
    x, y = view.across[row], view.upward[row]
    axes.errorbar(
        x[0],
        y[0],
        xerr=_reach(x),
        yerr=_reach(y),
        fmt="*",
        color=COLOURS["green"],
        markersize=13,
        capsize=3,
        label="chosen, with its interval" if view.study.outcome else "best so far",
        zorder=5,
    )


def _reach(ends: Floats) -> Floats:
    value, low, high = ends
    return np.array([[max(value - low, 0)], [max(high - value, 0)]])


def _baselines(axes: Axes, view: View) -> None:
    """A cross for each baseline, and its name beside it, moved apart from the others' names."""
    lowest_first = sorted(view.baselines(), key=lambda found: found[2])
    for baseline, x, y in lowest_first:
        colour = COLOURS[FAMILIES.get(baseline.family, "red")]
        axes.plot(x, y, "x", color=colour, markersize=7, markeredgewidth=2, zorder=4)
    heights = _apart([_height(axes, y) for _, _, y in lowest_first])
    for (baseline, x, y), height in zip(lowest_first, heights, strict=True):
        colour = COLOURS[FAMILIES.get(baseline.family, "red")]
        axes.annotate(
            f"{words_of(baseline.family)} {y:.2g}",
            (x, y),
            xytext=(12, height - _height(axes, y) - 3),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": COLOURS["line"], "linewidth": 0.8},
        )


_NAME_HEIGHT = 11.0  # points between the names of two baselines


def _height(axes: Axes, value: float) -> float:
    """Where a value lies on the logarithmic axis, in points above its start, roughly."""
    low, high = axes.get_ylim()
    share = (np.log(max(value, low)) - np.log(low)) / (np.log(high) - np.log(low))
    return float(share * _inches(axes)[1] * 72 * 0.85)


def _inches(axes: Axes) -> tuple[float, float]:
    """Width and height of the whole picture."""
    figure = axes.get_figure(root=True)
    assert figure is not None  # noqa: S101 - the axes are drawn on one
    width, height = figure.get_size_inches()
    return float(width), float(height)


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved up as far as each needs to stand clear of the one below."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + _NAME_HEIGHT) if found else height)
    return found


def memory_chart(parts: MemoryParts) -> Draw:
    """One bar: weights, overhead, prefill, cache, free, and the limit."""

    def draw(axes: Axes) -> None:
        left = 0.0
        for name, size in parts.sizes().items():
            width = size / GIB
            colour = COLOURS[_PARTS[name]]
            axes.barh([0], [width], left=left, color=colour, label=f"{name} {width:.2f}")
            left += width
        low, high = parts.peak.low / GIB, parts.peak.high / GIB
        axes.plot([low, high], [0, 0], color=COLOURS["ink"], linewidth=2, label="peak's interval")
        axes.axvline(parts.budget.limit_bytes / GIB, color=COLOURS["red"], label="limit")
        axes.set_yticks([])
        axes.set_xlabel("GiB")
        columns = _legend_columns(axes, 7)
        axes.figure.legend(fontsize=8, ncols=columns, loc="outside lower center")

    return draw


def heads_chart(heads: HeadMap, shade: str) -> Draw:
    """Layers across, KV heads down: share of tokens kept, or bits."""
    values = heads.share if shade == "budget" else _bits(heads)
    label = "share kept" if shade == "budget" else "bits"

    def draw(axes: Axes) -> None:
        from matplotlib.colors import LogNorm

        norm = LogNorm(min(float(values.min()), 0.5), float(values.max()))
        edges = [np.arange(size + 1) - 0.5 for size in values.shape]
        mesh = axes.pcolormesh(*edges, values.T, cmap="viridis", norm=norm, linewidth=0)
        axes.invert_yaxis()
        axes.set_yticks(range(values.shape[1]))
        axes.set_xlabel("layer")
        axes.set_ylabel("KV head")
        bar = axes.figure.colorbar(mesh, ax=axes, label=label, pad=0.01)
        ticks = sorted({float(v) for v in np.unique(values)})
        ticks = ticks if len(ticks) <= 8 else ticks[:: -(-len(ticks) // 8)]
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
        bar.minorticks_off()

    return draw


def _bits(heads: HeadMap) -> Floats:
    return np.array([[option_bits(o)[0] for o in row] for row in heads.options], np.float64)


def kinds_chart(kinds: tuple[str, ...], rows: list[tuple[str, str, dict[str, Estimate]]]) -> Draw:
    """Held-out loss by kind of text with intervals, the plan first; name, family and losses."""

    def draw(axes: Axes) -> None:
        width = 0.8 / max(len(rows), 1)
        for index, (name, family, losses) in enumerate(rows):
            at = np.arange(len(kinds)) + (index - (len(rows) - 1) / 2) * width
            known = [losses.get(kind) for kind in kinds]
            rows_ = [(e.value, e.low, e.high) if e else (np.nan,) * 3 for e in known]
            value, low, high = np.array(rows_).T
            colour = COLOURS[FAMILIES.get(family, "red")]
            ends = {"linewidth": 0.8, "capsize": 2, "ecolor": COLOURS["ink"]}
            reach = (value - low, high - value)
            axes.bar(at, value, width, label=name, color=colour, yerr=reach, error_kw=ends)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_ylabel("KL, nats/token")
        axes.grid(True, axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.figure.legend(fontsize=8, ncols=_legend_columns(axes, 3), loc="outside lower center")

    return draw


def _legend_columns(axes: Axes, most: int) -> int:
    """Fewer where the picture is narrow."""
    return most if _inches(axes)[0] > NARROW else max(1, most // 2)


NARROW = 4.5
"""Inches of a picture for a phone's width."""
