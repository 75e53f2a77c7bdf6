"""The transformers export, really run: on a tiny random Llama, without kvtune's own code."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtune.policies.apply import apply
from kvtune.policies.attention import attend, merge
from kvtune.policies.export.contract import write_export
from kvtune.policies.export.exporters.transformers import Transformers
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int3, Int4, Int8
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument
from kvtune.policies.signals import Signals
from kvtune.policies.testing import uniform

LAYERS, HEADS, GROUP, HEAD_DIM = 3, 2, 2, 8  # of the shared tiny model
FACTS = ModelFacts("tiny", LAYERS, HEADS, HEAD_DIM)
MIXED = (
    (Option(SnapKV(window=4), Budget(12), Int4(group=8), Int8()), Option()),
    (
        Option(StreamingLLM(), Budget(9), Fp8(), Fp8()),
        Option(H2O(), Budget(share=0.5), Bf16(), Int2()),
    ),
    (Option(Full(), Budget(7), Int4(exact_first=2), Int3(group=8)), Option(SnapKV(), Budget(20))),
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_fields: dict[str, Any], make_network: Callable[..., Any]) -> Any:
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**tiny_fields))


def exported(folder: Path, policy: Policy) -> ModuleType:
    """The export of a policy, imported from the folder it was written to."""
    made = Transformers().export(PolicyDocument(policy, FACTS), context_tokens=64)
    write_export(made, folder)
    spec = importlib.util.spec_from_file_location("kv_cache", folder / "kv_cache.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kv_cache(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The export of the mixed policy."""
    return exported(tmp_path_factory.mktemp("mixed"), Policy("mixed", MIXED))


def prompt(batch: int = 1, tokens: int = 40) -> Tensor:
    return torch.arange(batch * tokens).reshape(batch, tokens) * 37 % 250 + 2


def logits_after(model: Any, cache: Any, ids: Tensor, chunk: int = 1) -> Tensor:
    """Logits of the prompt and of eight more tokens, fed ``chunk`` at a time."""
    more = prompt(len(ids), 8) + 1
    with torch.no_grad():
        out = [model(ids, past_key_values=cache).logits]
        for start in range(0, 8, chunk):
            out.append(model(more[:, start : start + chunk], past_key_values=cache).logits)
    return torch.cat(out, 1)


def test_the_module_stands_alone(kv_cache: ModuleType) -> None:
    text = Path(str(kv_cache.__file__)).read_text()
    assert "import kvtune" not in text
    assert "from kvtune" not in text


def test_full_cache_gives_the_logits_of_a_dynamic_cache(tmp_path: Path, model: Any) -> None:
    from transformers import DynamicCache

    full = exported(tmp_path, Policy.uniform(Option(), LAYERS, HEADS))
    expected = logits_after(model, DynamicCache(config=model.config), prompt())
    full.apply(model)
    assert torch.equal(logits_after(model, full.build_cache(), prompt()), expected)


