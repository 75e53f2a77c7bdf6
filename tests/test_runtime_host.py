"""Heads whose prompt lies in host memory answer as if it lay on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.host_pages import (
    HOST_SLAB_BYTES,
    arriving_pages,
    host_pages,
    host_sequence_bytes,
    landing_pages,
)
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.paging import Growth, head_pages, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import Pages
from kvtune.runtime import load_cache
from kvtune.runtime.cache.backend import Fetching
from kvtune.runtime.cache.host_pool import HostPool
from kvtune.runtime.cache.leaving import free
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.graph import generate
from kvtune.runtime.measure.filled import filled

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

PROMPT, NEW = 5 * PAGE + 9, 6
READER = Quest(block=PAGE)
SINKS = 4
OPTIONS = {
    "quest": Option(READER, Budget(tokens=2 * PAGE)),
    "quest int4": Option(READER, Budget(tokens=2 * PAGE), Int4(), Int4()),
    "landmark fp8": Option(Landmark(block=PAGE), Budget(tokens=3 * PAGE), Fp8(), Fp8()),
    "everything": Option(),
    "sinks in 16 bits": Option(Full(), ALL, Int4(exact_first=SINKS), Int2(exact_first=SINKS)),
    "snapkv": Option(SnapKV(window=4, kernel=3), Budget(tokens=100)),
}


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    fields = tiny_fields | {"max_position_embeddings": 1024}
    return make_network(LlamaConfig(**fields), tried=True).eval()


def there(option: Option) -> Option:
    return replace(option, tier="host")


def shape_of(network: Any) -> tuple[int, int]:
    return network.config.num_hidden_layers, network.config.num_key_value_heads


def prompts(count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, 60, (count, PROMPT), generator=generator)


def logits(network: Any, policy: Policy, ids: torch.Tensor) -> tuple[torch.Tensor, PolicyCache]:
    """Of a prompt's last token and of two more, through the cache."""
    with load_cache(policy, network, new_tokens=NEW) as cache, torch.no_grad():
        found = [network(ids, past_key_values=cache).logits[:, -1]]
        for token in (5, 7):
            more = torch.full((len(ids), 1), token)
            found.append(network(more, past_key_values=cache).logits[:, -1])
    return torch.stack(found), cache


@pytest.mark.parametrize("name", OPTIONS)
def test_a_head_on_the_host_answers_as_on_the_device(network: Any, name: str) -> None:
    here, ids = OPTIONS[name], prompts(2)
    expected, _ = logits(network, Policy.uniform(here, *shape_of(network)), ids)
    found, cache = logits(network, Policy.uniform(there(here), *shape_of(network)), ids)
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)  # merged in another order
    assert cache.host_bytes() > 0


def mixed(network: Any) -> Policy:
    """Layers and heads on either side, in several formats."""
    layers, heads = shape_of(network)
    kinds = [OPTIONS["quest"], there(OPTIONS["quest int4"]), there(OPTIONS["quest"]), Option()]
    rows = [tuple(kinds[(layer + head) % 4] for head in range(heads)) for layer in range(layers)]
    return Policy("mixed", tuple(rows))


def on_device(policy: Policy) -> Policy:
    rows = [tuple(replace(option, tier="device") for option in row) for row in policy.heads]
    return Policy(policy.name, tuple(rows))


def test_heads_of_a_layer_may_lie_on_both_sides(network: Any) -> None:
    policy, ids = mixed(network), prompts(2)
    expected, _ = logits(network, on_device(policy), ids)
    found, cache = logits(network, policy, ids)
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)
    assert not cache.layers[0].paged.lengths[1].max() > NEW  # nothing else grew


def test_generation_draws_the_same_tokens(network: Any) -> None:
    policy, ids = mixed(network), prompts()
    drawn = [
        generate(network, cache, ids, new_tokens=NEW)
        for each in (policy, on_device(policy))
        for cache in [load_cache(each, network, new_tokens=NEW)]
    ]
    assert drawn[0].tolist() == drawn[1].tolist()


