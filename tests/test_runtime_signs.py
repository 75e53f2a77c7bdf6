"""Rows of signs in pages: plain torch against what the format decodes to, the kernel against it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; the kernels have no interpreter")

from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.page_formats import PAGE, SIGNS
from kvtune.policies.pages import PageLayout, has_pages, layout_of
from kvtune.policies.paging import Growth, head_pages
from kvtune.policies.slabs import pool_cells
from kvtune.runtime.cache import fitted_pages
from kvtune.runtime.cache.backend import AttentionSeen
from kvtune.runtime.cache.leaving import free
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.storing import store_prompts
from kvtune.runtime.kernels.launch import Scratch, decode
from kvtune.runtime.kernels.reference import attend
from kvtune.tests.tiers import first

pytestmark = pytest.mark.usefixtures("one_thread", "quick_interpreter")
TURNED: Literal["hadamard"] = "hadamard"
CASES: list[tuple[int, tuple[Allocated, Allocated], bool]] = [
    (64, (Allocated(mean_bits=2.25), Allocated(directions=TURNED)), True),
    (64, (Allocated(0, 1.5), Allocated(0, 3.25)), False),
    (128, (Allocated(4, 3.0), Allocated(4, 2.125, TURNED)), True),
    (256, (Allocated(0, 2.0), Allocated(0, 2.0, TURNED)), False),
]


def filled(
    head_dim: int, formats: tuple[Allocated, Allocated], weighted: bool, tokens: list[int]
) -> tuple[PagedLayer, list[tuple[Tensor, Tensor]]]:
    """A layer that keeps so many tokens of each head, and what the format makes of them."""
    generator = torch.Generator().manual_seed(head_dim)
    spread = torch.rand(head_dim, generator=generator) * 3
    own = torch.randn(2, len(tokens), max(tokens), head_dim, generator=generator)
    keys, values = (own * spread + spread.flip(0)).bfloat16()
    weights = torch.rand(len(tokens), head_dim, generator=generator) + 0.1 if weighted else None
    option = Option(Full(), ALL, *formats)
    wanted = sum((head_pages(option, n, n, head_dim, Growth(1)) for n in tokens), start=_none())
    pool = Pool(pool_cells(wanted), 4 * head_dim, "cpu")
    layer = PagedLayer(0, [option] * len(tokens), head_dim, 1, pool, PlainBackend())
    kept = [torch.arange(n) for n in tokens]
    store_prompts(layer, keys, values, kept, weights=weights)
    layer.seal(1)
    expected = []
    for head, count in enumerate(tokens):
        scale = torch.ones(head_dim) if weights is None else weights[head]
        mine = keys[head, :count].float(), values[head, :count].float()
        read = (
            formats[0].decode(formats[0].encode(mine[0] * scale, "keys"), head_dim, "keys") / scale,
            formats[1].decode(formats[1].encode(mine[1], "values"), head_dim, "values"),
        )
        sinks = min(formats[0].exact_first, count)
        pair = [torch.cat([a[:sinks], b[sinks:]]) for a, b in zip(mine, read, strict=True)]
        expected.append((pair[0], pair[1]))
    return layer, expected


def _none() -> Any:
    return head_pages(Option(), 0, 0, 64, Growth(0))


def by_hand(held: list[tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of each row in float64."""
    found = [
        attend(row.double(), keys.double(), values.double(), q.shape[-1] ** -0.5)
        for row, (keys, values) in zip(q, held, strict=True)
    ]
    return torch.stack([x for x, _ in found]), torch.stack([x for _, x in found])


@pytest.mark.parametrize("case", first(CASES))
@pytest.mark.parametrize("group", first([3, 1, 9]))
def test_signs_attend_as_what_they_decode_to(
    case: tuple[int, tuple[Allocated, Allocated], bool], group: int
) -> None:
    head_dim, formats, weighted = case
    layer, expected = filled(head_dim, formats, weighted, [90, 7, 200])
    q = torch.randn(3, group, head_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact, exact_lse = by_hand(expected, q)
    scratch, scale = Scratch(3, layer.slots, group, head_dim, "cpu"), head_dim**-0.5
    seen, lse = AttentionSeen(torch.empty(3, group)), torch.empty(3, group)
    plain = layer.backend.attend(q.float(), layer.paged, scratch, scale, seen)
    largest = float(exact.abs().amax())
    assert float((plain - exact).abs().amax()) < 1e-3 * largest  # tables are rounded to 16 bits
    ours = decode(q, layer.paged, scratch, scale, torch.empty(q.shape), lse)
    assert float((ours - exact).abs().amax()) < 1e-3 * largest
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-3, rtol=1e-3)
    assert not scratch.arrived.any()


