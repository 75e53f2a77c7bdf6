"""Marks and colours: a mark tells enough alone, so that nothing is lost without colour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textual.app import App

FRONT, OTHER, CHOSEN, SELECTED, MARKED = "●", "·", "★", "◆", "◇"
FAMILY_MARKS = {"layers": "l", "greedy": "g", "uniform": "u", "pyramid": "p", "adakv": "a"}
FAMILY_WORDS = {
    "layers": "per layer",
    "greedy": "greedy",
    "uniform": "uniform",
    "pyramid": "pyramid",
    "adakv": "AdaKV",
}
GROUPS = ("primary", "warning", "success", "foreground", "secondary", "muted")
"""Colours of groups of plans, one after another; a seventh is like the sixth."""
BARS = " ▁▂▃▄▅▆▇█"

Colours = Mapping[str, str]
_NAMED = ("primary", "secondary", "accent", "warning", "error", "success", "surface", "foreground")


def colours_of(app: App[object]) -> Colours:
    """The theme's colours by name, all of them real ones; ``muted`` and ``faint`` are mixed."""
    from textual.color import Color

    variables = app.theme_variables
    found = {name: variables[name] for name in _NAMED}
    ink, paper = Color.parse(found["foreground"]), Color.parse(variables["background"])
    if not app.current_theme.dark:  # bright ones are too pale on light paper
        bright = ("accent", "warning", "error", "success")
        found |= {name: Color.parse(found[name]).blend(ink, 0.4).hex for name in bright}
    return found | {"muted": paper.blend(ink, 0.7).hex, "faint": paper.blend(ink, 0.4).hex}


def ramp(colours: Colours, share: float) -> str:
    """From faint to strong as ``share`` goes from 0 to 1, in the theme's own colours."""
    from textual.color import Color

    low, high = Color.parse(colours["surface"]), Color.parse(colours["accent"])
    return low.blend(high, 0.4 + 0.6 * min(max(share, 0.0), 1.0)).hex


def mark_of(family: str) -> str:
    """One letter for a baseline's family."""
    return FAMILY_MARKS.get(family, family[:1] or "?")


def words_of(family: str) -> str:
    """A baseline's family in words."""
    return FAMILY_WORDS.get(family, family)


def short(value: float) -> str:
    """Few characters for a tick: ``0.02``, ``50``, ``16k``, ``1.5M``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size * (10 if unit == "k" else 1):
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def level_of(share: float) -> int:
    """Eighths of a bar for a share of the tokens: a halving a step, all tokens full."""
    if share >= 1:
        return 8
    return min(max(8 + math.floor(math.log2(max(share, 1e-9))), 1), 7)
