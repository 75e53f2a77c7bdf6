"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from kvtune.cli.output import table
from kvtune.cli.wording import BRACKETS
from kvtune.common.estimate import Estimate, exact
from kvtune.common.units import GB, GIB, format_tokens
from kvtune.common.words import count, figure, percent
from kvtune.simulator.cost import per_second

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.simulator.cost import Cost
    from kvtune.simulator.memory.plan import MemoryPlan


def budget_table(budget: MemoryPlan, quality: str) -> RenderableType:
    """Where the memory goes: GiB with intervals, and what is left for the cache in tokens too."""
    parts = (
        (f"{budget.gpu.name} shows", exact(budget.gpu.visible_bytes, "B"), ""),
        ("limit", exact(budget.limit_bytes, "B"), _as_typed(budget.limit_bytes)),
        (f"- {budget.weight_format} weights", budget.weights, budget.reason),
        ("- overhead", budget.overhead, "context, graphs, allocator"),
        ("- prefill", budget.prefill, "activations, one layer uncompressed"),
        ("= left for the cache", budget.cache, bf16_tokens(budget.cache_tokens)),
    )
    return table(
        f"Memory of {budget.shape.name} on {budget.gpu.name}",
        ("", "GiB", "interval", "tier", ""),
        [(name, *_gib(part), words) for name, part, words in parts],
        left=(0, 2, 3, 4),
        caption=f"quality: {quality}; {BRACKETS}",
    )


def _as_typed(limit: int) -> str:
    """A limit that is round in GB, where the table's GiB are not what was typed."""
    return "" if limit % GB or not limit % GIB else f"{limit // GB} GB of 10^9 bytes; GiB have 2^30"


def bf16_tokens(number: int | None) -> str:
    """How many tokens of a bf16 cache, in words."""
    return "any number of tokens" if number is None else f"{count(number)} tokens of bf16"


def _gib(part: Estimate) -> tuple[str, str, str]:
    interval = "" if part.tier == "exact" else f"[{part.low / GIB:.2f}, {part.high / GIB:.2f}]"
    return f"{part.value / GIB:.2f}", interval, part.tier


def cost_table(
    budget: MemoryPlan,
    costs: Mapping[str, Cost],
    quality: str,
    priced: Sequence[str] = (),
    first_tokens: bool = False,
) -> RenderableType:
    """What each policy takes for a budget's context and batch: a column each, a figure a row.

    Args:
        budget: says context and batch.
        costs: by the policy's name.
        quality: whose loss is known.
        priced: what a million tokens cost with each, where a price is known.
        first_tokens: whether a row says when a prompt has its first token.
    """
    firsts = [("first token", [figure(c.first_token) for c in costs.values()])]
    rows = [
        ("one prompt", [figure(exact(c.prompt_bytes, "B")) for c in costs.values()]),
        *_statistics(costs.values()),
        *_on_host(costs.values()),
        ("share of bf16", [percent(c.share) for c in costs.values()]),
        ("fit at once", [figure(c.most_at_once) for c in costs.values()]),
        ("peak memory", [figure(c.memory) for c in costs.values()]),
        ("prefill of one", [figure(c.prefill) for c in costs.values()]),
        ("compressing it", [figure(c.compression) for c in costs.values()]),
        *(firsts if first_tokens else []),
        ("time per token", [figure(c.latency) for c in costs.values()]),
        ("tokens/s per user", [figure(per_second(c.latency, 1)) for c in costs.values()]),
        ("tokens/s", [figure(c.tokens_per_second) for c in costs.values()]),
        *([("cost per million", list(priced))] if priced else []),
    ]
    return table(
        f"Costs at {format_tokens(budget.context_tokens)}, {count(budget.batch)} at once",
        ("", *costs),
        [(name, *cells) for name, cells in rows],
        caption=f"quality: {quality}",
    )


def _on_host(costs: Collection[Cost]) -> list[tuple[str, list[str]]]:
    """What one prompt takes of the host's memory, and what a step brings over, where any does."""
    if not any(cost.host_bytes for cost in costs):
        return []
    return [
        ("on the host", [figure(exact(c.host_bytes, "B")) for c in costs]),
        ("moved a step", [figure(exact(c.moved_bytes, "B")) for c in costs]),
    ]


def _statistics(costs: Collection[Cost]) -> list[tuple[str, list[str]]]:
    """What is remembered of a sequence's entries while evicting, where anything is."""
    if not any(cost.statistics_bytes for cost in costs):
        return []
    return [("statistics", [figure(exact(c.statistics_bytes, "B")) for c in costs])]
