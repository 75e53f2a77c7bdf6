"""The report's other pictures: a plan's memory, its heads, and its loss by kind of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvtune.common.estimate import Estimate
from kvtune.common.units import GIB
from kvtune.tui.memory_parts import MemoryParts
from kvtune.tui.report.drawing import COLOURS, FAMILIES, Draw, legend_columns
from kvtune.tui.report.front_chart import reach
from kvtune.tuner.explore.axes import option_bits
from kvtune.tuner.explore.compare import HeadMap
from kvtune.tuner.explore.plans import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = {
    "weights": "blue",
    "overhead": "soft",
    "prefill": "green",
    "cache": "amber",
    "free": "line",
}


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
        columns = legend_columns(axes, 7)
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
            ends = np.array(rows_).T
            colour = COLOURS[FAMILIES.get(family, "red")]
            style = {"linewidth": 0.8, "capsize": 2, "ecolor": COLOURS["ink"]}
            axes.bar(at, ends[0], width, label=name, color=colour, yerr=reach(ends), error_kw=style)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_ylabel("KL, nats/token")
        axes.grid(True, axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.figure.legend(fontsize=8, ncols=legend_columns(axes, 3), loc="outside lower center")

    return draw
