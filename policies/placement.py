"""Where an option's tokens lie: in pages of its formats or of 16 bits, beside them, on the host.

Parts that kernels read are *coded* (in the option's own formats) or *exact* (in 16 bits). Others
are *encoded*: their packed buffers lie in pages as they are. What a reader chooses entry by entry
lies beside all pages. Without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout, exact_among, has_pages, layout_of
from kvtune.policies.parts import PartPlan
from kvtune.policies.reader import BlockReader, Reader
from kvtune.policies.room import goes_on_evicting
from kvtune.policies.slot_bytes import stores_apart

EXACT = (Bf16(), Bf16())


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


def is_encoded(plan: PartPlan, option: Option, head_dim: int) -> bool:
    """Whether a part's packed buffers lie in pages as they are, to be read in place or back."""
    exact = (plan.formats or (option.keys, option.values)) == EXACT
    beside = exact or option.on_host or chooses_entries(option) or plan.shared_by > 1
    return not beside and not is_coded(plan, option, head_dim)


def is_paged(plan: PartPlan, plans: Sequence[PartPlan], option: Option, head_dim: int) -> bool:
    """Whether pages that kernels read hold a part, one of ``plans``."""
    return is_coded(plan, option, head_dim) or (len(plans) > 1 and is_exact(plan, option))


def lies_beside(option: Option, budget: int, prompt_tokens: int, head_dim: int) -> bool:
    """Whether some of a head's prompt lies on the device in no page, a reader's index aside."""
    plans = option.method.plan(budget, prompt_tokens)
    paged = all(
        is_paged(plan, plans, option, head_dim) or is_encoded(plan, option, head_dim)
        for plan in plans
    )
    return not option.on_host and not paged


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