def test_pages_are_where_the_plan_says(network: Any) -> None:
    policy, ids = mixed(network), prompts()
    _, cache = logits(network, policy, ids)
    head_dim, growth = cache.geometry.head_dim, Growth(NEW)
    budgets = policy.budgets(PROMPT).flat
    asked = [
        (option, int(n), PROMPT, head_dim)
        for option, n in zip(policy.options(), budgets, strict=True)
    ]
    on_host = sum(
        layout.page_bytes * count for each in asked for layout, count in host_pages(*each).items()
    )
    assert cache.host_bytes() == on_host
    assert cache.host_pool is not None
    assert cache.host_pool.held_bytes == host_sequence_bytes(policy, PROMPT, head_dim)
    landing = landing_pages(policy, PROMPT, head_dim)
    here = Pages(landing)
    for each in asked:
        here += head_pages(*each, growth)
    assert cache.page_bytes() == sum(layout.page_bytes * n for layout, n in here.items())


def test_a_cache_that_is_filled_for_timing_lies_where_a_real_one_does(network: Any) -> None:
    policy = mixed(network)
    _, real = logits(network, policy, prompts())
    cache = filled(network, policy, PROMPT, 1, NEW)
    assert (cache.host_bytes(), cache.page_bytes()) == (real.host_bytes(), real.page_bytes())
    assert cache.prompt_bytes() == real.prompt_bytes()


def test_the_ledger_counts_both_sides() -> None:
    here, tokens, head_dim = OPTIONS["quest"], 1000, 64
    one, other = (o.ledger(2 * PAGE, tokens, head_dim) for o in (here, there(here)))
    index = READER.reader(2 * PAGE).index_bytes(tokens, head_dim)
    stored = 4 * tokens * head_dim
    assert (one.resident_bytes, one.host_bytes, one.moved_bytes) == (stored + index, 0, 0)
    assert (other.resident_bytes, other.host_bytes) == (index, stored)
    assert other.moved_bytes == 4 * 2 * PAGE * head_dim
    assert other.read_bytes == one.read_bytes  # what has come over is read as before


def test_a_head_without_a_reader_moves_all_of_it() -> None:
    ledger = there(Option()).ledger(500, 500, 64)
    assert (ledger.resident_bytes, ledger.host_bytes) == (0, 4 * 500 * 64)
    assert ledger.moved_bytes == ledger.host_bytes


