"""Bytes of a prompt on a serving stack, and how many sequences its configuration allows."""

from __future__ import annotations

from kvtune.common.errors import KvtuneError
from kvtune.common.units import format_bytes
from kvtune.policies.export.lines import Line
from kvtune.policies.export.plan import Plan


def bytes_line(plan: Plan, stack_bytes: int) -> Line:
    """The prompt's bytes under the plan beside those of the export, at the full context."""
    planned = plan.policy.footprint(plan.context_tokens, plan.facts.head_dim)
    detail = (
        f"planned {format_bytes(planned)} for a prompt of {plan.context_tokens} tokens, "
        f"this export {format_bytes(stack_bytes)}"
    )
    close = abs(stack_bytes - planned) <= 0.01 * planned
    return Line("cache bytes", "kept" if close else "approximated", detail)


def sequences_that_fit(plan: Plan, stack: str, sequence_bytes: int) -> tuple[int, Line]:
    """The number of sequences that the configuration allows at once, never more than fit.

    Where the policy file does not say how much memory is left for the cache, what its own sequences
    take is known to be there, and no more; nor that beside longer prompts than its own, which take
    more to work on.

    Args:
        plan: says what was asked for and how much room there is.
        stack: its name, for errors.
        sequence_bytes: that the stack holds of one sequence of the full length.

    Raises:
        KvtuneError: not one fits, or not as many as were asked for.
    """
    each = f"one takes {format_bytes(sequence_bytes)} there"
    if plan.room_bytes is None:
        return _within_own_bytes(plan, sequence_bytes, each)
    fit = plan.room_bytes // sequence_bytes
    there = f"{each}, and {format_bytes(plan.room_bytes)} are left for caches"
    if fit == 0:
        hint = "a shorter --context fits, or more memory."
        raise KvtuneError(f"not one sequence fits under {stack}: {there}", hint=hint)
    if plan.batch and plan.batch > fit:
        hint = f"--batch {fit} is the most."
        raise KvtuneError(f"{plan.batch} sequences do not fit under {stack}: {there}", hint=hint)
    count = plan.batch or min(plan.planned_batch or fit, fit)
    if count >= (plan.planned_batch or 1):
        return count, Line("sequences", "kept", f"{count} at once: {there}")
    detail = f"{count} at once instead of {plan.planned_batch}: {there}"
    return count, Line("sequences", "approximated", detail)


def _within_own_bytes(plan: Plan, sequence_bytes: int, each: str) -> tuple[int, Line]:
    """As many as take no more than the plan's own sequences, or as many as the user says."""
    sure, planned = _bytes_of_own_sequences(plan) // sequence_bytes, plan.planned_batch or 1
    count = plan.batch or max(min(planned, sure), 1)
    if count > sure:
        detail = f"{count} at once: {each}; check that they fit, {_unknown(plan)}"
        return count, Line("sequences", "approximated", detail)
    if count < planned:
        detail = f"{count} at once instead of {planned}, which take no more memory: {each}"
        return count, Line("sequences", "approximated", detail)
    return count, Line("sequences", "kept", f"{count} at once: {each}")


def _unknown(plan: Plan) -> str:
    """Why nobody knows how much memory there is."""
    if not plan.is_elsewhere:
        return "the memory for caches is not known"
    return (
        f"the memory for caches is known beside prompts of {plan.planned_context} tokens alone, "
        "which the plan was made for"
    )


def _bytes_of_own_sequences(plan: Plan) -> int:
    """Bytes of pages that the plan's own sequences are given, generated tokens in 16 bits.

    None are sure beside longer prompts.
    """
    from kvtune.policies.paging import Growth, sequence_bytes  # NumPy, which a mistake needs not

    serving, facts = plan.document.serving, plan.facts
    if serving is None or serving.batch is None or serving.context_tokens is None:
        return 0
    if plan.context_tokens > serving.context_tokens:
        return 0
    growth = Growth(serving.generated_tokens or 0)
    each = sequence_bytes(plan.policy, serving.context_tokens, facts.head_dim, growth)
    return serving.batch * each
