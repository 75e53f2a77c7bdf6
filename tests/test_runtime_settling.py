"""Generated tokens that become old: quantised a page at a time, and read as quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.attention import attend
from kvtune.policies.format import Format, Role
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int4, Int8
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.protected import Protected
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.page_formats import BF16_PAGE
from kvtune.policies.paging import head_pages
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import SLAB_CELLS
from kvtune.runtime import load_cache
from kvtune.runtime.cache.leaving import free
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.reserving import reserve
from kvtune.runtime.cache.segments import CODED, GROWN, SETTLED
from kvtune.runtime.cache.settling import settle
from kvtune.runtime.cache.storing import store_prompts
from kvtune.runtime.graph import generate
from kvtune.runtime.kernels.launch import Scratch
from kvtune.tests.padded import ids

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

D, PROMPT = 16, 100


def roundtrip(form: Format, tensor: Tensor, role: Role) -> Tensor:
    """One page of a head's generated tokens, as its format reads it back."""
    plain = type(form)()  # nothing exact among them
    count = torch.tensor([tensor.shape[0]])
    back: Tensor = plain.roundtrip(tensor[None].float(), count, role)[0]
    return back


@pytest.mark.parametrize("residual", [0, 5, 64])
@pytest.mark.parametrize("exact", [0, 4, 64])
@pytest.mark.parametrize("stride", [1, 64])
def test_old_pages_are_quantised_and_new_ones_are_not(
    residual: int, exact: int, stride: int
) -> None:
    """Asked at every token, or, as the host of a captured graph, every 64."""
    forms = [
        (Int4(exact_first=exact), Int2(exact_first=exact)),
        (Int8(keys_by="token"), Int8()),
        (Bf16(), Bf16()),
    ]
    options = [Option(Full(), ALL, *pair) for pair in forms]
    generator = torch.Generator().manual_seed(residual)
    keys, values = torch.randn(2, 3, PROMPT + 300, D, generator=generator).bfloat16()
    pool = Pool(60 * SLAB_CELLS, 4 * D, "cpu")
    layer = PagedLayer(0, options, D, 1, pool, PlainBackend(), residual)
    store_prompts(layer, keys[:, :PROMPT], values[:, :PROMPT], [torch.arange(PROMPT)] * 3)
    layer.seal(20 if stride == 1 else 300)  # at first for fewer than will come
    table = layer.paged.table
    for at in range(300):
        if at % stride == 0:
            settle(layer)
            reserve(layer, stride)
        layer.append(keys[None, :, PROMPT + at], values[None, :, PROMPT + at])
        layer.count_appended()
    assert (layer.paged.table is table) == (stride > 1)
    settled = [(299 // stride * stride - residual) // 64 * 64] * 2 + [0]
    assert layer.lengths[SETTLED].tolist() == settled
    assert layer.lengths[CODED].tolist() == [PROMPT - exact, PROMPT, PROMPT]
    assert layer.paged.lengths.tolist() == layer.lengths.ravel().tolist()
    q = torch.randn(3, 2, D, generator=generator)
    ours = layer.attend(q, Scratch(3, layer.slots, 2, D, "cpu"), 0.3)
    for head, ((form_k, form_v), old) in enumerate(zip(forms, settled, strict=True)):
        first = torch.tensor([PROMPT])
        both = []
        roles: list[tuple[Tensor, Format, Role]] = [
            (keys[head], form_k, "keys"), (values[head], form_v, "values")
        ]  # fmt: skip
        for tensor, form, role in roles:
            parts = [form.roundtrip(tensor[None, :PROMPT].float(), first, role)[0]]
            end = PROMPT + old
            parts += [roundtrip(form, x, role) for x in tensor[PROMPT:end].split(64) if len(x)]
            both.append(torch.cat([*parts, tensor[end:].float()]))
        everything = torch.ones(1, PROMPT + 300, dtype=torch.bool)
        exact_answer, _ = attend(q[head], both[0], both[1], everything, 0.3)
        torch.testing.assert_close(ours[head], exact_answer, atol=2e-3, rtol=2e-3)
    pool.check_integrity()
    assert pool.used_bytes == layer.page_bytes()
    free(layer, 0)
    assert pool.used_bytes == 0


@pytest.mark.parametrize("staying", [50, 130])
def test_a_part_in_16_bits_stays_whole_however_long_it_is(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], staying: int
) -> None:
    """It makes room for each page that settles, 64 tokens at a time from its end."""
    network = shallow(make_network, tiny_fields)
    form = Int8(keys_by="token")
    method = Protected(by="h2o", stop=staying)
    policy = Policy.uniform(Option(method, Budget(tokens=staying + 40), form, form), 1, 2)
    seen = []
    for residual in (None, 16):
        cache = load_cache(policy, network, residual=residual, new_tokens=150)
        network(**ids(staying + 60), past_key_values=cache)
        for at in range(4):
            network(5 + at + torch.arange(21)[None], past_key_values=cache)
        paged = cache.layers[0].paged
        seen.append(_first_keys(paged, staying))
    assert paged.lengths[SETTLED].tolist() == [64, 64]
    assert paged.staying.tolist() == [staying] * 2
    assert torch.equal(*seen)


def _first_keys(paged: PagedLayer, count: int) -> Tensor:
    """The first keys of the first row's growing segment, as they lie in its pages."""
    cells = paged.pages[GROWN][0]
    tokens = paged.pool.memory.view(torch.bfloat16).view(-1, paged.head_dim)
    places = np.arange(count)
    return tokens[2 * cells[places // BF16_PAGE] + places % BF16_PAGE].clone()


def test_of_a_part_beside_kivis_window_nothing_settles(network: Any) -> None:
    form = Kivi(group=64, backbone="int4", residual=128)
    method = Protected(by="h2o", stop=50)
    policy = Policy.uniform(Option(method, Budget(tokens=90), form, form), 3, 2)
    cache = load_cache(policy, network, residual=16, new_tokens=64)
    network(**ids(100), past_key_values=cache)
    paged = cache.layers[0].paged
    assert paged.exact.tolist() == [90, 90]
    assert paged.staying.tolist() == [50, 50]


def test_fp8_is_held_to_the_prompts_range() -> None:
    options = [Option(Full(), ALL, Fp8(), Fp8())]
    keys = torch.randn(1, 200, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    pool = Pool(20 * SLAB_CELLS, 4 * D, "cpu")
    layer = PagedLayer(0, options, D, 1, pool, PlainBackend(), 0)
    store_prompts(layer, keys[:, :70], keys[:, :70], [torch.arange(70)])
    layer.seal(100)
    loud = 100 * torch.ones(1, 1, D)
    for _ in range(65):
        settle(layer)
        reserve(layer, 1)
        layer.append(loud, loud)
        layer.count_appended()
    assert layer.lengths[:, 0].tolist() == [70, 1, 64]
    only_new = torch.full((1, 1, D), 10.0)
    output = layer.attend(only_new, Scratch(1, layer.slots, 1, D, "cpu"), 1.0)
    assert 90 < float(output.max()) <= 100.5  # the one in 16 bits outweighs those that were cut off
    assert layer.fp8_scales[0].tolist() == layer.fp8_scales[2 * 1].tolist()


def shallow(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    """One layer, for what takes many tokens and is the same in each."""
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**tiny_fields | {"num_hidden_layers": 1}), tried=True)


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**tiny_fields), tried=True).eval()


def prompts() -> dict[str, Tensor]:
    tokens = torch.randint(2, 250, (2, 50), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def policy() -> Policy:
    heads = (
        (Option(Full(), ALL, Int4(exact_first=4), Int4(exact_first=4)), Option()),
        (Option(H2O(), Budget(tokens=9), Int8(), Int2()), Option(Full(), ALL, Int8(), Int8())),
        (Option(H2O(), Budget(tokens=9)), Option(Full(), ALL, Int2(), Int4())),
    )
    return Policy("mixed", heads)


def settled(cache: PolicyCache) -> list[list[int]]:
    return [layer.paged.lengths[SETTLED].tolist() for layer in cache.layers]


def test_a_generation_settles_and_its_bytes_fall(network: Any) -> None:
    caches = []
    for residual in (None, 16):
        cache = load_cache(policy(), network, residual=residual, new_tokens=80)
        network(**prompts(), past_key_values=cache)
        for at in range(4):
            network(2 + at + torch.arange(48).view(2, 24), past_key_values=cache)
        caches.append(cache)
    assert settled(caches[0]) == [[0] * 4] * 3
    assert settled(caches[1]) == [[64, 0] * 2, [64, 64] * 2, [0, 64] * 2]
    for grown, kept in zip(*(cache.layers for cache in caches), strict=True):
        gone = sum(
            count // 64 * (4 * kept.paged.growing_layout.page_bytes - layout.page_bytes)
            for count, layout in zip(kept.paged.lengths[SETTLED], kept.paged.layouts, strict=True)
        )
        assert grown.paged.page_bytes() - kept.paged.page_bytes() == gone > 0
    assert caches[1].page_bytes() == sum(layer.paged.page_bytes() for layer in caches[1].layers)
    assert caches[1].layers[0].paged.lengths[GROWN].tolist() == [4 + 32, 96] * 2
    caches[1].pool.check_integrity()


@pytest.mark.full
def test_the_decode_loop_settles_too(network: Any) -> None:
    network.generation_config.eos_token_id = None
    asked: Any = {"residual": 16, "new_tokens": 100}
    cache, again = (load_cache(policy(), network, **asked) for _ in range(2))
    found = generate(network, cache, *prompts().values(), new_tokens=100)
    theirs = network.generate(
        **prompts(), max_new_tokens=100, do_sample=False, past_key_values=again
    )
    assert torch.equal(found, theirs[:, 50:])
    assert settled(cache) == settled(again) == [[64, 0] * 2, [64, 64] * 2, [0, 64] * 2]


def test_windows_and_formats_that_cannot_settle_are_refused(network: Any) -> None:
    with pytest.raises(KvtuneError, match="-1 tokens"):
        load_cache(policy(), network, residual=-1)
    many = Policy.uniform(Option(Full(), ALL, Int4(exact_first=65), Int4(exact_first=65)), 3, 2)
    with pytest.raises(KvtuneError, match="65 exact tokens"):
        load_cache(many, network, residual=64)


def test_every_segment_has_its_places_where_weights_are_seen() -> None:
    """Settled pages hold 64 tokens, growing ones 16; their logits lie one after another."""
    option = Option(Full(), ALL, Int4(), Int4())
    layer = PagedLayer(0, [option, Option()], D, 1, Pool(60 * SLAB_CELLS, 4 * D, "cpu"),
                       PlainBackend(), 0)  # fmt: skip
    keys = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    store_prompts(layer, keys, keys, [torch.arange(40)] * 2)
    layer.seal(500)
    tokens = [layer.layout(kind, row).page_tokens for kind in range(3) for row in range(2)]
    ends = layer.places[:-1] + layer.rooms.ravel() * tokens
    assert ends.tolist() == layer.places[1:].tolist()
    assert layer.rooms[2, 0] == 8, "of 500 tokens"


def test_kivis_window_lies_in_16_bits_and_settles_as_newer_tokens_come(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    network = shallow(make_network, tiny_fields)
    form = Kivi(group=64, residual=40, exact_first=4)
    option = Option(Full(), ALL, form, form)
    cache = load_cache(Policy.uniform(option, 1, 2), network, new_tokens=90, residual=40)
    network(**ids(150), past_key_values=cache)
    layer, memory = cache.layers[0].paged, cache.pool.memory.numel()
    assert layer.beside is None
    assert layer.lengths[:, 0].tolist() == [106, 44, 0]
    for turn in range(5):
        network(2 + turn + torch.arange(18)[None], past_key_values=cache)
    assert layer.lengths[:, 0].tolist() == [106, 44 + 90 - 64, 64]
    planned = head_pages(option, 150, 150, 8, cache.growth)
    coded = len(layer.pages[CODED][0]) + len(layer.pages[SETTLED][0])
    assert coded <= planned[layer.layouts[0]]
    assert cache.pool.memory.numel() == memory
    cache.pool.check_integrity()
