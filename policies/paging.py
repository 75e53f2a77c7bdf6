"""What the paged runtime reads at once, and what its allocator hands out; without torch.

The runtime reserves by these rules before a prompt is read, and the simulator predicts by them: a
head's bytes are the pages that it is given, not what of them is filled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from kvtune.policies.encoded_pages import EncodedPages, encoded_bytes
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import (
    PageLayout,
    PageTables,
    exact_among,
    has_pages,
    layout_of,
)
from kvtune.policies.parts import PartPlan, entries_of
from kvtune.policies.policy import Policy
from kvtune.policies.reader import BlockReader, Reader
from kvtune.policies.room import Room, goes_on_evicting
from kvtune.policies.slot_bytes import stores_apart

PREFILL_CHUNK_TOKENS = 2048
"""Tokens of prompts that the runtime works on at once, where it need not see a prompt whole."""

SLAB_CELLS = 576
"""36 pages of bf16, 32 of int4: a size of which every format wastes less than 3 %."""

HOST_SLAB_BYTES = 2**26
"""Pinned memory is taken in pieces of this size: PyTorch rounds one allocation up to a power of
two, which for all pages in one piece would be up to twice what they need."""

PLACE_BYTES = 8
"""Bytes on the device for each block of 64 tokens on the host: where it lies."""

TABLE_BYTES = 192
"""Bytes of a head's tables on the device: two tiles of 64, places of pages, lengths, scales."""

EXACT = (Bf16(), Bf16())

Pages = Counter[PageLayout | PageTables | EncodedPages]
"""How many of each; tables of a head's pages count as one."""

CodedPages = Counter[PageLayout]
"""The same of those that may lie on the host, which have no tables."""


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


def reads_pages(reader: Reader | None) -> bool:
    """Whether a reader chooses whole pages of the runtime, which kernels then read."""
    return isinstance(reader, BlockReader) and reader.block == PAGE


def chooses_entries(option: Option) -> bool:
    """Whether a reader chooses among what the option stores in another way than by pages.

    All of that then lies beside the pages, where single entries can be gathered.
    """
    reader = option.method.reader(PAGE)
    return reader is not None and not reads_pages(reader)


def ranks_without_newest(option: Option) -> bool:
    """Whether a reader of pages would not see the newest tokens, which its format leaves exact.

    They lie in other pages, which every step reads, whatever the reader's budget is.
    """
    return reads_pages(option.method.reader(PAGE)) and option.keys.newest(1, "keys") > 0


def evicts_coded(option: Option, head_dim: int) -> bool:
    """Whether tokens in the option's format can leave its pages one by one, and it evicts them."""
    coded = goes_on_evicting(option) and pages_of(option, head_dim).stores_apart
    return coded and all(stores_apart(form) for form in (option.keys, option.values))


def pages_of(option: Option, head_dim: int) -> PageLayout:
    """The pages of an option's coded tokens; those of 16 bits where its formats have none."""
    return layout_of(option, head_dim) if has_pages(option, head_dim) else PageLayout(head_dim)


def planned_entries(
    option: Option, budget: int, prompt_tokens: int, head_dim: int
) -> tuple[int, int]:
    """Entries of one head's prompt in 16-bit pages, and in pages of the option's format."""
    plans = option.method.plan(budget, prompt_tokens)
    coded = [plan.entries for plan in plans if is_coded(plan, option, head_dim)]
    exact = [plan.entries for plan in plans if is_exact(plan, option) and len(plans) > 1]
    if coded == exact:  # the option itself stores 16 bits
        return 0, sum(coded)
    front = sum(exact_among(option.keys, coded[0])) if coded else 0
    return sum(exact) + front, sum(coded) - front


def is_exact(plan: PartPlan, option: Option) -> bool:
    """Whether a part is of tokens in 16 bits, with nothing beside them, that pages hold."""
    exact = (plan.formats or (option.keys, option.values)) == EXACT
    return plan.is_plain and exact and not chooses_entries(option)


