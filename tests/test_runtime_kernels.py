"""The Triton kernels in Triton's interpreter, against float64; skipped where there is no Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; the kernels have no interpreter")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("Triton's interpreter is switched off", allow_module_level=True)

from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.page_formats import (
    ALL_KEY_CODES,
    AS_VALUES,
    BF16_PAGE,
    CODES,
    KEY_CODES,
    PAGE,
    VALUE_CODES,
)
from kvtune.policies.pages import PageLayout
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.cache.backend import AttentionSeen, Backend, Growing, Moves, Writing
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.reserving import reserve
from kvtune.runtime.cache.segments import GROWN, SETTLED
from kvtune.runtime.cache.settling import settle
from kvtune.runtime.cache.sliding import Ring, places_of
from kvtune.runtime.cache.storing import store_prompts
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.cache.watching import attend_seeing, columns_of, weights_at
from kvtune.runtime.fuse import fused
from kvtune.runtime.kernels.columns import column_sums
from kvtune.runtime.kernels.launch import Paged, Scratch, decode
from kvtune.runtime.kernels.reference import attend, read_page, write_page
from kvtune.runtime.kernels.tiles import TABLE_AHEAD
from kvtune.tests.page_layers import layer
from kvtune.tests.tiers import first
from kvtune.traces.geometry import read_geometry

pytestmark = pytest.mark.usefixtures("one_thread", "quick_interpreter")
INTERPRETED = [name for name in KEY_CODES if name != "fp8"]  # the interpreter rounds e4m3 wrongly
TURNED_KEYS = [name for name in ALL_KEY_CODES if name not in KEY_CODES]
TURNED_VALUES = [name for name in VALUE_CODES if name not in CODES]
TOKEN_KEYS = [name for name in KEY_CODES if name.endswith(AS_VALUES)]


@pytest.mark.parametrize("shape", first([(64, 3, 0), (128, 4, 1), (256, 2, 2)]))
def test_ragged_heads_of_mixed_formats_attend_as_dequantised(shape: tuple[int, int, int]) -> None:
    head_dim, group, seed = shape
    rng = np.random.default_rng(seed)
    runs = [
        (row, str(rng.choice(list(CODES))), str(rng.choice(list(CODES))), int(rng.integers(0, 110)))
        for row in (0, 0, 1, 1, 2)
    ]
    runs += [
        (row % 3, keys, str(rng.choice(list(CODES))), int(rng.integers(1, 80)))
        for row, keys in enumerate(TOKEN_KEYS)
    ]
    runs += [
        (row, keys, str(rng.choice(TURNED_VALUES)), int(rng.integers(1, 80)))
        for row, keys in enumerate(rng.choice(TURNED_KEYS, 3))
    ]
    runs += [(row, "bf16", "bf16", int(rng.integers(1, 70))) for row in range(3)]
    paged, held = layer(head_dim, runs, seed)
    q = torch.randn(3, group, head_dim).bfloat16()
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    scratch = Scratch(3, len(paged.tiles), group, head_dim, "cpu")
    logits = torch.zeros(group, PAGE * len(paged.table))
    for export in (None, logits):
        decode(q, paged, scratch, head_dim**-0.5, out, lse, export)
        for row, parts in enumerate(held):
            keys, values = (torch.cat(x).double() for x in zip(*parts, strict=True))
            exact, exact_lse = attend(q[row].double(), keys, values, head_dim**-0.5)
            assert float((out[row] - exact).abs().max()) < 4e-3  # bf16 weights of bf16 values
            torch.testing.assert_close(lse[row].double(), exact_lse, atol=1e-3, rtol=1e-3)
    assert not scratch.arrived.any()
    first = runs[0][3]
    weights = (
        q[0].double() @ torch.cat([k for k, _ in held[0]]).double().T * head_dim**-0.5
    ).softmax(-1)
    ours = (logits[:, :first] - lse[0][:, None]).exp().double()
    torch.testing.assert_close(ours, weights[:, :first], atol=1e-4, rtol=1e-2)


ALL_PAGES = [(keys, values) for keys in INTERPRETED for values in INTERPRETED if values in CODES]
PAGES = ALL_PAGES[::4] + [pair for pair in ALL_PAGES if pair not in ALL_PAGES[::4]]


@pytest.mark.parametrize("pair", first(PAGES, 12))
def test_pages_are_the_references_to_the_bit(pair: tuple[str, str]) -> None:
    keys, values = pair
    check_pages(PageLayout(64, keys, values))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("keys", TOKEN_KEYS)
def test_pages_of_keys_by_token_are_in_wide_heads_too(keys: str, head_dim: int) -> None:
    check_pages(PageLayout(head_dim, keys, "int4"))


@pytest.mark.parametrize(
    "layout",
    first(
        [PageLayout(64, "rotated_int2-token", values) for values in TURNED_VALUES]
        + [PageLayout(128, "rotated_int2-token", "rotated_int3")]
        + [PageLayout(64, keys, "rotated_int4") for keys in TURNED_KEYS]
        + [PageLayout(128, "rotated_int2-token", values) for values in TURNED_VALUES],
        5,
    ),
    ids=str,
)
def test_pages_of_rotated_numbers_are_the_references_but_for_ties(layout: PageLayout) -> None:
    theirs, ours = written_pages(layout)
    assert float((theirs == ours).double().mean()) > 0.995  # sums in another order round otherwise
    for part in (theirs, ours):
        for page in part.split(layout.page_bytes):
            assert read_page(page, layout, torch.ones(2))[0].isfinite().all()


@pytest.mark.parametrize("keys", ["rotated_int8-token", "rotated_int8"])
def test_rotated_pages_hold_what_was_written(keys: str) -> None:
    layout = PageLayout(64, keys, "rotated_int8")
    rows = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1))
    read = read_page(write_page(rows[0], rows[1], layout, torch.ones(2)), layout, torch.ones(2))
    for stored, own in zip(read, rows, strict=True):
        assert float((stored - own).abs().max()) < 0.05


def check_pages(layout: PageLayout) -> None:
    assert torch.equal(*written_pages(layout))


def written_pages(layout: PageLayout) -> list[Tensor]:
    """The same tokens by the reference, and by the kernel."""
    shape = (2, 3, 200, layout.head_dim)
    tensors = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen, size = torch.arange(0, 186, 2, dtype=torch.int32), layout.page_tokens
    records = torch.tensor([[1, 0, size, 0, 0], [1, 64, size // 2 - 3, layout.page_cells, 0]]).int()
    writing = Writing(layout, tensors[0], tensors[1], chosen, records, torch.ones(1, 2))
    pools = [torch.zeros(2 * layout.page_bytes, dtype=torch.uint8) for _ in range(2)]
    PlainBackend().write(pools[0], writing)
    TritonBackend().write(pools[1], writing)
    return pools


def test_appending_and_moving_are_the_references() -> None:
    layout = PageLayout(64)
    ends = []
    for backend in (PlainBackend(), TritonBackend()):
        pool = torch.full((14 * layout.page_bytes,), 0x7F, dtype=torch.uint8)
        order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
        table = F.pad(order * layout.page_cells, (0, TABLE_AHEAD)).int()
        lengths, empty = torch.zeros(2, dtype=torch.int32), torch.zeros(0)
        paged = Paged(pool, table, lengths, empty, empty, (), 64, growing_pages=7)
        growing = Growing(torch.tensor([0, 1]).int(), torch.tensor([0, 7]).int())
        generator = torch.Generator().manual_seed(0)
        for at in range(100):
            keys, values = torch.randn(2, 1, 2, 64, generator=generator).bfloat16()
            # Kernels append the last 38: three pages begin among them.
            (PlainBackend() if at < 62 else backend).append(paged, growing, keys, values)
        places = [[[99, 64, 98], [5, 5, 5]], [[3, 10, 63], [5, 5, 5]]]
        backend.move(paged, growing, Moves(torch.tensor([1, 0]).int(), *torch.tensor(places).int()))
        lengths -= torch.tensor([0, 36]).int()
        backend.append(paged, growing, keys, values)
        assert lengths.tolist() == [101, 65]
        pages = pool.view(torch.bfloat16).view(14, 2, BF16_PAGE, 64)[order].view(2, 7, 2, -1, 64)
        held = pages.transpose(1, 2).flatten(2, 3)  # row, keys or values, token
        ends.append([held[0][:, :101], held[1][:, :65]])
    for plain, ours in zip(*ends, strict=True):
        assert torch.equal(plain, ours)


def test_a_ring_is_the_references() -> None:
    memories = []
    for backend in (PlainBackend(), TritonBackend()):
        generator = torch.Generator().manual_seed(0)
        pool = Pool(4 * 576, 256, "cpu")
        pool.memory.fill_(0x7F)
        layer = PagedLayer(0, [Option(), Option()], 64, 1, pool, backend)
        keys, values = torch.randn(2, 2, 20, 64, generator=generator).bfloat16()
        kept = [torch.arange(0, 20, 7), torch.arange(20)]
        layer.most[:] = 20
        store_prompts(layer, keys, values, kept)
        layer.ring = Ring(places_of(kept, [20, 20], 20))
        layer.seal(30)
        lengths = []
        for token in torch.randn(30, 2, 1, 2, 64, generator=generator).bfloat16():
            reserve(layer, 1)
            layer.append(*token)
            layer.count_appended()
            lengths.append(layer.paged.lengths.tolist())
        assert lengths[-1] == layer.lengths.ravel().tolist() == [0, 0, 20, 20, 0, 0]
        q = torch.randn(2, 3, 64, generator=generator).bfloat16()
        output = layer.attend(q, Scratch(2, layer.slots, 3, 64, "cpu"), 0.125)
        memories.append((torch.tensor(lengths), output))
    assert torch.equal(memories[0][0], memories[1][0])
    torch.testing.assert_close(memories[0][1], memories[1][1], atol=0.01, rtol=0.01)


def test_a_layer_sees_the_same_weights_through_kernels() -> None:
    options = [Option(), Option(Full(), ALL, Int4(), Int2())]
    found = []
    for backend in (PlainBackend(), TritonBackend()):
        generator = torch.Generator().manual_seed(0)
        layer = PagedLayer(0, options, 64, 1, Pool(4 * 576, 256, "cpu"), backend)
        keys, values = torch.randn(2, 2, 90, 64, generator=generator).bfloat16()
        layer.most[0] = 130
        store_prompts(layer, keys, values, [torch.arange(0, 90, 2), torch.arange(90)])
        layer.seal(70)
        reserve(layer, 70)
        for token in torch.randn(12, 2, 1, 2, 64, generator=generator).bfloat16():
            layer.append(*token)
            layer.count_appended()
        q = torch.randn(2, 3, 64, generator=generator).bfloat16()
        output, seen = attend_seeing(layer, q, Scratch(2, layer.slots, 3, 64, "cpu"), 0.125)
        weights = weights_on_grown(layer, 128, seen)
        assert (weights.sum(-1)[0] - 1).abs().max() < 1e-3  # all of the first row is growing
        assert (weights.sum(-1)[1] < 1).all()
        assert weights[0].count_nonzero(-1).tolist() == [57] * 3
        found.append((output.float(), weights))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=0.01, rtol=0.01)


def weights_on_grown(layer: PagedLayer, places: int, seen: AttentionSeen) -> torch.Tensor:
    """Attention on the first places of every row's growing segment, ``[rows, G, places]``."""
    rows = torch.arange(layer.rows)
    real = torch.arange(places) < layer.paged.lengths[GROWN * layer.rows + rows][:, None]
    return weights_at(columns_of(layer, GROWN, rows, places), rows, real, seen)


