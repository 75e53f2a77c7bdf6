"""Values that a browser shows where the mouse rests on a point: titles in the SVG, no script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from kvtune.common.words import count, figure, percent, printable
from kvtune.tuner.explore.view import View

FRONT = "front-points"
"""Identifier of the markers of the front, in the order of ``front_titles``."""


def front_titles(view: View) -> list[str]:
    """What each plan of the front is; one at zero is drawn too, far below the axis."""
    return [_title(view, int(row)) for row in view.front]


def _title(view: View, row: int) -> str:
    plan, figures = view.study.plans[row], view.figures
    at_once = f"{count(figures.sequences[row])} x {count(figures.context_tokens[row])} tokens"
    return "\n".join(
        (
            f"trial {plan.trial}{', chosen' if row == view.study.chosen else ''}",
            f"loss {figure(plan.kl)}",
            f"{percent(float(figures.share[row]))} of bf16, {at_once}",
            f"{figure(figures.estimate('step_s', row))} a token",
        )
    )


def with_titles(svg: str, group: str, titles: Sequence[str]) -> str:
    """The SVG with a title in each marker of a group; as it is where they are not as many."""
    start = svg.find(f'id="{group}"')
    if start < 0:
        return svg
    closed = re.compile(r"</g>\s*</g>").search(svg, start)
    end = closed.start() if closed else len(svg)
    marks = list(re.finditer(r"<use [^>]*/>", svg[start:end]))
    if len(marks) != len(titles):
        return svg
    inside = iter(titles)

    def titled(mark: re.Match[str]) -> str:
        words = escape(printable(next(inside)))
        return f"{mark[0][:-2]}><title>{words}</title></use>"

    return svg[:start] + re.sub(r"<use [^>]*/>", titled, svg[start:end]) + svg[end:]
