"""The room that a search has for caches, by format of the weights and context."""

from __future__ import annotations

from dataclasses import replace

from kvtune.common.errors import DoesNotFitError
from kvtune.common.units import format_bytes, format_tokens
from kvtune.simulator.memory.plan import MemoryPlan, memory_plan
from kvtune.simulator.memory.weights import listed_formats
from kvtune.tuner.request import SearchRequest

Budgets = dict[tuple[str, int], MemoryPlan]
"""By format of the weights, widest first, and context."""


def budgets_of(request: SearchRequest) -> Budgets:
    """Room for caches with each format of the weights that fits at every context.

    Raises:
        DoesNotFitError: none fits; of the narrowest.
    """
    found: Budgets = {}
    for asked in listed_formats(request.weights, request.shape, request.gpu):
        try:
            found |= _with_weights(request, asked)
        except DoesNotFitError as error:
            refused = error
    if not found:
        raise refused
    return found


def formats_of(budgets: Budgets) -> list[str]:
    """The formats that fit, widest first."""
    return list(dict.fromkeys(weights for weights, _ in budgets))


def freed(budgets: Budgets) -> dict[str, int]:
    """Bytes that each format leaves to the caches beyond the widest, whose 0 they are."""
    taken: dict[str, float] = {}
    for (weights, _), budget in budgets.items():
        taken.setdefault(weights, budget.weights.value + budget.overhead.value)
    most = next(iter(taken.values()))
    return {weights: int(most - size) for weights, size in taken.items()}


def rooms(budgets: Budgets) -> dict[int, int]:
    """Bytes for caches and what the runtime works with, by context, with the widest weights."""
    widest = formats_of(budgets)[0]
    return {
        context: budget.beside_working()
        for (weights, context), budget in budgets.items()
        if weights == widest
    }


def notes_on(request: SearchRequest, budgets: Budgets) -> list[str]:
    """Which of the formats that were asked for are left out, as their weights leave no room."""
    asked = listed_formats(request.weights, request.shape, request.gpu)
    left_out = [each for each in asked if each != "auto" and each not in formats_of(budgets)]
    if not left_out:
        return []
    limit = format_bytes(request.memory_bytes)
    words = " and ".join(left_out)
    return [f"weights: {words} leave no room for a cache in {limit}{_longest(request, ' at')}."]


def _longest(request: SearchRequest, before: str) -> str:
    """Weights are chosen for the longest context: at the plan's others may fit."""
    if len(request.contexts) == 1:
        return ""
    return f"{before} {format_tokens(request.contexts[-1])}, the longest context"


def _with_weights(request: SearchRequest, asked: str) -> Budgets:
    """One format's; ``auto`` is what serves the longest context."""
    found: dict[int, MemoryPlan] = {}
    weights = asked
    for context in reversed(request.contexts):
        found[context] = memory_plan(
            request.shape,
            request.gpu,
            request.memory_bytes,
            context_tokens=context,
            generated_tokens=request.generated_tokens,
            batch=1,  # how many fit, compressed, is the study's to find
            weights=weights,
        )
        weights = found[context].weight_format
    reason = found[request.contexts[-1]].reason
    reason += _longest(request, "; chosen at") if asked == "auto" else ""
    return {(weights, c): replace(budget, reason=reason) for c, budget in found.items()}