@pytest.mark.parametrize("settled", first([64, 128]))
def test_pages_settle_the_same_through_kernels(settled: int) -> None:
    pairs = [(Int4, Int2, 4), (Int4, Int4, 9), (Int4, Int2, 6)]
    options = [
        *(Option(Full(), ALL, k(exact_first=n), v(exact_first=n)) for k, v, n in pairs), Option()
    ]  # fmt: skip
    found = []
    for backend in (PlainBackend(), TritonBackend()):
        generator = torch.Generator().manual_seed(0)
        pool = Pool(8 * 576, 256, "cpu")
        layer = PagedLayer(0, options, 64, 1, pool, PlainBackend(), residual=3)
        keys, values = torch.randn(2, 4, 30, 64, generator=generator).bfloat16()
        store_prompts(layer, keys, values, [torch.arange(30)] * 4)
        layer.seal(settled + 12)
        tokens = torch.randn(settled + 7, 2, 1, 4, 64, generator=generator).bfloat16()
        for at, token in enumerate(tokens):
            if at == settled - 2:  # soon the first page, or the second, settles
                layer.backend = backend
            settle(layer)
            reserve(layer, 1)
            layer.append(*token)
            layer.count_appended()
        held = [[26, 21, 24, 30], [11, 16, 13, settled + 7], [settled, settled, settled, 0]]
        assert layer.lengths.tolist() == held
        cells = [int(cell) for row in layer.pages[SETTLED] for cell in row]
        exact = [pool.memory[256 * cell :][:3584] for cell in cells]  # no page is shorter
        q = torch.randn(4, 3, 64, generator=generator).bfloat16()
        _, seen = attend_seeing(layer, q, Scratch(4, layer.slots, 3, 64, "cpu"), 0.125)
        weights = weights_on_grown(layer, 192, seen)
        found.append((torch.stack(exact), weights))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("batch", first([1, 3]))
