"""A per-head policy as an engine sees it that decides by layer, or once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, Union

from kvtune.policies.export.lines import Line
from kvtune.policies.export.plan import Plan
from kvtune.policies.formats.grouped import Grouped
from kvtune.policies.method import Shape
from kvtune.policies.option import Budget, Option


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
        fmean(option.keys.code_bits for option in options),
        fmean(option.values.code_bits for option in options),
        tuple(dict.fromkeys(o.keys.keys_by for o in options if isinstance(o.keys, Grouped))),
    )


def grouping_text(*flats: Flat) -> str:
    """The end of a line on keys that a stack groups in its own way; empty for floats."""
    ways = dict.fromkeys(way for flat in flats for way in flat.key_groups)
    return f"; the policy groups keys per {' or '.join(ways)}" if ways else ""


@dataclass(frozen=True)
class Reach:
    """Which tokens of a prompt a head keeps, as its method declares it.

    Args:
        shape: ``all`` of them, ``none``, or the method's shape.
        sinks: first tokens that stay.
        window: newest tokens that stay; 0 where scores decide.
    """

    shape: Union[Shape, Literal["all", "none"]]  # noqa: UP007 (runtime, 3.10)
    sinks: int = 0
    window: int = 0


def reach(option: Option, context_tokens: int) -> Reach:
    """What an option keeps of a prompt: everything, a window, sinks and one, or what scores say."""
    budget, method = option.budget.resolve(context_tokens), option.method
    if budget >= context_tokens:
        return Reach("all")
    if budget == 0:
        return Reach("none")
    if method.shape == "scored":
        return Reach("scored")
    sinks = min(method.sinks, budget) if method.shape == "sinks+window" else 0  # type: ignore[attr-defined]
    return Reach("sinks+window" if sinks else "window", sinks, budget - sinks)


Heads = tuple[tuple[Option, ...], ...]  # [L][H]


def planned_heads(plan: Plan) -> tuple[Heads, Line]:
    """The options with the budgets that an allocator plans, where it can before the prompt."""
    policy, name = plan.policy, plan.policy.allocator.name
    if name == "as_given":
        return policy.heads, Line("allocator as_given", "kept", "budgets as the policy names them")
    given = type(policy)(policy.name, policy.heads).budgets(plan.context_tokens)
    budgets = policy.budgets(plan.context_tokens)
    if (budgets == given).all():
        detail = "decides when the prompt is known; dropped, budgets as the policy names them"
        return policy.heads, Line(f"allocator {name}", "not expressible", detail)
    rows = tuple(
        tuple(
            replace(option, budget=Budget(tokens=int(tokens)))
            for option, tokens in zip(layer, planned, strict=True)
        )
        for layer, planned in zip(policy.heads, budgets, strict=True)
    )
    detail = f"budgets are those for a prompt of {plan.context_tokens} tokens"
    return rows, Line(f"allocator {name}", "approximated", detail)


def dropped_methods(heads: Heads, context_tokens: int) -> dict[str, int]:
    """Methods that evict, with the number of heads that use each below the full context."""
    counts: dict[str, int] = {}
    for option in (option for layer in heads for option in layer):
        if reach(option, context_tokens).shape != "all":
            counts[option.method.name] = counts.get(option.method.name, 0) + 1
    return counts


def lost_exact_tokens(plan: Plan) -> list[Line]:
    """A line on first tokens in 16 bits, which no engine with one format for many heads knows."""
    exact = max(
        getattr(form, "exact_first", 0)
        for option in plan.policy.options()
        for form in (option.keys, option.values)
    )
    if not exact:
        return []
    detail = f"the first {exact} tokens are stored like the rest"
    return [Line("exact_first", "not expressible", detail)]
