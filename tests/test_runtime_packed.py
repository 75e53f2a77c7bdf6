"""Packed buffers read where they lie: the kernel attends to them as float64 does."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.policies.encoded_pages import is_read_in_place, packed_pieces
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fitted import Fitted
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int2, Int3, Int4, Int8
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.kvquant import KvQuant
from kvtune.policies.formats.qaq import Qaq
from kvtune.policies.formats.rotated import RotatedInt2, RotatedInt3
from kvtune.policies.formats.staircase import Staircase
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.parts import HeadPart, PartPlan
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.beside import Beside, HeldPart, LaidPart
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.tests.tiers import first
from kvtune.traces.geometry import read_geometry

pytest.importorskip("triton", reason="Triton is not installed; the kernels have no interpreter")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("Triton's interpreter is switched off", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread", "quick_interpreter")
HEAD_DIM, GROUP, SCALE = 64, 3, 0.2

FORMATS: dict[str, tuple[Format, Format]] = {
    name: (form, form)
    for name, form in {
        "kivi": Kivi(residual=20, exact_first=4),
        "kitty": Kitty(),
        "kvquant": KvQuant(outliers=0.05),
        "qaq": Qaq(tau=0.3, most=6),
        "gear": Gear(outliers=0.05),
        "kivi4, in groups of 32": Kivi(backbone="int4"),
        "kitty, a third boosted": Kitty(boosted=0.34, group=32, exact_first=1),
        "gear on four bits, no outliers": Gear(backbone="int4", rank=7, outliers=0.0),
        "staircase": Staircase(sixteen=10, eight=32, four=32),
        "three bits in groups of 32": Int3(group=32),
        "eight bits in a long group": Int8(group=256, exact_first=2),
        "two bits, rotated, by channel": RotatedInt2(keys_by="channel"),
        "three bits, rotated, in a long group": RotatedInt3(group=128, exact_first=4),
    }.items()
} | {"bf16 beside two bits by token": (Bf16(), Int2(group=32, keys_by="token"))}


def numbers(seed: int, *shape: int) -> Tensor:
    """Normal numbers with an outlying channel and an outlying token."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    drawn[..., 3] *= 4
    drawn[..., 5, :] *= 2
    return drawn.bfloat16()


def laid(pool: Pool, row: int, part: HeadPart, option: Option, seed: int) -> LaidPart:
    keys, values = (numbers(seed + n, len(part.tokens), HEAD_DIM) for n in (0, 1))
    return LaidPart.of(HeldPart.of(row, part, (keys, values), option), pool, HEAD_DIM)


def attended(beside: Beside, q: Tensor) -> Tensor:
    """With a part of no weight before it."""
    return beside.merged(q, torch.zeros_like(q), q.new_full(q.shape[:2], -1e30), SCALE)


def decoded(part: HeldPart) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, D]`` of one head's part."""
    (keys_as, values_as), (keys, values) = part.formats, part.buffers
    return part.restored(
        keys_as.decode(keys, HEAD_DIM, "keys"), values_as.decode(values, HEAD_DIM, "values")
    )


def expected(parts: list[LaidPart], pool: Pool, q: Tensor) -> Tensor:
    """Every row's parts decoded, then attended to in float64."""
    outputs = []
    for row, query in enumerate(q.double()):
        read = [each.fetched(pool) for each in parts if each.part.row == row]
        keys, values = (torch.cat([decoded(part)[n].double() for part in read]) for n in (0, 1))
        weights = [
            torch.zeros(len(decoded(part)[0])) if part.log_weight is None
            else part.log_weight
            for part in read
        ]  # fmt: skip
        logits = query @ keys.T * SCALE + torch.cat(weights).double()
        outputs.append(logits.softmax(-1) @ values)
    return torch.stack(outputs)


