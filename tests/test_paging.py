"""Pages are what plans are priced by, so that little of what the allocator hands out is empty."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kvtune.benchmarks.page_bytes import in_pages, lines
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.option import Budget, Option
from kvtune.policies.pages import PageLayout
from kvtune.policies.paging import TABLE_BYTES, Growth, head_bytes, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import SLAB_CELLS, Pages, pool_cells
from kvtune.tuner.source_models import packaged_tables

FORMATS = (Bf16(), Fp8(), Int4(), Int4(exact_first=4), Int2())


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.label)
def test_a_heads_pages_are_never_less_than_its_payload(form: Bf16) -> None:
    option = Option(H2O(), Budget(), form, form)
    for kept in (1, 4, 63, 64, 65, 128, 1000):
        payload = option.footprint(kept, 2000, 64)
        pages = head_bytes(option, kept, 2000, 64, Growth(0)) - TABLE_BYTES
        empty = 2 * PageLayout(64).page_bytes * 1.04  # less than a page of each kind
        assert payload <= pages + TABLE_BYTES, "scales of fp8 are in the tables"
        assert pages < payload + empty


def test_generated_tokens_fill_the_page_that_exact_tokens_have_begun() -> None:
    option = Option(H2O(), Budget(), Int4(exact_first=4), Int4(exact_first=4))
    alone, shared, more = (head_bytes(option, 68, 2000, 64, Growth(n)) for n in (0, 12, 13))
    assert alone == shared
    assert more - shared == PageLayout(64).page_bytes


def test_a_pool_holds_all_pages_whatever_their_sizes() -> None:
    pages = Pages({PageLayout(64): 37, PageLayout(64, "int4", "int4"): 7})
    slabs = pool_cells(pages) / SLAB_CELLS
    assert slabs == 2 + 1, "36 pages of bf16 a slab; a slab holds pages of one size"
    assert pool_cells(Pages()) == 0


def test_a_sequence_is_its_heads() -> None:
    mixed = (Option(H2O(), Budget(share=0.1), Int4(), Int4()), Option())
    policy = Policy("mixed", (mixed, mixed[::-1]))
    each = Counter(mixed * 2)
    expected = sum(
        n * head_bytes(o, o.budget.resolve(500), 500, 64, Growth(9)) for o, n in each.items()
    )
    assert sequence_bytes(policy, 500, 64, Growth(9)) == expected
    pages = 32 + 1  # of 16 tokens: 500 of the prompt, 9 generated
    assert head_bytes(Option(), 500, 500, 64, Growth(9)) == pages * 16 * 4 * 64 + TABLE_BYTES


@pytest.mark.full
def test_packaged_plans_that_are_priced_by_pages_fill_them() -> None:
    tables, _ = packaged_tables()
    found = {(line.share, line.price): line for line in lines(tables)}
    for share in (0.03, 0.06, 0.12, 0.25):
        by_pages, by_formats = found[share, "pages"], found[share, "formats"]
        assert by_pages.pages <= share
        assert by_pages.ratio <= 1.08
        assert by_pages.ratio < by_formats.ratio
    assert (in_pages(tables) >= np.array(tables.footprints(tables.prompt_tokens, 64))).all()
