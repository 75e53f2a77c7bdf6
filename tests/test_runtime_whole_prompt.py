"""Policies that need more than reading a prompt once: kept tokens as in live validation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.cake_layers import CakeLayers
from kvtune.policies.allocators.compresskv_layers import CompressKVLayers
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.kept import ask
from kvtune.policies.methods.cake import Cake
from kvtune.policies.methods.compresskv import CompressKV
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.hindsight import FutureAttention
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.cache import layer as layer_module
from kvtune.runtime.cache.answering import NAME
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.storing import store_prompts
from kvtune.runtime.prompts import fresh_prompt
from kvtune.tests.padded import ids
from kvtune.traces.calibration import Calibration, keep_calibration
from kvtune.traces.models import LoadedModel, wrap
from kvtune.traces.samples import Sample

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

BUDGET = Budget(tokens=20)
POLICIES = {
    name: Policy.uniform(Option(method, BUDGET), 3, 2, name=name, allocator=allocator)
    for name, method, allocator in (
        ("kvzip", KVzip(), None),
        ("kvzip, model-wide", KVzip(), ModelWide()),
        ("compresskv", CompressKV(voters=2), None),
        ("compresskv layers", CompressKV(), CompressKVLayers(least=8)),
        ("cake layers", Cake(window=4), CakeLayers(window=4)),
        ("h2o, model-wide", H2O(), ModelWide()),
        ("moments, model-wide", ExpectedAttention(), ModelWide()),
    )
}
MADE_UP = Calibration(
    tuple(tuple((3 * layer + head) % 5 / 5 for head in range(4)) for layer in range(3)),
    (0.5, 0.1, 0.3),
    "made up",
)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path))


@pytest.fixture
def loaded(make_network: Callable[..., Any], tiny_fields: dict[str, Any], tokenizer: Any) -> Any:
    """A model of the test's own: answering through a paged cache changes it."""
    from transformers import LlamaConfig

    found = wrap(make_network(LlamaConfig(**tiny_fields), tried=True), tokenizer, name="tiny")
    keep_calibration(found.fingerprint, MADE_UP)
    return found


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], list[list[int]]]:
    """Which tokens go into pages, by layer and sequence, as they do."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    original = store_prompts

    def spying(
        paged: PagedLayer,
        k: Tensor,
        v: Tensor,
        kept: list[Tensor],
        exact: list[int],
        rows: slice,
        *more: Any,
    ) -> None:
        for row, tokens in enumerate(kept, start=rows.start):
            found.setdefault((paged.number, row // 2), []).append(tokens.tolist())
        original(paged, k, v, kept, exact, rows, *more)

    monkeypatch.setattr(layer_module, "store_prompts", spying)
    return found


def validated(loaded: LoadedModel, policy: Policy, token_ids: list[int]) -> list[list[list[int]]]:
    """What live validation keeps of a prompt, by layer and head."""
    sample = Sample("one", "search", "prose", (*token_ids, 5), 6, 1, (-1,))
    prompt = fresh_prompt(loaded, sample, policy.needs)
    budgets = policy.settle(len(token_ids), prompt)
    kept = []
    for layer, options in enumerate(policy.heads):
        split = policy.split(layer, budgets[layer].tolist(), prompt(layer))
        kept.append([row.tolist() for row in ask([options], [split], prompt(layer)).tokens])
    return kept


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_kept_is_what_validation_keeps(
    loaded: LoadedModel, stored: dict[tuple[int, int], list[list[int]]], name: str
) -> None:
    policy, inputs = POLICIES[name], ids(90, 53)
    expected = [
        validated(loaded, policy, inputs["input_ids"][row, 90 - length :].tolist())
        for row, length in enumerate((90, 53))
    ]
    cache = load_cache(policy, loaded.model, tokenizer=loaded.tokenizer)
    stored.clear()  # of what the self-check has stored
    answer = loaded.model.generate(**inputs, max_new_tokens=6, past_key_values=cache)
    assert answer.shape[1] > 90
    for layer in range(3):
        assert [stored[layer, row] for row in range(2)] == [kept[layer] for kept in expected]
    assert sum(map(sum, cache.kept())) == 2 * 6 * 20
    assert not any(layer.waiting for layer in cache.layers)
    cache.pool.check_integrity()


def test_with_room_for_all_waiting_changes_nothing(loaded: LoadedModel) -> None:
    policy = Policy.uniform(Option(KVzip(), Budget(tokens=500)), 3, 2, allocator=ModelWide())
    asked = {"max_new_tokens": 12, "do_sample": False}
    expected = loaded.model.generate(**ids(70), **asked)
    before = loaded.model(**ids(70)).logits
    cache = load_cache(policy, loaded.model, tokenizer=loaded.tokenizer)
    torch.testing.assert_close(loaded.model(**ids(70), past_key_values=cache).logits, before)
    assert loaded.model.config._attn_implementation == NAME
    again = load_cache(policy, loaded.model, tokenizer=loaded.tokenizer)
    found = loaded.model.generate(**ids(70), **asked, past_key_values=again)
    assert torch.equal(found[:, :72], expected[:, :72])  # later, the bf16 of pages may tell


def test_a_model_never_measured_is_measured_once(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "empty"))
    policy = POLICIES["compresskv"]
    with pytest.raises(KvtuneError, match="not calibrated"):
        load_cache(policy, loaded.model)
    asked: list[str] = []

    def measured(found: LoadedModel, _: Any) -> Calibration:
        asked.append(found.fingerprint)
        found.model(torch.tensor([[5, 6]]), use_cache=False)  # which a paged model would refuse
        return MADE_UP

    monkeypatch.setattr("kvtune.runtime.calibrate.calibration_of", measured)
    load_cache(Policy.uniform(Option(), 3, 2), loaded.model)
    cache = load_cache(policy, loaded.model, tokenizer=loaded.tokenizer)
    assert asked == [loaded.fingerprint]
    assert cache.calibration == MADE_UP
    assert loaded.model.config._attn_implementation == NAME


def test_nothing_of_a_cache_that_is_gone_stays_on_the_model(loaded: LoadedModel) -> None:
    hooks = loaded.model.base_model._forward_hooks
    cache = load_cache(POLICIES["cake layers"], loaded.model)
    other = load_cache(POLICIES["cake layers"], loaded.model)
    assert len(hooks) == 2
    loaded.model(**ids(30), past_key_values=other)
    assert len(hooks) == 1
    assert other.page_bytes() > 0
    del cache
    gc.collect()
    assert not hooks


def test_what_cannot_be_served_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(KvtuneError, match="it is a bound"):
        load_cache(Policy.uniform(Option(FutureAttention(), BUDGET), 3, 2), loaded.model)
    with pytest.raises(KvtuneError, match="repeat its prompt"):
        load_cache(POLICIES["kvzip"], loaded.model)
    cache = load_cache(POLICIES["kvzip"], loaded.model, tokenizer=loaded.tokenizer)
    embedded = loaded.model.get_input_embeddings()(ids(30)["input_ids"])
    with pytest.raises(KvtuneError, match="embeddings"):
        loaded.model(inputs_embeds=embedded, past_key_values=cache)