def test_only_selected_pages_come_over(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    fetch = PlainBackend.fetch

    def counting(self: Any, pool: Any, host: Any, fetching: Fetching) -> None:
        moved.append(int((fetching.places >= 0).sum()) * fetching.layout.block_bytes)
        fetch(self, pool, host, fetching)

    monkeypatch.setattr(PlainBackend, "fetch", counting)
    option = there(OPTIONS["quest int4"])
    policy = Policy.uniform(option, *shape_of(network))
    _, cache = logits(network, policy, prompts())
    budget = int(policy.budgets(PROMPT)[0, 0])
    arriving = arriving_pages(option, budget, PROMPT, cache.geometry.head_dim)
    each = sum(layout.page_bytes * count for layout, count in arriving.items())
    heads = policy.layers * policy.kv_heads
    assert sum(moved) == 2 * heads * each  # two steps
    assert sum(arriving.values()) == 2


def test_a_freed_sequence_gives_its_host_pages_back(network: Any) -> None:
    policy = Policy.uniform(there(OPTIONS["quest"]), *shape_of(network))
    _, cache = logits(network, policy, prompts(2))
    before = cache.host_bytes()
    for layer in cache.layers:
        free(layer.paged, 0)
    assert cache.host_bytes() == before // 2
    layer = cache.layers[0].paged
    layer.seal(NEW)  # and lays out its tables again
    assert layer.host is not None
    assert layer.host.blocks.keys() == {2, 3}


def test_more_slabs_are_taken_as_they_fill(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, ids = mixed(network), prompts()
    expected, _ = logits(network, policy, ids)
    small = 2 * PageLayout(network.config.head_dim).block_bytes
    monkeypatch.setattr(HostPool.__init__, "__defaults__", (small,))
    found, cache = logits(network, policy, ids)
    assert cache.host_pool is not None
    assert len(cache.host_pool.slabs) > 4
    assert torch.equal(found, expected)


def test_the_host_pool_gives_pages_of_one_slab_in_runs() -> None:
    pool = HostPool(torch.device("cpu"), slab_bytes=300)
    places = pool.take(7, 100)
    assert places.tolist() == [0, 100, 200, 300, 400, 500, 600]
    assert [(run.start, run.stop) for run in pool.runs(places, 100)] == [(0, 3), (3, 6), (6, 7)]
    pool.give(places[1:3], 100)
    assert (pool.used_bytes, pool.held_bytes) == (500, 900)
    again = pool.take(4, 100)
    assert set(again.tolist()) == {100, 200, 700, 800}
    whole = [slice_of.stop - slice_of.start for slice_of in pool.runs(np.sort(again), 100)]
    assert sum(whole) == 4


def test_the_kernel_fetches_the_pages_that_torch_does() -> None:
    pytest.importorskip("triton")
    layout, generator = PageLayout(64, "int4", "int4"), torch.Generator().manual_seed(0)
    host = HostPool(torch.device("cpu"), slab_bytes=3 * layout.page_bytes + 8)
    places = host.take(8, layout.page_bytes)
    for place in places.tolist():
        drawn = torch.randint(0, 256, (layout.page_bytes,), generator=generator)
        host.put(place, drawn.to(torch.uint8))
    wanted = torch.tensor([places[7], -1, places[2], places[3]])
    cells = torch.tensor([5, 0, 1, 3], dtype=torch.int32) * layout.page_cells
    pools = []
    for backend in (TritonBackend(), PlainBackend()):
        pool = torch.zeros(8 * layout.page_bytes, dtype=torch.uint8)
        backend.fetch(pool, host, Fetching(wanted, cells, layout))
        pools.append(pool)
    assert torch.equal(*pools)
    assert not pools[0][: layout.page_bytes].any()  # nothing came there
    assert pools[0][layout.page_bytes : 2 * layout.page_bytes].any()


@pytest.mark.parametrize(
    ("option", "evicts", "message"),
    [
        (Option(Razor(), Budget(tokens=60), tier="host"), False, "more than pages"),
        (Option(H2O(), Budget(tokens=60), tier="host"), True, "go on evicting"),
        (Option(TokenSelect(), Budget(tokens=60), tier="host"), False, "single tokens"),
    ],
    ids=["beside pages", "evicting", "entries"],
)
def test_what_cannot_lie_on_the_host_is_refused(
    network: Any, option: Option, evicts: bool, message: str
) -> None:
    policy = Policy.uniform(option, *shape_of(network))
    with pytest.raises(KvtuneError, match=message):
        load_cache(policy, network, evicts=evicts)


def test_device_memory_is_planned_with_where_pages_land() -> None:
    option, tokens, head_dim = there(OPTIONS["quest"]), 64 * PAGE, 64
    policy = Policy.uniform(option, 12, 2)
    size = sequence_bytes(policy, tokens, head_dim, Growth(0))
    full = sequence_bytes(on_device(policy), tokens, head_dim, Growth(0))
    page = PageLayout(head_dim).block_bytes
    # 62 of 64 pages leave each head, and each page leaves its place behind.
    assert full - size == pytest.approx(24 * 64 * (page - 8) - 2 * 2 * page, rel=0.01)
    assert host_sequence_bytes(policy, tokens, head_dim) == HOST_SLAB_BYTES
