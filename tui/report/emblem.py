"""The plan's heads as the page's emblem: layers across, KV heads down, strong where much stays."""

from __future__ import annotations

from html import escape
from itertools import groupby

from kvtune.tui.palette import level_of
from kvtune.tuner.explore.compare import HeadMap

_CELL = 5


def emblem(heads: HeadMap) -> str:
    """A small SVG; neighbours in a row that keep alike are one rectangle."""
    layers, rows = heads.share.shape
    cells = "".join(_row(head, heads.share[:, head].tolist()) for head in range(rows))
    words = escape(f"What each of {layers} x {rows} KV heads keeps of a prompt")
    return (
        f'<svg class="emblem" viewBox="0 0 {_CELL * layers} {_CELL * rows}" role="img" '
        f'fill="currentColor"><title>{words}</title>{cells}</svg>'
    )


def _row(head: int, shares: list[float]) -> str:
    found, layer = [], 0
    for level, run in groupby(shares, key=level_of):
        wide = len(list(run))
        place = f'x="{_CELL * layer}" y="{_CELL * head}" width="{_CELL * wide}" height="{_CELL}"'
        found.append(f'<rect {place} opacity="{level / 8:.3g}"/>')
        layer += wide
    return "".join(found)
