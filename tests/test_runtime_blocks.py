"""Formats in blocks: pages hold what the formats themselves decode to, and kernels attend to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies import registry
from kvtune.policies.blocks import Blocks
from kvtune.policies.format import PACKAGE, Role
from kvtune.policies.formats import blocked
from kvtune.policies.formats.blocked import (
    BlockCodes,
    BlockFormat,
    block_forms,
    name_of,
    padded_blocks,
)
from kvtune.policies.formats.fp4 import MxFp4, NvFp4
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.hqq import Hqq4
from kvtune.policies.formats.llama_cpp import Q4, Q8
from kvtune.policies.formats.turboquant import TurboQuant1
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.page_formats import PAGE, has_head_scales
from kvtune.policies.pages import PageLayout, has_pages, layout_of
from kvtune.policies.registry import group_of, registered
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.storing import store_prompts
from kvtune.runtime.kernels.launch import Scratch, decode
from kvtune.runtime.kernels.reference import attend, fp8_scale, read_page, write_page
from kvtune.tests.page_layers import layer
from kvtune.tests.tiers import first

pytestmark = pytest.mark.usefixtures("one_thread", "quick_interpreter")
FORMS = block_forms()
NAMES = [*FORMS]
HEAD_SCALE_BYTES = 4


def pair(keys: Any, values: Any) -> Option:
    return Option(Full(), ALL, keys, values)


def tensors(head_dim: int, tokens: int = PAGE, seed: int = 0) -> Any:
    spread = torch.linspace(0.3, 3, head_dim)  # channels of unlike sizes
    return torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_pages_hold_what_the_format_itself_decodes_to(name: str, head_dim: int) -> None:
    form = FORMS[name]
    if not has_pages(pair(form, form), head_dim):
        assert (name, head_dim) == ("turboquant1", 64)  # eight channels a field: too few
        return
    layout, both = layout_of(pair(form, form), head_dim), tensors(head_dim)
    scales = torch.stack([fp8_scale(x.abs().amax()) for x in both])
    read = read_page(write_page(both[0], both[1], layout, scales), layout, scales)
    for role, held, own in zip(("keys", "values"), read, both, strict=True):
        stored = form.encode(own, role)  # type: ignore[arg-type]
        expected = form.decode(stored, head_dim, role)  # type: ignore[arg-type]
        torch.testing.assert_close(held, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_take_the_bytes_that_the_format_counts(head_dim: int) -> None:
    for form in FORMS.values():
        if has_pages(pair(form, form), head_dim):
            layout = layout_of(pair(form, form), head_dim)
            each = sum(form.bound(PAGE, head_dim, role) for role in ("keys", "values"))
            own = HEAD_SCALE_BYTES * 2 if layout.has_head_scales else 0  # beside the lengths
            assert 0 <= layout.page_bytes - (each - own) < layout.cell_bytes


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("name", NAMES)
def test_buffers_are_those_that_are_counted(name: str, role: Role) -> None:
    for form in (FORMS[name], replace(FORMS[name], exact_first=3)):
        for head_dim in (64, 128):
            stored = form.encode(tensors(head_dim, 21)[0], role)
            assert stored.nbytes == form.bound(21, head_dim, role)


def test_a_number_says_all_that_a_description_does() -> None:
    for form in FORMS.values():
        alike = FORMS[name_of(form.blocks.number)]
        assert alike.blocks == form.blocks
    assert len({form.blocks.number for form in FORMS.values()}) > 15
    layout = layout_of(pair(Q8(rotation="hadamard"), NvFp4()), 128)
    assert PageLayout.of(128, layout.code) == layout


def test_what_pages_do_not_hold_is_refused() -> None:
    assert not has_pages(pair(Hqq4(group=8), Int4()), 64)
    assert not has_pages(pair(MxFp4(), MxFp4()), 80)  # no whole blocks
    assert not has_pages(pair(TurboQuant1(), TurboQuant1()), 64)
    with pytest.raises(KvtuneError, match="hqq4/8"):
        layout_of(pair(Hqq4(group=8), Int4()), 64)


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="kernels have no interpreter")
@pytest.mark.parametrize(
    "case",
    first(
        [(128, NAMES[n : n + 7]) for n in range(0, len(NAMES), 7)]
        + [(64, NAMES[n : n + 7]) for n in range(0, len(NAMES), 7)]
        + [(256, ["nvfp4", "int4_token_head", "turboquant1"])],
        3,
    ),
)
def test_kernels_attend_as_what_was_dequantised(case: tuple[int, list[str]]) -> None:
    """Blocks for keys beside integers for values, the other way round, and both."""
    head_dim, names = case
    pytest.importorskip("triton", reason="Triton is not installed")
    kept = [name for name in names if has_pages(pair(FORMS[name], FORMS[name]), head_dim)]
    runs = [(n, name, name, 70) for n, name in enumerate(kept)]
    runs += [(n, name, "int2", 9) for n, name in enumerate(kept[::3])]
    runs += [(n, "int4", name, 65) for n, name in enumerate(kept[1::3])]
    paged, held = layer(head_dim, runs, seed=1)
    q = torch.randn(len(kept), 3, head_dim, generator=torch.Generator().manual_seed(2))
    q = q.half().float()
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    scratch = Scratch(len(kept), len(paged.tiles), 3, head_dim, "cpu")
    decode(q, paged, scratch, head_dim**-0.5, out, lse)
    for row, parts in enumerate(held):
        keys, values = (torch.cat(x).double() for x in zip(*parts, strict=True))
        exact, exact_lse = attend(q[row].double(), keys, values, head_dim**-0.5)
        assert float((out[row] - exact).abs().max()) < 1e-3, kept[row]
        torch.testing.assert_close(lse[row].double(), exact_lse, atol=1e-3, rtol=1e-3)


def test_a_head_scale_is_that_of_the_tokens_that_are_coded() -> None:
    """Sinks in 16 bits, which are a hundred times larger, do not widen it."""
    form = NvFp4(exact_first=4)
    rows = tensors(64, 100)
    rows[:, :4] *= 100
    stored = PagedLayer(0, [pair(form, form)], 64, 1, Pool(4 * 576, 256, "cpu"), PlainBackend())
    store_prompts(stored, rows[:1].bfloat16(), rows[1:].bfloat16(), [torch.arange(100)])
    held = [float(form.codes(x[4:].bfloat16().float(), "keys")["head"]) for x in rows]
    expected = torch.tensor(held) * 6  # codes of e2m1 end at 6
    torch.testing.assert_close(stored.fp8_scales[0], expected)


@dataclass(frozen=True)
class Symmetric4(BlockFormat):
    """A format as another package may have it: four bits about zero, a scale for 64 channels."""

    name = "symmetric4"
    source = "this test"
    bits = 4

    @property
    def blocks(self) -> Blocks:
        return Blocks("integers", 4, 64, "half")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        blocks = padded_blocks(rows, 64)
        scale = (blocks.abs().amax(-1) / 7).half()
        codes = (blocks / scale.float()[..., None]).round().clamp(-8, 7) + 8
        return BlockCodes(codes.to(torch.uint8).flatten(-2), (scale,))


@dataclass(frozen=True)
class LikeQ4(Q4):
    """Another scale of blocks that lie as those of q4_0."""

    name = "like_q4_0"

    def _scale(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(-1, keepdim=True) / 7


CACHES = (registered, block_forms, blocked._numbered, has_head_scales)


@pytest.fixture
def another_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[Any]], None]]:
    """Lets a class of this file come as another distribution's format."""

    def installed(kind: type[Any]) -> None:
        group = group_of(PACKAGE)
        entry = EntryPoint(kind.name, f"{__name__}:{kind.__name__}", group)
        found = {group: [entry]}
        monkeypatch.setattr(registry, "entry_points", lambda group: found.get(group, []))
        forget()

    def forget() -> None:
        for each in CACHES:
            each.cache_clear()

    yield installed
    monkeypatch.undo()
    forget()