def test_pages_and_tables_are_those_that_a_plan_counts_and_are_given_back() -> None:
    formats = Allocated(mean_bits=2.25), Allocated(directions=TURNED)
    layer, _ = filled(64, formats, True, [90, 200, 4])
    option, pool = Option(Full(), ALL, *formats), layer.pool
    assert isinstance(pool, Pool)
    planned = sum((head_pages(option, n, n, 64, Growth(0)) for n in (90, 200, 4)), start=_none())
    layout = layout_of(option, 64)
    assert planned[layout] == 2 + 4
    assert planned[layout.tables] == 2, "the last head's four tokens are exact"
    assert pool.used_bytes == sum(n * each.page_cells for each, n in planned.items()) * 4 * 64
    free(layer, 0)
    assert pool.used_bytes == 0
    pool.check_integrity()


@pytest.mark.parametrize("name", ["codes", "scales", "tables"])
def test_a_byte_that_is_changed_is_noticed(name: str) -> None:
    """The comparison above can fail: one bit of one key moves the output, and so do tables."""
    layer, _ = filled(64, (Allocated(0), Allocated(0)), False, [20])
    layout, pool = layer.layouts[0], layer.pool.memory
    q = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(2))
    scratch = Scratch(1, layer.slots, 2, 64, "cpu")
    before = layer.backend.attend(q, layer.paged, scratch, 0.125)
    page = int(layer.pages[0][0][0]) * layout.cell_bytes
    at = {"codes": page, "scales": page + layout.key_scales}.get(
        name, int(layer.tables[0]) * layout.cell_bytes + 1
    )
    pool[at] ^= 64
    assert not torch.allclose(before, layer.backend.attend(q, layer.paged, scratch, 0.125))


def test_heads_are_coded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    formats, q = (Allocated(), Allocated(directions=TURNED)), torch.ones(3, 2, 64)
    found = []
    for most in (2**20, 1):
        monkeypatch.setattr(fitted_pages, "_CODED_AT_ONCE", most)
        layer, _ = filled(64, formats, True, [90, 7, 200])
        scratch = Scratch(3, layer.slots, 2, 64, "cpu")
        found.append(layer.backend.attend(q, layer.paged, scratch, 0.125))
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_which_rows_of_signs_have_pages() -> None:
    def has(keys: Allocated, values: Allocated, head_dim: int = 64) -> bool:
        return has_pages(Option(Full(), ALL, keys, values), head_dim)

    assert has(Allocated(mean_bits=2.25), Allocated())
    assert not has(Allocated(mean_bits=2.3), Allocated())
    assert not has(Allocated(directions=TURNED), Allocated())
    assert not has(Allocated(), Allocated(exact_first=0))
    assert not has(Allocated(mean_bits=2.125), Allocated(), 20)
    assert not has_pages(Option(Full(), ALL, Allocated(), Option().values), 64)
    codes = {PageLayout(64, name, name).code for name in SIGNS}
    assert {PageLayout.of(64, code).code for code in codes} == codes
    assert len(codes) == len(SIGNS)


def test_tokens_that_a_method_weights_lie_in_pages_too() -> None:
    own = Allocated(mean_bits=2.25), Allocated(directions=TURNED)
    option = Option(WeightedKeys("snapkv"), Budget(tokens=200), *own)
    plain = Option(SnapKV(), Budget(tokens=200), *own)
    growth = Growth(PAGE)
    assert head_pages(option, 200, 900, 64, growth) == head_pages(plain, 200, 900, 64, growth)
    assert np.all([head_pages(option, 4, 900, 64, growth)[layout_of(option, 64).tables] == 0])
