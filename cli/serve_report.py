"""How the answer of ``kvtune serve-sim`` is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.simulator.serving.report import Goals, Served
    from kvtune.simulator.serving.requests import Requests
    from kvtune.simulator.serving.server import Server

_NOT_IN_OWN_TIMES = (
    "left out: network, tokeniser and the scheduler's own time, outputs that end early, evicting "
    "while decoding; memory is taken at its middle value (docs/serve-sim.md)"
)


def left_out(serving: Server) -> str:
    """What the times do not have in them."""
    if serving.stack == "kvtune":
        return _NOT_IN_OWN_TIMES
    return (
        "left out: outputs that end early, speculative decoding, other options of the engine; "
        "network, tokeniser and scheduler as whole runs of the stack had them on average; memory "
        "is taken at its middle value (docs/serve-sim.md)"
    )


def served_table(serving: Server, asked: Requests, found: list[Served]) -> RenderableType:
    """The full cache and the policy side by side."""
    from kvtune.cli.output import table
    from kvtune.common.units import format_bytes
    from kvtune.common.words import count, figure

    words = {
        "ttft_p50": "first token, p50", "ttft_p90": "first token, p90",
        "ttft_p99": "first token, p99", "tpot_p50": "time per token, p50",
        "tpot_p90": "time per token, p90", "tpot_p99": "time per token, p99",
        "queue_time_mean": "wait in queue, mean", "tokens_per_second": "tokens/s",
        "requests_per_second": "requests/s", "goodput": "goodput, requests/s",
        "share_within_slo": "share within SLO", "mean_running": "running, mean",
        "mean_waiting": "waiting, mean", "peak_memory": "cache, peak",
        "mean_memory": "cache, mean",
    }  # fmt: skip
    rows = [
        (
            word,
            *(figure(each.figures[name] if each.finished else None, tier=False) for each in found),
        )
        for name, word in words.items()
        if name in found[0].figures
    ]
    rows += [
        *_tiers(found),
        ("finished", *(f"{count(each.finished)} of {count(each.requests)}" for each in found)),
        *_refused(found),
        ("preemptions", *(_preemptions(each) for each in found)),
        ("prompt tokens shared", *(count(each.shared_tokens) for each in found)),
    ]
    return table(
        f"{serving.shape.name} ({serving.weights}) on {_cards(serving)}{_by(serving)} serves "
        f"{asked.source}",
        ("", *(each.name for each in found)),
        rows,
        caption=f"cache memory {figure(serving.cache)}{_each(serving)} in "
        f"{count(found[0].blocks)} blocks of {format_bytes(found[0].block_bytes)}; "
        "intervals: all times at their low or high ends",
    )


def _cards(serving: Server) -> str:
    return serving.gpu.name if serving.gpus == 1 else f"{serving.gpus} x {serving.gpu.name}"


def _by(serving: Server) -> str:
    return "" if serving.stack == "kvtune" else f" by {serving.stack}'s kernels"


def _each(serving: Server) -> str:
    return "" if serving.gpus == 1 else " of each card"


def _tiers(found: list[Served]) -> list[tuple[str, ...]]:
    """The tier of the times of each part of a step; figures are no surer than the worst tier."""
    parts = dict.fromkeys(part for each in found for part in each.tiers)
    return [(f"times of {part}", *(each.tiers.get(part, "-") for each in found)) for part in parts]


def _refused(found: list[Served]) -> list[tuple[str, ...]]:
    from kvtune.common.words import count

    reasons = dict.fromkeys(reason for each in found for reason in each.refused)
    return [
        (f"refused: {reason}", *(count(each.refused.get(reason, 0)) for each in found))
        for reason in reasons
    ]


def _preemptions(each: Served) -> str:
    from kvtune.common.words import count

    moved = f", {count(each.swaps)} to the host" if each.host_blocks else ""
    return count(each.preemptions) + moved


def answer(
    serving: Server,
    asked: Requests,
    found: list[Served],
    goals: Goals,
    seed: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The answer for ``--json``."""
    limits = serving.limits
    return {
        "model": serving.shape.name,
        "gpu": serving.gpu.slug,
        "gpus": serving.gpus,
        "weight_format": serving.weights,
        "cache": serving.cache,
        "requests": {"source": asked.source, "count": len(asked), "seed": seed},
        "engine": {
            "max_sequences": limits.sequences,
            "max_batched_tokens": limits.step_tokens,
            "order": limits.order,
            "stack": serving.stack,
            "reading": limits.reading,
            "block_tokens": serving.block_tokens,
            "host_bytes": serving.host_bytes,
        },
        "slo": goals,
        "left_out": left_out(serving),
        "notes": notes,
        "policies": found,
    }
