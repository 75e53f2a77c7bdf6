"""Sequences of a batch that have ended: their memory is others', who answer as if nothing was."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.rotated import RotatedInt4
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.minicache import MiniCache
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.cache.leaving import free
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.reserving import reserve
from kvtune.runtime.cache.sliding import Ring
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.graph import generate
from kvtune.runtime.rotation import Rotation

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quick_interpreter"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

LAYERS, HEADS, PROMPT = 4, 2, 2 * PAGE + 9
QUEST = Option(Quest(block=PAGE), Budget(tokens=PAGE))
CACHES: dict[str, tuple[Option, dict[str, Any]]] = {
    "plain": (Option(Full(), ALL, Int4(exact_first=4), Int8()), {}),
    "evicting": (Option(H2O(), Budget(tokens=20)), {"evicts": True}),
    "evicting from few bits": (
        Option(H2O(), Budget(tokens=20), RotatedInt4(), RotatedInt4()),
        {"evicts": True, "residual": 4},
    ),
    "pages chosen": (QUEST, {}),
    "pages on the host": (replace(QUEST, tier="host"), {}),
    "entries chosen": (Option(TokenSelect(), Budget(tokens=20)), {}),
    "weighted entries": (Option(Razor(), Budget(tokens=20)), {}),
    "packed buffers": (Option(Full(), ALL, Kitty(), Kitty()), {}),
    "shared directions": (Option(MiniCache(), ALL), {}),
    "settling": (Option(Full(), ALL, Int8(), Int8()), {"residual": 0}),
}


@pytest.fixture(scope="module")
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return make_network(
        LlamaConfig(**tiny_fields | {"num_hidden_layers": LAYERS}), tried=True
    ).eval()


def read(network: Any, option: Option, sequences: int, **asked: Any) -> PolicyCache:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 250, (sequences, PROMPT), generator=generator)
    policy = Policy.uniform(option, LAYERS, HEADS)
    cache: PolicyCache = load_cache(policy, network, new_tokens=4, **asked)
    with torch.no_grad():
        network(ids, past_key_values=cache)
    return cache


def stepped(network: Any, cache: PolicyCache, tokens: range) -> Tensor:
    """Logits of every sequence after each of these tokens."""
    given = [torch.full((len(cache.prompts), 1), 5 + token) for token in tokens]
    with torch.no_grad():
        found = [network(ids, past_key_values=cache).logits[:, -1] for ids in given]
    return torch.stack(found)


@pytest.mark.parametrize("name", CACHES)
def test_the_others_answer_as_before_and_nothing_is_kept_of_it(network: Any, name: str) -> None:
    """Beside a twin of which nothing is freed; steps go on until tables are laid out anew."""
    option, asked = CACHES[name]
    twin, ours = (read(network, option, 3, **asked) for _ in range(2))
    stepped(network, twin, range(2))
    stepped(network, ours, range(2))
    host = ours.host_bytes()
    ours.free(1)
    ours.pool.check_integrity()
    expected, found = (stepped(network, each, range(2, 14)) for each in (twin, ours))
    torch.testing.assert_close(found[:, [0, 2]], expected[:, [0, 2]], atol=1e-5, rtol=1e-5)
    assert found[:, 1].isfinite().all()
    assert not torch.equal(found[:, 1], expected[:, 1])
    for layer in ours.layers:
        assert not layer.paged.lengths[:, 2:4].any()
        assert not layer.paged.paged.lengths.view(3, 3, 2)[:, 1].any()
        assert all(not len(rows[row]) for rows in layer.paged.pages for row in (2, 3))
    assert ours.page_bytes() < twin.page_bytes()
    assert ours.host_bytes() == 2 * host // 3
    ours.pool.check_integrity()
    ours.free(2)
    ours.free(0)
    assert not sum(layer.paged.page_bytes() for layer in ours.layers)
    assert not ours.host_bytes()
    assert not ours.shared
    assert not any(layer.evictors for layer in ours.layers)


def test_what_is_no_sequence_is_not_freed(network: Any) -> None:
    cache = read(network, Option(), 2)
    for number in (-1, 2):
        with pytest.raises(KvtuneError, match=f"no sequence {number} in a batch of 2"):
            cache.free(number)
    fresh = load_cache(cache.policy, network)
    with pytest.raises(KvtuneError, match="no sequence 0 in a batch of 0"):
        fresh.free(0)
    cache.reading = range(1, 2)
    with pytest.raises(KvtuneError, match="cannot be freed while prompts are read"):
        cache.free(0)


def test_the_decode_loop_frees_what_has_ended_and_finds_the_same(network: Any) -> None:
    option = Option(H2O(), Budget(tokens=20))
    ids = torch.randint(2, 250, (2, 30), generator=torch.Generator().manual_seed(1))
    policy, new = Policy.uniform(option, LAYERS, HEADS), PAGE + 6
    expected = generate(network, load_cache(policy, network, new_tokens=new), ids, new_tokens=new)
    first, other = expected.tolist()
    end = next(token for token in first[:PAGE] if token not in other)
    cache = load_cache(policy, network, new_tokens=new)
    found = generate(network, cache, ids, new_tokens=new, ends=(end,))
    assert torch.equal(found[1], expected[1])
    ended = first.index(end) + 1
    assert torch.equal(found[0, :ended], expected[0, :ended])
    paged = cache.layers[0].paged
    assert paged.ended.tolist() == [True, True, False, False]
    assert paged.lengths.sum(0).tolist() == [0, 0, 20 + new - 1, 20 + new - 1]
    again = load_cache(policy, network, new_tokens=new)
    ends = (end, other[3])
    assert generate(network, again, ids, new_tokens=new, ends=ends).shape[1] < new
    assert again.page_bytes() == 0


@pytest.mark.parametrize("slides", [False, True], ids=["grows", "slides"])
def test_kernels_append_nothing_to_it(slides: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; kernels have no interpreter")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("Triton's interpreter is switched off")
    memories = []
    for backend in (PlainBackend(), TritonBackend()):
        generator = torch.Generator().manual_seed(0)
        pool = Pool(576, 4 * 64, "cpu")
        pool.memory.fill_(0)
        layer = PagedLayer(0, [Option()], 64, 2, pool, backend)
        if slides:
            layer.ring = Ring(torch.tensor([[0, 1]] * 2).numpy())
            layer.most[:] = 2
        layer.seal(3)
        reserve(layer, 3)
        free(layer, 0)
        for _ in range(3):
            q, k, v = torch.randn(3, 2, 1, 1, 64, generator=generator).bfloat16()
            layer.append(k[:, 0], v[:, 0])
            cos, sin = torch.randn(2, 2, 1, 64, generator=generator).bfloat16()
            layer.append_rotated(Rotation(q, k, cos, sin), v[:, :, 0])
            layer.count_appended(2)
        assert layer.lengths[1].tolist() == [0, 2 if slides else 6]
        assert layer.paged.lengths.tolist() == layer.lengths.ravel().tolist()
        memories.append(pool.memory.clone())
    pages = [(memory.view(-1, 64 * 64) != 0).any(1).sum() for memory in memories]
    assert pages[0] == pages[1] == 1
    torch.testing.assert_close(*(x.view(torch.bfloat16) for x in memories))
