"""Single tokens between pages: what is read back afterwards, by the pages' own reader."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.token_bytes import Copies, token_bytes
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.kernels.reference import read_page, write_page
from kvtune.tests.tiers import first

PAIRS = [
    ("int3-token", "int4"), ("rotated_int4-token", "rotated_int3"), ("bf16", "int2"),
    ("int8-token", "bf16"), ("int2-token", "int8"),
]  # fmt: skip
ONE = torch.ones(2)
SOURCES, TARGETS = torch.tensor([0, 5, 33, -1, 40, 63]), torch.tensor([32, 31, 0, 7, 1, 33])


def pages(layout: PageLayout) -> Tensor:
    """Two pages of random tokens, one behind the other."""
    generator = torch.Generator().manual_seed(layout.code)
    tensors = torch.randn(2, 2, 64, layout.head_dim, generator=generator)
    return torch.cat([write_page(keys, values, layout, ONE) for keys, values in tensors])


def copied(layout: PageLayout, copy: Callable[[Copies], None]) -> Tensor:
    """The second page after tokens of the first were copied into it."""
    memory = pages(layout)
    targets = TARGETS + 64 * layout.page_cells
    copy(Copies(memory, memory, SOURCES, targets, layout))
    return memory[layout.page_bytes :]


@pytest.mark.parametrize("head_dim", first([64, 8, 128]))
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_copied_tokens_are_read_back_where_they_went(pair: tuple[str, str], head_dim: int) -> None:
    layout = PageLayout(head_dim, *pair)
    theirs, before = (
        read_page(page, layout, ONE) for page in pages(layout).split(layout.page_bytes)
    )
    after = read_page(copied(layout, PlainBackend().copy_tokens), layout, ONE)
    real = SOURCES >= 0
    for source, old, new in zip(theirs, before, after, strict=True):
        expected = old.clone()
        expected[TARGETS[real]] = source[SOURCES[real]]
        assert torch.equal(new, expected)


@pytest.mark.parametrize("pair", first(PAIRS), ids="/".join)
@pytest.mark.usefixtures("one_thread", "quick_interpreter")
def test_a_kernel_copies_the_same_bytes(pair: tuple[str, str]) -> None:
    pytest.importorskip("triton")
    layout = PageLayout(64, *pair)
    ours, plain = (copied(layout, b.copy_tokens) for b in (TritonBackend(), PlainBackend()))
    assert torch.equal(ours, plain)


def test_no_byte_belongs_to_two_tokens_but_those_of_a_plane() -> None:
    for pair in PAIRS:
        layout = PageLayout(128, *pair)
        found = token_bytes(layout, torch.device("cpu"))
        assert found.whole.unique().numel() == found.whole.numel()
        assert found.plane.unique().numel() * 2 == found.plane.numel()
        assert not set(found.whole.flatten().tolist()) & set(found.plane.flatten().tolist())
        assert int(found.whole.max()) < layout.page_bytes


def test_pages_whose_tokens_share_scales_are_told_apart() -> None:
    assert PageLayout(64, "int4-token", "int4").stores_apart
    for pair in (("int4", "int4"), ("fp8", "int4"), ("int4-token", "fp8"), ("bf16", "bf16")):
        assert not PageLayout(64, *pair).stores_apart