def is_coded(plan: PartPlan, option: Option, head_dim: int) -> bool:
    """Whether a part is of tokens in the option's own formats, for which there are pages."""
    own = plan.formats in (None, (option.keys, option.values))
    if not own or not has_pages(option, head_dim) or chooses_entries(option):
        return False
    if layout_of(option, head_dim).has_tables:  # which say what a channel's steps are
        return replace(plan, balanced=False).is_plain
    return plan.is_plain


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


def is_encoded(plan: PartPlan, option: Option, head_dim: int) -> bool:
    """Whether a part's packed buffers lie in pages as they are, and are read back at every step."""
    exact = (plan.formats or (option.keys, option.values)) == EXACT
    beside = exact or option.on_host or chooses_entries(option) or plan.shared_by > 1
    return not beside and not is_coded(plan, option, head_dim)


def may_lie_on_host(option: Option, head_dim: int) -> bool:
    """Whether pages of the option's formats hold all that it stores of a prompt.

    What an index on the host searches lies there without pages.
    """
    if chooses_entries(option):
        return searched_on_host(option)
    plans = option.method.plan(PAGE, 2 * PAGE)
    whole = all(is_coded(plan, option, head_dim) for plan in plans)
    return whole and not layout_of(option, head_dim).has_tables


def searched_on_host(option: Option) -> bool:
    """Whether the host, where the option lies there, also chooses what comes over."""
    return replace(option, tier="host").compared_on_host(PAGE, 2 * PAGE) > 0