def test_prompts_are_chosen_from_and_stored_the_same_through_kernels(
    batch: int,
    make_network: Callable[..., Any],
    tiny_fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import LlamaConfig

    network = make_network(LlamaConfig(**{**tiny_fields, "head_dim": 64})).eval()
    policy = Policy.uniform(Option(H2O(), Budget(tokens=70), Int4(), Int2()), 3, 2)
    tokens = torch.randint(2, 250, (batch, 80), generator=torch.Generator().manual_seed(0))
    memories = []
    for backend in (PlainBackend(), TritonBackend()):
        monkeypatch.setattr(
            "kvtune.runtime.cache.policy_cache.backend_for", lambda _, found=backend: found
        )
        found = load_cache(policy, network, new_tokens=64)
        with torch.no_grad():
            network(tokens, past_key_values=found)
        memories.append(found.pool.memory)
    assert memories[0].any()
    assert torch.equal(*memories)


def _always(backend: Backend, _: torch.device) -> Backend:
    return backend


def test_tokens_leave_few_bits_the_same_through_kernels(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    from transformers import LlamaConfig

    shape = {"head_dim": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    fields = {**tiny_fields, **shape, "num_hidden_layers": 1}
    network = make_network(LlamaConfig(**fields)).bfloat16()  # which the interpreter cuts off
    form, found = Int4(keys_by="token"), []
    option = Option(H2O(), Budget(tokens=8), form, form)
    policy = Policy("few bits", ((option,),))
    for backend in (PlainBackend(), TritonBackend()):
        of = partial(_always, backend)
        cache = PolicyCache(policy, read_geometry(network), 8, True, 2, backend_of=of)
        with torch.no_grad(), load_cache(policy, network, evicts=True):
            network(torch.arange(2, 16)[None], past_key_values=cache)
            for token in range(4):
                answer = network(torch.tensor([[30 + token]]), past_key_values=cache)
        evictor = cache.layers[0].evictors[0]
        found.append((evictor.kept(), evictor.newest.tolist(), answer.logits))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], atol=0.03, rtol=0.03)


def test_column_sums_are_those_of_the_whole_matrix() -> None:
    q, k = torch.randn(4, 150, 64), torch.randn(2, 150, 64)
    logits = q.double() @ k.double().repeat_interleave(2, 0).transpose(1, 2) / 8
    causal = torch.ones(150, 150, dtype=torch.bool).tril()
    exact = logits.masked_fill(~causal, -torch.inf).softmax(-1).sum(1)
    torch.testing.assert_close(column_sums(q, k, 1 / 8).double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Gemma3Text", "Qwen2"])
def test_a_fused_model_says_the_same_and_is_put_back(
    family: str, make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    import transformers

    config = getattr(
        transformers, f"{family.removesuffix('Text')}{'Text' * ('Text' in family)}Config"
    )
    network = make_network(config(**{**tiny_fields, "head_dim": 16})).eval()
    before = network.state_dict()
    step = {"input_ids": torch.tensor([[7], [9]]), "use_cache": False}
    expected = network(**step).logits
    with fused(network):
        torch.testing.assert_close(network(**step).logits, expected, atol=2e-5, rtol=2e-4)
    assert torch.equal(network(**step).logits, expected)
    assert not any("forward" in vars(module) for module in network.modules())
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_rounded_before_they_are_normalised(dtype: torch.dtype) -> None:
    from kvtune.runtime.kernels.elementwise import add_rms_norm

    x, more, weight = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    total, normed = add_rms_norm(x, more, weight[0], 1e-5)
    close: Any = {"atol": 1e-6, "rtol": 2 * torch.finfo(dtype).eps}  # the interpreter cuts bf16 off
    torch.testing.assert_close(total, x + more, **close)
    exact = total.double() * (total.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(normed, exact.to(dtype) * weight[0], **close)


def test_all_sums_but_the_last_are_made_by_norms(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    from kvtune.runtime.kernels import elementwise

    original, sums = elementwise.add_rms_norm, []

    def counted(*args: Any) -> Any:
        sums.append(original(*args)[0])
        return original(*args)

    monkeypatch.setattr(elementwise, "add_rms_norm", counted)
    network = make_network(LlamaConfig(**tiny_fields)).eval()
    with fused(network):
        network(torch.tensor([[7], [9]]), use_cache=False)
    assert len(sums) == 2 * len(network.model.layers) - 1
