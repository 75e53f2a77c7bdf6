"""Storing prompts: little to launch, nothing to wait for, and the same for one as for many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.method import Method
from kvtune.policies.methods.ems import EMSReconstruction
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.keyformer import Keyformer
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import SLAB_CELLS
from kvtune.runtime import load_cache
from kvtune.runtime.cache import foreseen, paged_layer, reading, storing
from kvtune.runtime.cache.layer import CacheLayer
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.segments import CODED, SETTLED
from kvtune.runtime.cache.storing import store_prompts
from kvtune.traces import seam

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

LAYERS = 3
UNCOMPRESSED = Policy.uniform(Option(), LAYERS, 2, name="uncompressed")
PLAN = Policy(
    "plan",
    (
        (
            Option(SnapKV(window=4), Budget(tokens=20), Fp8(), Int2()),
            Option(Full(), ALL, Int4(exact_first=4), Int4(exact_first=4)),
        ),
    )
    * LAYERS,
)


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**tiny_fields), tried=True).bfloat16().eval()


def prompts(batch: int) -> Tensor:
    return torch.randint(2, 250, (batch, 90), generator=torch.Generator().manual_seed(1))


class Counting(TorchDispatchMode):
    """What is asked of torch, of the backend, and of the way to the device, inside ``prompt``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.told: Counter[str] = Counter()
        original = CacheLayer.prompt

        def counted(*args: Any) -> Any:
            with self:
                return original(*args)

        patch.setattr(CacheLayer, "prompt", counted)
        patch.setattr(PlainBackend, "write", lambda *_: self.told.update(["writes"]))
        for owner, name, what in (
            (paged_layer, "sent", "copies"), (storing, "sent", "copies"),
            (torch, "tensor", "copies"),
            (torch, "as_tensor", "copies"), (torch.Tensor, "tolist", "waits"),
            (torch.Tensor, "cpu", "waits"),
        ):  # fmt: skip
            patch.setattr(owner, name, self._telling(getattr(owner, name), what))

    def _telling(self, call: Any, what: str) -> Any:
        def told(*args: Any, **kwargs: Any) -> Any:
            self.told[what] += 1
            return call(*args, **kwargs)

        return told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = func is torch.ops.aten._local_scalar_dense.default
        self.told["waits" if waits else "operations"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "most"), [(UNCOMPRESSED, 3), (PLAN, 3)])
def test_a_sequence_more_asks_for_few_operations_and_no_wait(
    network: Any, policy: Policy, most: int
) -> None:
    counts = []
    for batch in (4, 12):
        cache = load_cache(policy, network)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            counting = Counting(patch)
            network(prompts(batch), past_key_values=cache)
            counts.append(counting.told)
    few, many = counts
    assert 0 < many["operations"] - few["operations"] <= most * 8 * LAYERS
    assert few["waits"] == many["waits"] == 1  # at the end: whether all that was read is finite
    assert few["copies"] == many["copies"] == 3 * LAYERS
    assert few["writes"] == many["writes"] <= 3 * LAYERS