def host_pages(option: Option, budget: int, prompt_tokens: int, head_dim: int) -> CodedPages:
    """Pages of one head's prompt that lie on the host, of whole blocks of 64 tokens."""
    if not option.on_host:
        return CodedPages()
    coded = planned_entries(option, budget, prompt_tokens, head_dim)[1]
    layout = pages_of(option, head_dim)
    return CodedPages({layout: layout.block_pages * -(-coded // PAGE)})


@lru_cache(maxsize=4096)
def arriving_pages(option: Option, budget: int, prompt_tokens: int, head_dim: int) -> CodedPages:
    """Pages of one head that come over from the host at a step, and lie on the device then."""
    pages, reader = (
        host_pages(option, budget, prompt_tokens, head_dim),
        option.method.reader(budget),
    )
    if reader is None:
        return pages
    most = -(-reader.entries_read(prompt_tokens) // PAGE)
    return CodedPages({layout: min(n, layout.block_pages * most) for layout, n in pages.items()})


def landing_bytes(layers: Iterable[Sequence[Option]], prompt_tokens: int, head_dim: int) -> int:
    """Bytes of the pool where one sequence's pages from the host land, by its heads' options."""
    planned = ([(o, o.budget.resolve(prompt_tokens)) for o in options] for options in layers)
    return _pool_bytes(_largest_layer(planned, prompt_tokens, head_dim))


def landing_pages(
    policy: Policy, prompt_tokens: int, head_dim: int, sequences: int = 1
) -> CodedPages:
    """Pages on the device for what comes over at a step: layers take turns, the largest counts."""
    if not policy.uses_host:
        return CodedPages()
    rows = zip(policy.heads, policy.budgets(prompt_tokens).tolist(), strict=True)
    planned = (zip(options, budgets, strict=True) for options, budgets in rows)
    pages = _largest_layer(planned, prompt_tokens, head_dim)
    return CodedPages({layout: sequences * count for layout, count in pages.items()})


def _largest_layer(
    layers: Iterable[Iterable[tuple[Option, int]]], prompt_tokens: int, head_dim: int
) -> CodedPages:
    """Pages that come over for the heads of a layer, given with their budgets; the most of each."""
    most = CodedPages()
    for heads in layers:
        layer = CodedPages()
        for option, budget in heads:
            layer += arriving_pages(option, budget, prompt_tokens, head_dim)
        most |= layer
    return most


def _pool_bytes(pages: CodedPages) -> int:
    """Bytes of a pool's slabs that pages take their shares of."""
    return round(sum(count * share_of_slab(layout) for layout, count in pages.items()))


def landing_cells(policy: Policy, prompt_tokens: int, head_dim: int, sequences: int) -> int:
    """Cells of a pool for where blocks from the host land; a slab holds blocks of one size."""
    by_size = Counter[int]()
    for layout, count in landing_pages(policy, prompt_tokens, head_dim, sequences).items():
        by_size[layout.block_cells] += count // layout.block_pages
    return SLAB_CELLS * sum(-(-count // (SLAB_CELLS // size)) for size, count in by_size.items())


def host_sequence_bytes(policy: Policy, prompt_tokens: int, head_dim: int) -> int:
    """Host memory of one sequence's prompt: whole pages in whole slabs, and indices with what they
    search."""
    pages, searched, budgets = CodedPages(), 0, policy.budgets(prompt_tokens).flat
    for option, budget in zip(policy.options(), budgets, strict=True):
        if option.on_host and chooses_entries(option):
            searched += option.ledger(int(budget), prompt_tokens, head_dim).host_bytes
        pages += host_pages(option, int(budget), prompt_tokens, head_dim)
    by_size = Counter[int]()
    for layout, count in pages.items():
        by_size[layout.block_bytes] += count // layout.block_pages
    slabs = sum(-(-count // (HOST_SLAB_BYTES // size)) for size, count in by_size.items())
    return slabs * HOST_SLAB_BYTES + searched


def pool_cells(pages: Pages) -> int:
    """Cells of a pool that holds so many pages; a slab holds pages of one size."""
    by_size = Counter[int]()
    for layout, count in pages.items():
        by_size[layout.page_cells] += count
    slabs = sum(-(-count // (SLAB_CELLS // size)) for size, count in by_size.items())
    return SLAB_CELLS * slabs


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


def sequence_bytes(policy: Policy, prompt_tokens: int, head_dim: int, growth: Growth) -> int:
    """Device memory of one sequence's cache by its end, with where pages from the host land."""
    landing = _pool_bytes(landing_pages(policy, prompt_tokens, head_dim))
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


def growing_bytes(tokens: int, head_dim: int) -> float:
    """Bytes of the 16-bit pages that so many tokens of one head take."""
    layout = PageLayout(head_dim)
    return layout.pages_for(tokens) * share_of_slab(layout)


def share_of_slab(layout: PageLayout | PageTables | EncodedPages) -> float:
    """Bytes of a pool for each page of this size."""
    return SLAB_CELLS * layout.cell_bytes / (SLAB_CELLS // layout.page_cells)


def lies_beside(option: Option, budget: int, prompt_tokens: int, head_dim: int) -> bool:
    """Whether some of a head's prompt lies on the device in no page, a reader's index aside."""
    plans = option.method.plan(budget, prompt_tokens)
    paged = all(
        _is_paged(plan, plans, option, head_dim) or is_encoded(plan, option, head_dim)
        for plan in plans
    )
    return not option.on_host and not paged


def _is_paged(plan: PartPlan, plans: Sequence[PartPlan], option: Option, head_dim: int) -> bool:
    """Whether pages that kernels read hold a part, one of ``plans``."""
    return is_coded(plan, option, head_dim) or (len(plans) > 1 and is_exact(plan, option))


def _beside_bytes(option: Option, budget: int, prompt_tokens: int, head_dim: int) -> int:
    """Bytes of parts that pages cannot hold, and of a reader's index."""
    plans = option.method.plan(budget, prompt_tokens)
    total = 0
    for plan in () if option.on_host else plans:
        if not _is_paged(plan, plans, option, head_dim):
            formats = plan.formats or (option.keys, option.values)
            total += sum(plan.stored_bytes(formats, head_dim))
        if is_encoded(plan, option, head_dim):
            total -= encoded_bytes(plan, option, head_dim)  # which are in pages
    reader = option.method.reader(budget)
    if reader is None or option.compared_on_host(budget, prompt_tokens):
        return total
    return total + reader.index_bytes(entries_of(plans), head_dim)