def test_generate_runs_and_every_head_keeps_its_budget(kv_cache: ModuleType, model: Any) -> None:
    kv_cache.apply(model)
    cache = kv_cache.build_cache()
    out = model.generate(
        prompt(), past_key_values=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    policy = Policy("mixed", MIXED)
    assert out.shape == (1, 46)
    assert kv_cache.prompt_lengths(cache) == policy.budgets(40).tolist()
    assert cache.get_seq_length() == 45
    assert [layer.keys.shape[-2] for layer in cache.layers] == [5, 5, 5]
    assert kv_cache.prompt_bytes(cache) == policy.footprint(40, HEAD_DIM)


def test_generate_equals_a_loop_by_hand(kv_cache: ModuleType, model: Any) -> None:
    kv_cache.apply(model)
    cache, token, loop = kv_cache.build_cache(), prompt(), []
    with torch.no_grad():
        for _ in range(6):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            loop.append(int(token))
    out = model.generate(
        prompt(), past_key_values=kv_cache.build_cache(),
        max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert out[0, 40:].tolist() == loop


def test_what_was_evicted_changes_the_answer(kv_cache: ModuleType, model: Any) -> None:
    from transformers import DynamicCache

    expected = logits_after(model, DynamicCache(config=model.config), prompt())
    kv_cache.apply(model)
    got = logits_after(model, kv_cache.build_cache(), prompt())
    assert torch.equal(got[:, :40], expected[:, :40]), "the prompt itself is answered in full"
    assert not torch.allclose(got[:, 40:], expected[:, 40:], atol=1e-3)


def test_tokens_may_follow_in_chunks(kv_cache: ModuleType, model: Any) -> None:
    kv_cache.apply(model)
    one, four = (logits_after(model, kv_cache.build_cache(), prompt(), n) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-4, atol=5e-5)


def test_a_batch_is_its_members(kv_cache: ModuleType, model: Any) -> None:
    kv_cache.apply(model)
    ids = prompt(batch=2)
    both = logits_after(model, kv_cache.build_cache(), ids)
    first = logits_after(model, kv_cache.build_cache(), ids[:1])
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-5)


def test_misuse_is_refused(kv_cache: ModuleType, model: Any) -> None:
    with pytest.raises(RuntimeError, match="apply"):
        logits_after(model, kv_cache.build_cache(), prompt())
    kv_cache.apply(model)
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[0, :5] = 0
    with pytest.raises(ValueError, match="padding"):
        model(prompt(2), attention_mask=padding, past_key_values=kv_cache.build_cache())
    policy = json.loads(Path(str(kv_cache.__file__)).with_name("kv_cache.json").read_text())
    with pytest.raises(ValueError, match="3, 2"):
        kv_cache.apply(model, policy | {"heads": policy["heads"][:2]})
    with pytest.raises(NotImplementedError):
        kv_cache.build_cache().crop(-1)


def test_without_a_cache_attention_is_the_plain_one(kv_cache: ModuleType, model: Any) -> None:
    expected = model(prompt(), use_cache=False).logits
    kv_cache.apply(model)
    assert torch.equal(model(prompt(), use_cache=False).logits, expected)


METHODS = (
    Full(), StreamingLLM(), StreamingLLM(sinks=1), H2O(), H2O(recent_share=0.2), SnapKV(),
    SnapKV(window=3, kernel=3, pooling="mean", recent=0), SnapKV(group="averaged"),
)  # fmt: skip
FORMS = (
    Bf16(), Fp8(), Int8(), Int4(group=8), Int3(group=16), Int2(exact_first=4), Int4(group=24),
    Int4(keys_by="token"), Int3(group=8, exact_first=2, keys_by="token"),
)  # fmt: skip
methods, forms = st.sampled_from(METHODS), st.sampled_from(FORMS)
budgets = st.sampled_from([ALL, Budget(0), Budget(1), Budget(13), Budget(500), Budget(share=0.3)])
options = st.builds(Option, methods, budgets, forms, forms)


def test_all_that_it_may_take_is_held_against_the_driver() -> None:
    """The module stands alone, so its choices and codes are its own: each is tried below."""
    limits = Transformers.limits
    assert {method.name for method in METHODS} == limits.methods
    assert {form.name for form in FORMS} == limits.key_formats == limits.value_formats


@settings(max_examples=80, deadline=None, derandomize=True)
@given(row=st.tuples(options, options), tokens=st.integers(1, 300), seed=st.integers(0, 99))
def test_it_keeps_reads_and_counts_as_kvtune_does(
    kv_cache: ModuleType, row: tuple[Option, ...], tokens: int, seed: int
) -> None:
    queries = uniform(seed, HEADS * GROUP, tokens, 16)
    keys, values = uniform(seed + 1, 2, HEADS, tokens, 16)
    policy = Policy("one layer", (row,))
    expected = apply(
        policy, 0, policy.budgets(tokens)[0].tolist(), Signals(queries, keys, values, 0.25)
    )
    facts = ModelFacts("one", 1, HEADS, 16)
    made = Transformers().export(PolicyDocument(policy, facts), context_tokens=64)
    cache = kv_cache.build_cache(json.loads(made.files["kv_cache.json"]))
    cache.update(keys[None], values[None], 0)
    cache.layers[0].compress(queries[None], 0.25)
    assert kv_cache.prompt_lengths(cache) == [expected.counts.tolist()]
    assert kv_cache.prompt_bytes(cache) == sum(expected.footprint_bytes) + 4 * HEADS
    for head, (stored_keys, stored_values) in enumerate(cache.layers[0].stored):
        count = int(expected.counts[head])
        torch.testing.assert_close(stored_keys.read()[0], expected.keys[head, :count])
        torch.testing.assert_close(stored_values.read()[0], expected.values[head, :count])

    new = uniform(seed + 2, 3, HEADS * GROUP, 1, 16)
    full_keys, full_values = cache.update(new[1, None, :HEADS], new[2, None, :HEADS], 0)
    stub = SimpleNamespace(num_key_value_groups=GROUP, is_causal=True, training=False)
    output, _ = kv_cache.attention(stub, new[0][None], full_keys, full_values, None, scaling=0.25)
    longest = expected.keys.shape[1]
    visible = (torch.arange(longest) < expected.counts[:, None])[:, None]
    query = new[0].reshape(HEADS, GROUP, 16)
    before = attend(query, expected.keys, expected.values, visible, 0.25)
    recent = attend(query, new[1, :HEADS], new[2, :HEADS], torch.ones(1, 1).bool(), 0.25)
    merged = merge(before, recent).reshape(1, 1, HEADS * GROUP, 16)
    torch.testing.assert_close(output, merged, rtol=1e-4, atol=1e-5)