def check(parts: list[LaidPart], pool: Pool, rows: int) -> None:
    q = torch.randn(rows, GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    beside = Beside([], parts, HEAD_DIM, pool, in_place=True)
    assert beside.is_dense
    assert not Beside([], parts, HEAD_DIM, pool).is_dense
    found, exact = attended(beside, q), expected(parts, pool, q)
    assert float((found - exact).abs().max()) < 2e-3 * float(exact.abs().max())


@pytest.mark.parametrize("name", first(list(FORMATS), 5))
def test_a_kernel_attends_to_packed_buffers_as_to_what_they_decode_to(name: str) -> None:
    pool, forms = Pool(64, 4 * HEAD_DIM, "cpu"), FORMATS[name]
    option = Option(Full(), ALL, *forms)
    parts = [
        laid(pool, row, HeadPart(torch.arange(tokens)), option, 10 * row)
        for row, tokens in enumerate((170, 33))
    ]
    pool.take(1, 4)
    check(parts, pool, 2)


def test_weighted_balanced_and_turned_parts_of_one_row_are_joined() -> None:
    pool, option = Pool(64, 4 * HEAD_DIM, "cpu"), Option(Full(), ALL, Kivi(), Kivi())
    matrix = torch.linalg.qr(numbers(3, HEAD_DIM, HEAD_DIM).float()).Q
    four = (Int4(), Int4())
    parts = [
        HeadPart(torch.arange(70), log_weight=torch.linspace(-1, 2, 70), formats=four),
        HeadPart(torch.arange(50), balance=torch.linspace(0.2, 3, HEAD_DIM), formats=four),
        HeadPart(torch.arange(40), turns=(matrix, matrix.T.contiguous()), formats=four),
        HeadPart(
            torch.arange(30), balance=torch.linspace(0.2, 3, HEAD_DIM),
            turns=(matrix, matrix.T.contiguous()), formats=four,
        ),
    ]  # fmt: skip
    rows = (0, 0, 1, 1)
    held = [
        laid(pool, row, part, option, n)
        for n, (row, part) in enumerate(zip(rows, parts, strict=True))
    ]
    check(held, pool, 2)


def tables(beside: Beside) -> list[Tensor]:
    """All that a captured graph reads of packed rows, besides the pool."""
    return [
        each
        for rows in beside._packed
        for each in (rows.rows, rows._pages, rows._sections, *(x for _, x in rows._launches))
    ]


@pytest.mark.parametrize("name", ["kitty", "kvquant", "qaq"])
def test_rows_that_are_freed_are_read_no_more(name: str) -> None:
    """Nor are their pages, which hold others' bytes; a captured graph goes on with its tables."""
    pool, option = Pool(64, 4 * HEAD_DIM, "cpu"), Option(Full(), ALL, *FORMATS[name])
    parts = [laid(pool, row, HeadPart(torch.arange(64)), option, row) for row in (0, 1)]
    beside, q = Beside([], parts, HEAD_DIM, pool, in_place=True), numbers(8, 2, 8, HEAD_DIM).float()
    both, held = attended(beside, q), tables(beside)
    beside.free(range(1))
    for page in parts[0].laid.pages.tolist():
        pool.memory.view(-1, 4 * HEAD_DIM)[page : page + parts[0].laid.layout.page_cells] = 255
    left = attended(beside, q)
    assert torch.equal(left[1], both[1])
    assert not left[0].any()
    assert all(x is y for x, y in zip(held, tables(beside), strict=True))
    nothing = q.new_full(q.shape[:2], -torch.inf)
    assert beside.merged(q, torch.zeros_like(q), nothing, SCALE).isfinite().all()
    assert beside.page_bytes == sum(len(x.laid.pages) for x in parts[1:]) * 16 * HEAD_DIM


@pytest.mark.parametrize("in_place", [True, False])
def test_a_part_without_tokens_weighs_nothing(in_place: bool) -> None:
    pool, option = Pool(64, 4 * HEAD_DIM, "cpu"), Option(Full(), ALL, Kivi(), Kivi())
    some = laid(pool, 0, HeadPart(torch.arange(40)), option, 1)
    keys, values = numbers(2, 2, 9, HEAD_DIM)
    empty = HeldPart.of(1, HeadPart(torch.arange(0)), (keys, values), option)
    parts = [some, LaidPart.of(empty, pool, HEAD_DIM)]
    q = numbers(8, 2, 8, HEAD_DIM).float()
    beside = Beside([], parts, HEAD_DIM, pool, in_place)
    found = attended(beside, q)
    assert torch.equal(found[0], attended(Beside([], [some], HEAD_DIM, pool, in_place), q)[0])
    assert not found[1].any()
    assert beside.is_dense == in_place


def test_a_model_answers_the_same_where_a_kernel_reads_packed_buffers(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    from transformers import LlamaConfig

    shape = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    fields = {**tiny_fields, **shape, "num_hidden_layers": 1}
    network = make_network(LlamaConfig(**fields)).bfloat16()  # which the interpreter cuts off
    kivi = Kivi(residual=9)
    heads = (Option(Full(), ALL, Gear(), Gear()), Option(Full(), ALL, kivi, kivi))
    policy = Policy("packed", (heads,))
    answers = []
    for backend in (PlainBackend(), TritonBackend()):

        def chosen(_: torch.device, found: Backend = backend) -> Backend:
            return found

        cache = PolicyCache(policy, read_geometry(network), 8, backend_of=chosen)
        with torch.no_grad(), load_cache(policy, network):
            network(torch.arange(2, 80)[None], past_key_values=cache)
            for token in range(2):
                answer = network(torch.tensor([[30 + token]]), past_key_values=cache)
        assert cache.can_be_captured == backend.has_kernels
        answers.append(answer.logits)
    torch.testing.assert_close(*answers, atol=0.08, rtol=0.03)
    assert float((answers[0] - answers[1]).float().abs().mean()) < 0.03  # of logits of 1.5


def test_what_no_kernel_reads_is_told() -> None:
    for form in (Fitted(), Int4(group=48), Gear(rank=20), Kivi(group=40)):
        assert packed_pieces((form, form), 200, HEAD_DIM) is None
    assert packed_pieces((Kivi(), Kivi()), 200, 48) is None
    apart = replace(Kitty(), exact_first=3), Kitty()
    assert packed_pieces(apart, 200, HEAD_DIM) is not None  # values share nothing
    assert packed_pieces(apart[::-1], 200, HEAD_DIM) is None
    option: Any = Option(Full(), ALL, Kivi(), Fitted())
    assert not is_read_in_place(PartPlan(100), option, HEAD_DIM)