def test_a_format_of_another_package_has_pages_too(
    another_package: Callable[[type[Any]], None],
) -> None:
    """Stored by what stores prompts, and read back: all that it takes is the description."""
    form, option = Symmetric4(), pair(Symmetric4(), Symmetric4())
    assert not has_pages(option, 64)
    another_package(Symmetric4)
    assert has_pages(option, 64)
    rows = tensors(64).bfloat16()
    stored = PagedLayer(0, [option], 64, 1, Pool(4 * 576, 256, "cpu"), PlainBackend())
    store_prompts(stored, rows[:1], rows[1:], [torch.arange(PAGE)])
    layout, cell = stored.layouts[0], int(stored.pages[0][0][0])
    page = stored.pool.memory[cell * layout.cell_bytes :][: layout.page_bytes]
    for role, held, own in zip(
        ("keys", "values"), read_page(page, layout, torch.ones(2)), rows, strict=True
    ):
        expected = form.decode(form.encode(own.float(), role), 64, role)  # type: ignore[arg-type]
        torch.testing.assert_close(held, expected, atol=1e-5, rtol=1e-5)


def test_formats_that_lie_alike_are_refused(
    another_package: Callable[[type[Any]], None],
) -> None:
    another_package(LikeQ4)
    with pytest.raises(KvtuneError, match=r"'like_q4_0' .* lies in pages exactly as 'q4_0'"):
        block_forms()
