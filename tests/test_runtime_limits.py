"""What is reserved is what is predicted, a limit bounds all that is held, and a budget all read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.format import Format, formats
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.minicache import MiniCache
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.paging import TABLE_BYTES, Growth, held_bytes
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import share_of_slab
from kvtune.runtime import load_cache
from kvtune.runtime.cache import policy_cache
from kvtune.runtime.cache.foreseen import pages_wanted
from kvtune.runtime.cache.placing import warn_of_slow_formats
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.which_backend import backend_type
from kvtune.tests.padded import ids
from kvtune.tests.tiers import each
from kvtune.traces.geometry import Geometry
from kvtune.tuner.options import Menu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need", "ignore:.*no kernel reads"),
]
HEAD_DIM = 128
SHAPE = Geometry(2, 4, 4, HEAD_DIM, 1.0, (None, None), (), (None, None), 64, 4096)


@each("name, allocator", [(x, y) for x in sorted(formats()) for y in (None, AdaKV())])
def test_pages_that_are_reserved_are_those_that_were_predicted(name: str, allocator: Any) -> None:
    """In every format, also where budgets are split anew."""
    form = formats()[name]()
    option = Option(SnapKV(window=8), Budget(tokens=70), form, form)
    more = {"allocator": allocator} if allocator else {}
    policy = Policy.uniform(option, SHAPE.layers, SHAPE.kv_heads, **more)
    cache = PolicyCache(policy, SHAPE, new_tokens=8)
    wanted = pages_wanted(policy, SHAPE, cache.growth, 100, policy.budgets(100))
    reserved = sum(count * share_of_slab(layout) for layout, count in wanted.items())
    predicted = held_bytes(policy, 100, HEAD_DIM, Growth(8)) - 8 * TABLE_BYTES
    assert reserved == pytest.approx(predicted, abs=8)  # each head's bytes are rounded


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**tiny_fields)).bfloat16().eval()


def whole(option: Option) -> Policy:
    return Policy.uniform(option, 3, 2)


@torch.no_grad()
def generated(network: Any, cache: Any, tokens: int) -> None:
    """So many tokens after a prompt of a hundred."""
    network(**ids(100), past_key_values=cache)
    for turn in range(0, tokens, 20):
        place = 100 + turn + torch.arange(20)[None]
        network(torch.full((1, 20), 5), position_ids=place, past_key_values=cache)


def test_a_limit_that_would_bound_nothing_is_refused(network: Any) -> None:
    for method in (Quest(block=16), Razor()):
        option = Option(method, Budget(tokens=64))
        cache = load_cache(whole(option), network, new_tokens=16, limit_bytes=10**6)
        with pytest.raises(KvtuneError, match="beside the pages, which limit_bytes"):
            network(**ids(100), past_key_values=cache)
    paged = Option(Quest(block=64), Budget(tokens=64))
    network(**ids(100), past_key_values=load_cache(whole(paged), network, limit_bytes=10**7))


def test_a_pool_takes_what_its_limit_leaves_before_it_refuses(network: Any) -> None:
    """Slab by slab, though not all fit that it would take without a limit."""
    free = load_cache(whole(Option()), network, new_tokens=64)
    network(**ids(100), past_key_values=free)
    need, slab = free.pool.memory.numel(), free.pool.bytes_of(1)
    assert free.pool.bytes_of(1) < 3 * 2 * 1024 * 4 * 8, "one extension is several slabs"
    counts = []
    for slabs in (0, 1):
        cache = load_cache(whole(Option()), network, new_tokens=64, limit_bytes=need + slabs * slab)
        with pytest.raises(KvtuneError, match="its limit is"):
            generated(network, cache, 400)
        assert cache.pool.memory.numel() == need + slabs * slab
        counts.append(cache.layers[0].seen)
    assert counts[0] < counts[1]


def test_only_a_full_pool_grows(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else a user can mend is told at once, and takes no more memory each time."""
    cache = load_cache(whole(Option()), network, new_tokens=4)
    with torch.no_grad():
        network(**ids(20), past_key_values=cache)
    size = cache.pool.memory.numel()

    def damaged(*_: object) -> None:
        raise KvtuneError("kernels.yaml: no such key")

    monkeypatch.setattr(policy_cache, "reserve", damaged)
    with pytest.raises(KvtuneError, match="no such key"):
        cache.reserve(1)
    assert cache.pool.memory.numel() == size


RESIDUAL = Kivi(group=64, residual=128)


@pytest.mark.parametrize("method", [Quest(block=64), Landmark(block=64)], ids=lambda m: m.label)
def test_readers_of_pages_that_would_not_rank_all_are_refused(network: Any, method: Any) -> None:
    option = Option(method, Budget(tokens=128), RESIDUAL, RESIDUAL)
    with pytest.raises(KvtuneError, match="would rank only the pages of quantised tokens"):
        load_cache(whole(option), network)
    unpaged: tuple[Format, ...] = (Kitty(), Int4(group=32))
    form: Format
    for form in unpaged:
        with pytest.raises(KvtuneError, match="would find no pages to choose among"):
            load_cache(whole(Option(method, Budget(tokens=128), form, form)), network)
    ranked: tuple[Format, ...] = (Int4(), Kivi(group=64, residual=0))
    for form in ranked:
        load_cache(whole(Option(method, Budget(tokens=128), form, form)), network).close()
    menu = Menu((method, SnapKV()), (0.5,), ((RESIDUAL, RESIDUAL), (Int4(), Int4())))
    offered = {(x.method, x.keys) for x in menu.options()}
    assert (method, RESIDUAL) not in offered
    assert {(method, Int4()), (SnapKV(), RESIDUAL)} <= offered


def test_what_is_read_back_is_warned_of() -> None:
    """What layers share is, whichever its format."""
    read, shared = Option(Full(), ALL, Gear(), Gear()), Option(MiniCache(), ALL, Gear(), Gear())
    policy = Policy.uniform(read, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_formats(policy, HEAD_DIM, in_place=True)
    for slow, in_place in ((policy, False), (Policy.uniform(shared, 2, 2), True)):
        with pytest.warns(UserWarning, match="no kernel reads what these hold"):
            warn_of_slow_formats(slow, HEAD_DIM, in_place)


def test_without_triton_a_gpu_reads_nothing_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, reads in ((object(), True), (None, False)):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=found: found)
        assert backend_type("cuda").has_kernels == reads
    assert not backend_type("cpu").has_kernels