def test_a_prompt_is_read_without_the_attention_that_is_planned_for_every_length(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = []
    answer, cache = seam.causal_attention, load_cache(PLAN, network)

    def noted(*args: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return answer(*args)

    monkeypatch.setattr(seam, "causal_attention", noted)
    with torch.no_grad():
        network(prompts(2), past_key_values=cache)
    assert allowed == [False] * LAYERS


@pytest.mark.parametrize(
    "method", [SnapKV(window=4), H2O(), Tova(), Keyformer(), EMSReconstruction()]
)
def test_prompts_are_asked_together_as_if_each_were_alone(
    network: Any, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different lengths, and by methods that may be asked together or not."""
    policy = Policy.uniform(Option(method, Budget(tokens=20), Int4(), Int4()), LAYERS, 2)
    mask = torch.arange(90) >= torch.tensor(
        [[0], [0], [40], [40], [89]]
    )  # the last one has one token
    pages = []
    for most in (reading.ASKED_AT_ONCE, 1):
        monkeypatch.setattr(reading, "ASKED_AT_ONCE", most)
        cache = load_cache(policy, network)
        with torch.no_grad():
            network(prompts(5), attention_mask=mask.long(), past_key_values=cache)
        pages.append(cache.pool.memory.clone())
    assert pages[0].any()
    assert torch.equal(*pages)


def test_one_prompt_stands_for_all_as_if_each_had_its_own() -> None:
    options = [
        Option(Full(), ALL, Fp8(), Fp8()),
        Option(Full(), ALL, Int4(exact_first=4), Int4(exact_first=4)),
        Option(Full(), ALL, Fp8(), Fp8()),
    ]
    keys, values = torch.randn(2, 3, 100, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = [torch.arange(0, 100, 3), torch.arange(90), torch.arange(0)]
    layers = []
    for times in (1, 4):
        layer = PagedLayer(0, options, 16, 4, Pool(60 * SLAB_CELLS, 64, "cpu"), PlainBackend())
        each = keys.repeat(times, 1, 1), values.repeat(times, 1, 1)
        store_prompts(layer, *each, kept * times)
        layers.append(layer)
    assert torch.equal(*(layer.pool.memory for layer in layers))
    assert torch.equal(*(layer.fp8_scales for layer in layers))
    assert layers[0].kept == layers[1].kept == [34, 90, 0] * 4
    scales = layers[0].fp8_scales.view(3, 4, 3, 2)
    largest = torch.stack([x[0, ::3].abs().amax().float() / 448 for x in (keys, values)])
    for kind in (CODED, SETTLED):
        assert torch.equal(scales[kind, :, 0], largest.expand(4, 2))
        assert (scales[kind, :, 2] == 1).all()  # nothing was kept to be measured by


def test_a_pool_that_is_full_grows_while_prompts_are_read(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made too small here: one that is not reckons with all that is kept and generated."""
    ids = prompts(12).repeat(1, 3)[:, :256]
    with torch.no_grad():
        expected = network.generate(
            ids, max_new_tokens=3, past_key_values=load_cache(UNCOMPRESSED, network)
        )
        monkeypatch.setattr(foreseen, "pool_cells", lambda _: 24 * SLAB_CELLS)
        extended, extend = [], Pool.extend

        def watched(pool: Pool, cells: int) -> None:
            extended.append(cells)
            extend(pool, cells)

        monkeypatch.setattr(Pool, "extend", watched)
        cache = load_cache(UNCOMPRESSED, network)
        assert torch.equal(network.generate(ids, max_new_tokens=3, past_key_values=cache), expected)
    assert extended
    cache.pool.check_integrity()


@pytest.mark.parametrize(("projection", "row", "where"), [("k", 9, 1), ("v", 3, 0), ("v", 15, 1)])
def test_the_first_layer_and_head_that_is_not_finite_is_named(
    network: Any, projection: str, row: int, where: int
) -> None:
    with torch.no_grad():
        attention = network.model.layers[1].self_attn
        getattr(attention, f"{projection}_proj").weight[row] = torch.inf
    cache = load_cache(PLAN, network)
    with pytest.raises(KvtuneError, match=f"layer 1, KV head {where}: "):
        network(prompts(3), past_key_values=cache)
    with pytest.raises(RuntimeError, match="no prompt yet"):
        network(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)


def test_one_sequence_that_is_not_finite_is_enough(network: Any) -> None:
    tokens = prompts(3)
    tokens[:, 7] = torch.tensor([5, 6, 251])
    with torch.no_grad():
        network.model.embed_tokens.weight[251] = torch.nan
    with pytest.raises(KvtuneError, match="layer 0, KV head 0: "):
        network(tokens, past_key_values=load_cache(UNCOMPRESSED, network))
