"""The front of a search as ``kvtune search`` prints it, and what each format of weights leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtune.cli.output import table
from kvtune.common.estimate import BAND
from kvtune.common.units import format_bytes, format_tokens
from kvtune.common.words import count, figure, percent
from kvtune.simulator.memory.weights import check_format, weight_bytes
from kvtune.tuner.result import FrontPoint, SearchResult

if TYPE_CHECKING:
    from rich.console import RenderableType

_ROWS = 16  # more do not fit a screen; the step from one point to the next is small by then


def front_table(result: SearchResult, caption: str) -> RenderableType:
    """The Pareto front with the plan's weights; ``caption`` says whose quality it is."""
    tier = result.latency.tier
    banded, chosen = any(point.band for point in result.front), _chosen(result)
    shown = [point for point in result.front if point.weights == chosen.weights]
    weights = f", {chosen.weights} weights" if len(formats_found(result)) > 1 else ""
    columns = (
        "",
        *(["context"] if _chose_context(result) else []),
        "at once",
        *(["all heads"] if banded else []),
        *([f"KL, {BAND}"] if banded else ["KL, selection", "KL, cross-fitted"]),
        "of bf16",
        f"time per token, {tier}",
        *([] if banded else [f"tokens/s, {tier}"]),
    )
    return table(
        f"Pareto front, prompts of {_prompts(result)}{weights}, KL in nats",
        columns,
        [_point(point, _chose_context(result)) for point in _thinned(shown)],
        left=(0,),
        caption=f"{caption}, predicted on selection samples; * is the plan"
        + (", whose held-out loss stands above" if banded else "")
        + ("" if banded else "\ncross-fitted: on samples that the choice did not see")
        + ("; result.json holds every point" if len(result.front) > _ROWS else ""),
    )


def formats_found(result: SearchResult) -> list[str]:
    """Formats of the weights that plans were found for, those that take most bytes first."""
    size = {point.weights: _weight_bytes(result, point) for point in result.front}
    return sorted(size, key=lambda name: (-size[name], name))


def _weight_bytes(result: SearchResult, point: FrontPoint) -> float:
    return weight_bytes(result.request.shape, check_format(point.weights)).value


def _loss(point: FrontPoint) -> str:
    """The band of a stand-in, else the loss without the luck of the choice, where it is known."""
    known = point.band or point.unseen
    return f"{point.kl:.3g}" if known is None else figure(known, tier=False)


def _chosen(result: SearchResult) -> FrontPoint:
    return next(point for point in result.front if point.chosen)


def _best_with(result: SearchResult, weights: str) -> FrontPoint:
    """The plan with these weights that the search's rule prefers; the chosen one has been run."""
    points = [point for point in result.front if point.weights == weights]
    within = [point for point in points if point.believed <= result.request.largest_kl]
    if within:
        return max(within, key=lambda p: (p.chosen, p.context_tokens * p.sequences))
    return min(points, key=lambda p: (not p.chosen, p.believed))


def weights_table(result: SearchResult, caption: str) -> RenderableType:
    """What each format of the weights would serve, whose own loss nothing here counts."""
    best = [_best_with(result, name) for name in formats_found(result)]
    rows = [
        (
            "*" if point.chosen else "",
            point.weights,
            format_bytes(_weight_bytes(result, point)),
            f"{point.sequences} of {format_tokens(point.context_tokens)}",
            _loss(point),
            figure(point.time_per_token, tier=False),
            figure(point.tokens_per_second, tier=False),
        )
        for point in best
    ]
    loss = f"KL of the cache, {BAND if best[0].band else 'table'}"
    return table(
        "Weights: what each format leaves for prompts",
        ("", "format", "weights", "at once", loss, "time per token", "tokens/s"),
        rows,
        left=(0, 1),
        caption=f"{caption}; of each the most within --max-kl "
        f"{result.request.largest_kl:g}, else the least loss; * is the plan\n"
        "what narrower weights themselves lose is not known here and not counted",
    )


def _chose_context(result: SearchResult) -> bool:
    return len(result.request.contexts) > 1


def _prompts(result: SearchResult) -> str:
    contexts = result.request.contexts
    whole = format_tokens(contexts[-1])
    return f"{count(contexts[0])} to {whole}" if _chose_context(result) else whole


def _thinned(front: Sequence[FrontPoint]) -> list[FrontPoint]:
    """The ends, the plan, and points evenly between them."""
    if len(front) <= _ROWS:
        return list(front)
    evenly = {round(i * (len(front) - 1) / (_ROWS - 1)) for i in range(_ROWS)}
    return [point for i, point in enumerate(front) if i in evenly or point.chosen]


def _point(point: FrontPoint, context: bool) -> tuple[str, ...]:
    return (
        "*" if point.chosen else "",
        *([count(point.context_tokens)] if context else []),
        count(point.sequences),
        *([str(point.parameters["uniform"])] if point.band else []),
        *(
            [figure(point.band, tier=False)]
            if point.band
            else [f"{point.kl:.3g}", figure(point.unseen, tier=False)]
        ),
        percent(point.share),
        figure(point.time_per_token, tier=False),
        *([] if point.band else [figure(point.tokens_per_second, tier=False)]),
    )
