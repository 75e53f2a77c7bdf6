"""Pages of prompts that lie on the host, and places on the device for those that come over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.placement import chooses_entries, pages_of, planned_entries
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import SLAB_CELLS, CodedPages, pool_bytes

HOST_SLAB_BYTES = 2**26
"""Pinned memory is taken in pieces of this size: PyTorch rounds one allocation up to a power of
two, which for all pages in one piece would be up to twice what they need."""


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
    return pool_bytes(_largest_layer(planned, prompt_tokens, head_dim))


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
