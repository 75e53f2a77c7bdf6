"""A per-head policy as an engine sees it that decides by layer, or once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from kvtune.policies.exporter import Line, Plan
from kvtune.policies.formats.grouped import Grouped
from kvtune.policies.option import Option


@dataclass(frozen=True)
class Flat:
    """What some heads have in common, in the mean where they differ.

    Args:
        key_formats: names, each once.
        value_formats: names, each once.
        key_bits: mean over heads.
        value_bits: mean over heads.
        key_groups: what integer keys share a scale by, ``channel`` or ``token``, each once.
    """

    key_formats: tuple[str, ...]
    value_formats: tuple[str, ...]
    key_bits: float
    value_bits: float
    key_groups: tuple[str, ...]


def flatten(options: Sequence[Option]) -> Flat:
    """The formats of some heads together."""
    return Flat(
        tuple(dict.fromkeys(option.keys.name for option in options)),
        tuple(dict.fromkeys(option.values.name for option in options)),
        fmean(option.keys.bits for option in options),
        fmean(option.values.bits for option in options),
        tuple(dict.fromkeys(o.keys.keys_by for o in options if isinstance(o.keys, Grouped))),
    )


def grouping_text(*flats: Flat) -> str:
    """The end of a line on keys that a stack groups in its own way; empty for floats."""
    ways = dict.fromkeys(way for flat in flats for way in flat.key_groups)
    return f"; the policy groups keys per {' or '.join(ways)}" if ways else ""


Reach = Literal["all", "window", "sinks", "scored"]


def reach(option: Option, context_tokens: int) -> Reach:
    """What a head's method looks like from outside: everything, a window, sinks and one, scores."""
    if option.budget.resolve(context_tokens) >= context_tokens:
        return "all"
    sinks = getattr(option.method, "sinks", None)
    if option.method.name == "full" or sinks == 0:
        return "window"
    return "scored" if sinks is None else "sinks"


def dropped_methods(plan: Plan) -> dict[str, int]:
    """Methods that evict, with the number of heads that use each below the full context."""
    counts: dict[str, int] = {}
    for option in plan.policy.options():
        if reach(option, plan.context_tokens) != "all":
            counts[option.method.name] = counts.get(option.method.name, 0) + 1
    return counts


def lost_refinements(plan: Plan) -> list[Line]:
    """Lines on what no engine with one format for many heads knows: allocators, exact sinks."""
    lines = []
    if (allocator := plan.policy.allocator.name) != "as_given":
        detail = "dropped; budgets are read as the policy names them"
        lines.append(Line(f"allocator {allocator}", "not expressible", detail))
    exact = max(
        getattr(form, "exact_first", 0)
        for option in plan.policy.options()
        for form in (option.keys, option.values)
    )
    if exact:
        detail = f"the first {exact} tokens are stored like the rest"
        lines.append(Line("exact_first", "not expressible", detail))
    return lines
