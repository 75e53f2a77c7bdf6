"""Where the runtime puts a head's parts: pages of 16 bits, of the option's format, or neither.

The same rules answer for planned parts, so that memory is reserved before a prompt is read, and for
the parts themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.option import Option
from kvtune.policies.pages import PageLayout, exact_tokens, has_pages, layout_of
from kvtune.policies.parts import HeadPart, PartPlan
from kvtune.policies.policy import Policy

EXACT = (Bf16(), Bf16())

Placed = tuple[Tensor, int, "tuple[Tensor, Tensor] | None", list[HeadPart]]


def pages_of(option: Option, head_dim: int) -> PageLayout:
    """The pages of an option's coded tokens; those of 16 bits where its formats have none."""
    return layout_of(option, head_dim) if has_pages(option, head_dim) else PageLayout(head_dim)


def warn_of_slow_formats(policy: Policy, head_dim: int) -> None:
    """Say which options are read back from their encoded form at every step."""
    options = dict.fromkeys(policy.options())
    slow = [option.label for option in options if not has_pages(option, head_dim)]
    if slow:
        warnings.warn(
            f"{', '.join(slow)}: these formats have no pages; they are held encoded and read back "
            "at every step, which saves memory and takes time",
            stacklevel=3,
        )


def planned_entries(
    option: Option, budget: int, prompt_tokens: int, head_dim: int
) -> tuple[int, int]:
    """Entries of one head's prompt in 16-bit pages, and in pages of the option's format."""
    plans = option.method.plan(budget, prompt_tokens)
    coded = [plan.entries for plan in plans if _is_coded(plan, option, head_dim)]
    exact = [plan.entries for plan in plans if _is_exact(plan, option) and len(plans) > 1]
    if coded == exact:  # the option itself stores 16 bits
        return 0, sum(coded)
    front = min(exact_tokens(option.keys), coded[0]) if coded else 0
    return sum(exact) + front, sum(coded) - front


def place(parts: Sequence[HeadPart], option: Option, head_dim: int) -> Placed:
    """Divide one head's parts.

    Returns:
        tokens for pages, those in 16 bits first; how many of them stay in 16 bits; keys and values
        ``[n, D]`` to store instead of the tokens' own, or None; and the parts that go beside.
    """
    if len(parts) == 1 and _is_coded(parts[0].plan, option, head_dim):
        only = parts[0]
        both = None if only.keys is None or only.values is None else (only.keys, only.values)
        return only.tokens, min(exact_tokens(option.keys), len(only.tokens)), both, []
    own = [part for part in parts if part.keys is None]
    exact = [part for part in own if len(parts) > 1 and _is_exact(part.plan, option)]
    coded = [part for part in own if part not in exact and _is_coded(part.plan, option, head_dim)]
    paged = {id(part) for part in exact + coded}
    tokens = torch.cat([parts[0].tokens[:0], *(part.tokens for part in exact + coded)])
    front = sum(len(part.tokens) for part in exact)
    front += min(exact_tokens(option.keys), len(coded[0].tokens)) if coded else 0
    return tokens, front, None, [part for part in parts if id(part) not in paged]


def _is_exact(plan: PartPlan, option: Option) -> bool:
    """Whether a part is of tokens in 16 bits, with nothing beside them."""
    plain = not (plan.weighted or plan.balanced) and plan.shared_by == 1
    return plain and (plan.formats or (option.keys, option.values)) == EXACT


def _is_coded(plan: PartPlan, option: Option, head_dim: int) -> bool:
    """Whether a part is of tokens in the option's own formats, for which there are pages."""
    plain = not (plan.weighted or plan.balanced) and plan.shared_by == 1
    own = plan.formats in (None, (option.keys, option.values))
    return plain and own and has_pages(option, head_dim)
