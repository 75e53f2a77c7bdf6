"""What the paged runtime reserves for a sequence, and what of it the simulator predicts; no torch.

The runtime reserves by these rules before a prompt is read, and the simulator predicts by them: a
head's bytes are the pages that it is given, not what of them is filled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from kvtune.policies.encoded_pages import EncodedPages, encoded_bytes
from kvtune.policies.host_pages import host_pages, landing_pages
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.parts import entries_of
from kvtune.policies.placement import (
    evicts_coded,
    is_encoded,
    is_paged,
    pages_of,
    planned_entries,
)
from kvtune.policies.policy import Policy
from kvtune.policies.room import Room
from kvtune.policies.slabs import Pages, pool_bytes, share_of_slab

PREFILL_CHUNK_TOKENS = 2048
"""Tokens of prompts that the runtime works on at once, where it need not see a prompt whole."""

PLACE_BYTES = 8
"""Bytes on the device for each block of 64 tokens on the host: where it lies."""

TABLE_BYTES = 192
"""Bytes of a head's tables on the device: two tiles of 64, places of pages, lengths, scales."""


@dataclass(frozen=True)
class Growth:
    """What follows a prompt.

    Args:
        new_tokens: that are stored of each sequence at most.
        evicts: whether methods that can go on evicting do.
        residual: newest tokens that stay in 16 bits where older ones settle; None if all stay.
    """

    new_tokens: int
    evicts: bool = False
    residual: int | None = None

    @property
    def window(self) -> int:
        """Newest tokens in 16 bits, at most, of a head that evicts from fewer: a residual window
        and another that fills, or the newest token on its way."""
        return max(2 * (self.residual or 0), 1)


def head_pages(
    option: Option,
    budget: int,
    prompt_tokens: int,
    head_dim: int,
    growth: Growth,
    window: int | None = None,
) -> Pages:
    """Pages that one head is given on the device by its end.

    Args:
        option: the head's.
        budget: tokens of the prompt that it may keep.
        prompt_tokens: P.
        head_dim: D.
        growth: what follows the prompt.
        window: of a sliding layer that will be exceeded.
    """
    layout, growing = pages_of(option, head_dim), PageLayout(head_dim)
    exact, coded = planned_entries(option, budget, prompt_tokens, head_dim)
    room = Room.of(option, budget, prompt_tokens) if growth.evicts else None
    grown, settled = exact + growth.new_tokens, 0
    if window:
        coded, grown = 0, min(budget + growth.new_tokens, window)
    elif room and evicts_coded(option, head_dim):
        coded, grown = room.most, growth.window
    elif room:
        coded, grown = 0, room.most
    if growth.residual is not None and layout.settles and not room:
        newest = option.keys.newest(exact, "keys")  # of the prompt, which settle too
        grown = min(grown, exact + growth.residual + 2 * PAGE)
        settled = 1 + (newest + growth.new_tokens) // PAGE
    if option.on_host:
        coded = 0
    pages = Pages({layout: settled + layout.pages_for(coded)})
    if layout.has_tables and coded:
        pages[layout.tables] = 1
    pages[EncodedPages(head_dim)] = _encoded_pages(option, budget, prompt_tokens, head_dim)
    return pages + Pages({growing: growing.pages_for(grown)})


def splits(policy: Policy) -> bool:
    """Whether budgets may still be split anew, by what is seen of a prompt."""
    return policy.allocator.name != "as_given"


def spare_pages(option: Option, pages: Pages, head_dim: int) -> Pages:
    """What a head may need besides where budgets are split anew: shares end in pages of their own.

    Args:
        option: the head's.
        pages: that it needs at the budget it was planned with, of ``head_pages``.
        head_dim: D.
    """
    spare, encoded = Pages({pages_of(option, head_dim): 1}), EncodedPages(head_dim)
    if pages[encoded]:
        spare[encoded] = 1
    return spare


def _encoded_pages(option: Option, budget: int, prompt_tokens: int, head_dim: int) -> int:
    """Pages of one head's parts that no kernel reads, at most where bytes depend on the data."""
    layout, plans = EncodedPages(head_dim), option.method.plan(budget, prompt_tokens)
    return sum(
        layout.pages_for(encoded_bytes(plan, option, head_dim))
        for plan in plans
        if is_encoded(plan, option, head_dim)
    )


@lru_cache(maxsize=4096)
def head_bytes(
    option: Option,
    budget: int,
    prompt_tokens: int,
    head_dim: int,
    growth: Growth,
    split: bool = False,
) -> int:
    """Device memory of one head: its pages' shares of slabs, tables, and what lies beside pages.

    Args:
        option: the head's.
        budget: tokens of the prompt that it may keep.
        prompt_tokens: P.
        head_dim: D.
        growth: what follows the prompt.
        split: whether the budget may still be another.
    """
    pages = head_pages(option, budget, prompt_tokens, head_dim, growth)
    if split:
        pages += spare_pages(option, pages, head_dim)
    held = sum(count * share_of_slab(layout) for layout, count in pages.items())
    there = host_pages(option, budget, prompt_tokens, head_dim)
    places = PLACE_BYTES * sum(count // layout.block_pages for layout, count in there.items())
    beside = _beside_bytes(option, budget, prompt_tokens, head_dim)
    return round(held) + places + beside + TABLE_BYTES


def _beside_bytes(option: Option, budget: int, prompt_tokens: int, head_dim: int) -> int:
    """Bytes of parts that pages cannot hold, and of a reader's index."""
    plans = option.method.plan(budget, prompt_tokens)
    total = 0
    for plan in () if option.on_host else plans:
        if not is_paged(plan, plans, option, head_dim):
            formats = plan.formats or (option.keys, option.values)
            total += sum(plan.stored_bytes(formats, head_dim))
        if is_encoded(plan, option, head_dim):
            total -= encoded_bytes(plan, option, head_dim)  # which are in pages
    reader = option.method.reader(budget)
    if reader is None or option.compared_on_host(budget, prompt_tokens):
        return total
    return total + reader.index_bytes(entries_of(plans), head_dim)


def sequence_bytes(policy: Policy, prompt_tokens: int, head_dim: int, growth: Growth) -> int:
    """Device memory of one sequence's cache by its end, with where pages from the host land."""
    landing = pool_bytes(landing_pages(policy, prompt_tokens, head_dim))
    return landing + held_bytes(policy, prompt_tokens, head_dim, growth)


def held_bytes(policy: Policy, prompt_tokens: int, head_dim: int, growth: Growth) -> int:
    """The part of it that its heads' pages and tables take, and what lies beside pages.

    An allocator may need more pages a head, wherever it splits budgets by what it sees.
    """
    planned = zip(policy.options(), policy.budgets(prompt_tokens).flat, strict=True)
    heads, split = Counter((option, int(budget)) for option, budget in planned), splits(policy)
    return sum(
        count * head_bytes(option, budget, prompt_tokens, head_dim, growth, split)
        for (option, budget), count in heads.items()
    )


def waiting_bytes(full_bytes: int, layers: int) -> int:
    """Bytes held beside all else while a policy waits for the end of one prompt.

    They are the prompt's uncompressed cache, ``full_bytes``, but for one of its layers, which is
    part of every prefill.
    """
    return full_bytes * (layers - 1) // layers
