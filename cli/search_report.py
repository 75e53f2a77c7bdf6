"""What ``kvtune search`` prints: budget, front, plan beside baselines, files and next steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtune.cli.inputs import POLICY_FILE
from kvtune.cli.output import table
from kvtune.cli.tables import budget_table
from kvtune.cli.timed import times_table
from kvtune.common.estimate import BAND
from kvtune.common.units import MIB, format_bytes, format_tokens
from kvtune.common.words import accuracy, count, figure, percent
from kvtune.simulator.memory import memory_budget
from kvtune.traces.models import KNOWN
from kvtune.tuner.request import FrontPoint, Quality, Rival, SearchRequest, SearchResult

if TYPE_CHECKING:
    from rich.console import RenderableType

STAND_IN = KNOWN[0]


def first_words(request: SearchRequest) -> RenderableType:
    """The memory budget, which is known before the long work.

    Raises:
        KvtuneError: the model does not fit, or the limit is beyond the card.
    """
    budget = memory_budget(
        request.shape,
        request.gpu,
        request.memory_bytes,
        context_tokens=request.contexts[-1],
        batch=1,
        weights=request.weights,
    )
    return budget_table(budget, _expected_quality(request))


def _expected_quality(request: SearchRequest) -> str:
    """Whose quality it will be; the search itself has the last word."""
    own = request.model in KNOWN or "/" in request.model or request.model.endswith(".gguf")
    return "own trace, to come" if own and not request.stand_in else f"stand-in ({STAND_IN})"


def tables(result: SearchResult) -> list[RenderableType]:
    """Everything after the search, in the order it is read."""
    return [
        *("", _front(result)),
        *("", _rivals(result)),
        *("", _plan(result)),
        *(["", times_table(result.times)] if result.times else []),
        *([f"times: {result.untimed}"] if result.untimed else []),
        *(["", *(f"note: {note}" for note in result.notes)] if result.notes else []),
        *("", _files(result)),
    ]


def quality_words(quality: Quality) -> str:
    """``stand-in (smollm2-135m)`` or ``own trace``."""
    return f"stand-in ({quality.stand_in})" if quality.source == "stand-in" else quality.source


def _caption(result: SearchResult) -> str:
    return f"quality: {quality_words(result.quality)}"


def _front(result: SearchResult) -> RenderableType:
    tier = result.latency.tier
    banded = any(point.band for point in result.front)
    columns = (
        "",
        *(["context"] if _chose_context(result) else []),
        "at once",
        *(["all heads"] if banded else []),
        f"KL, {BAND if banded else 'table'}",
        "of bf16",
        f"time per token, {tier}",
        *([] if banded else [f"tokens/s, {tier}"]),
    )
    return table(
        f"Pareto front, prompts of {_prompts(result)}, KL in nats",
        columns,
        [_point(point, _chose_context(result)) for point in _thinned(result.front)],
        left=(0,),
        caption=f"{_caption(result)}, predicted on selection samples; * is the plan"
        + ("; result.json holds every point" if len(result.front) > _ROWS else ""),
    )


def _chose_context(result: SearchResult) -> bool:
    return len(result.request.contexts) > 1


def _prompts(result: SearchResult) -> str:
    contexts = result.request.contexts
    whole = format_tokens(contexts[-1])
    return f"{contexts[0]} to {whole}" if _chose_context(result) else whole


_ROWS = 16  # more do not fit a screen; the step from one point to the next is small by then


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
        figure(point.band, tier=False) if point.band else f"{point.kl:.3g}",
        percent(point.share),
        figure(point.time_per_token, tier=False),
        *([] if point.band else [figure(point.tokens_per_second, tier=False)]),
    )


def _rivals(result: SearchResult) -> RenderableType:
    live = any(rival.live for rival in result.rivals)
    retrieval = any(rival.retrieval_accuracy for rival in result.rivals)
    tiers = sorted({rival.predicted.tier for rival in result.rivals})
    columns = ["policy", "MiB", f"predicted KL ({', '.join(tiers)})"]
    columns += ["live KL"] * live + ["perplexity"] * live + ["retrieval"] * retrieval
    full = result.full_cache_accuracy
    intervals = "with 95 % intervals" if BAND not in tiers else "as bands"
    captions = [
        f"{_caption(result)}, {result.quality.samples} held-out samples",
        f"KL in nats/token {intervals}, MiB of one prompt",
        *([f"retrieval of the full cache: {accuracy(full)}"] if full else []),
    ]
    return table(
        "The plan beside others at equal bytes",
        columns,
        [_rival(rival, live, retrieval) for rival in result.rivals],
        caption="\n".join(captions),
    )


def _rival(rival: Rival, live: bool, retrieval: bool) -> list[str]:
    cells = [rival.name, f"{rival.prompt_bytes / MIB:.2f}", figure(rival.predicted, tier=False)]
    if live:
        change = rival.perplexity_change
        cells.append(figure(rival.live, tier=False))
        cells.append("-" if change is None else f"{100 * change.value:+.2g} %")
    if retrieval:
        cells.append(accuracy(rival.retrieval_accuracy))
    return cells


def _plan(result: SearchResult) -> RenderableType:
    rows = [
        ("loss", f"{figure(result.quality.kl)}, nats/token"),
        ("prompt", f"{format_bytes(result.prompt_bytes)}, {percent(result.share)} of bf16"),
        ("prompts at once", _at_once(result)),
        ("peak memory", figure(result.memory)),
        ("time per token", figure(result.latency)),
        ("prefill of a prompt", figure(result.prefill)),
        ("compressing it", figure(result.compression)),
    ]
    if result.counters:
        fired = ", ".join(f"{count(n)} {what}" for what, n in result.counters.items())
        rows.append(("fired live", fired.replace("_", " ")))
    return table("The plan", ("", ""), rows, left=(0, 1), caption=_caption(result))


def _at_once(result: SearchResult) -> str:
    tokens = format_tokens(result.context_tokens)
    return f"{result.sequences} of {tokens}; uncompressed {result.full_cache_sequences}"


def _files(result: SearchResult) -> str:
    folder = result.request.run_dir
    policy = folder / POLICY_FILE
    lines = [
        f"policy: {policy}   (edit it freely; every mistake is told with its line)",
        f"result: {folder / 'result.json'}",
        "",
        "next: " + _next(result, str(policy)),
    ]
    return "\n".join(lines)


def _next(result: SearchResult, policy: str) -> str:
    """What helps most now: real weights where a stand-in stood, else the serving stack."""
    if result.quality.source == "stand-in":
        return (
            f"kvtune search --model PATH/TO/{result.request.shape.name} for quality of the model "
            f"itself,\n      or kvtune export {policy} --to vllm --out DIR --allow-stand-in"
        )
    return f"kvtune export {policy} --to transformers --out DIR"
