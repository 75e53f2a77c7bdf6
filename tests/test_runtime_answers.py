"""A model is answered as it answers by itself, or refused; then it is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DiffLlamaConfig,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.graph import generate
from kvtune.tests.padded import ids
from kvtune.traces import self_check
from kvtune.traces.models import wrap

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FULL = Policy.uniform(Option(), 3, 2)
PLAN = Policy.uniform(Option(SnapKV(window=4), Budget(tokens=12), Int4(), Int4()), 3, 2)
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    return make_network(LlamaConfig(**tiny_fields), tried=True)


@torch.no_grad()
def conversation(network: Any, cache: Any) -> Tensor:
    """Logits of two prompts, a token after each, and then six at once ``[2 * (1 + 1 + 6), V]``."""
    inputs, found = ids(40, 25), list[Tensor]()
    mask = inputs["attention_mask"]
    for given in (inputs["input_ids"], torch.tensor([[5], [6]]), torch.arange(12).view(2, 6) + 9):
        mask = torch.cat([mask, torch.ones(2, len(found) and given.shape[1], dtype=torch.long)], 1)
        at = (mask.cumsum(1) - 1).clamp_min(0)[:, -given.shape[1] :]
        asked = {"input_ids": given, "attention_mask": mask, "position_ids": at}
        logits = network(**asked, past_key_values=cache, use_cache=True).logits
        found.append(logits if found else logits[:, -1:])
    return torch.cat(found, 1).flatten(0, 1)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (LlamaConfig, {}),
        (MistralConfig, {"sliding_window": 16}),
        (Gemma3TextConfig, {**SLIDING, "query_pre_attn_scalar": 8}),
        (GPTNeoXConfig, {"num_key_value_heads": 4}),
        (GPT2Config, {"num_key_value_heads": 4}),
    ],
)
def test_prompts_and_two_turns_are_answered_as_the_model_does(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], kind: Any, fields: Any
) -> None:
    network = make_network(kind(**{**tiny_fields, "initializer_range": 0.1, **fields}))
    expected = conversation(network, DynamicCache(config=network.config))
    heads = fields.get("num_key_value_heads", 2)
    with load_cache(Policy.uniform(Option(), 3, heads), network) as cache:
        found = conversation(network, cache)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.std())


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        (
            Llama4TextConfig,
            {"attention_chunk_size": 8192, "num_local_experts": 2, "intermediate_size_mlp": 48},
            "neither causal nor a sliding window",
        ),
        (DiffLlamaConfig, {}, "would answer wrongly.* layer 0"),
        (Lfm2Config, {"layer_types": ["conv", "full_attention", "conv"]}, "1 of 3 layers"),
        (GPT2Config, {}, "4 key heads of 8"),
    ],
)
def test_models_that_would_be_answered_wrongly_are_refused_and_left_as_they_were(
    make_network: Callable[..., Any],
    tiny_fields: dict[str, Any],
    kind: type[PretrainedConfig],
    fields: Any,
    told: str,
) -> None:
    network = make_network(kind(**{**tiny_fields, **fields}))
    before = network.config._attn_implementation
    with pytest.raises(KvtuneError, match=told):
        load_cache(FULL, network)
    assert network.config._attn_implementation == before
    with pytest.raises(KvtuneError):
        wrap(network, None, name="random")


def test_an_encoder_is_refused() -> None:
    shape = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 48}
    with pytest.raises(KvtuneError, match="encoder"):
        load_cache(FULL, T5ForConditionalGeneration(T5Config(**shape, vocab_size=99)))


def doubled(attention: Any) -> Callable[..., Any]:
    """The attention, run twice."""
    original = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        attention_once = original(*args, **kwargs)
        return original(*args, **kwargs) if attention.layer_idx == 1 else attention_once

    return forward


def rescaled(attention: Any) -> Callable[..., Any]:
    """The attention, whose scores are scaled where the seam's caller cannot see it."""
    original = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output, weights = original(*args, **kwargs)
        if attention.config._attn_implementation == "eager":
            output = output * 1.01
        return output, weights

    return forward


@pytest.mark.parametrize("mend", [doubled, rescaled])
def test_a_layer_that_does_otherwise_is_found(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], mend: Any
) -> None:
    load_cache(FULL, make_network(LlamaConfig(**tiny_fields))).close()  # another's is not its own
    network = make_network(LlamaConfig(**tiny_fields))
    attention = network.model.layers[1].self_attn
    attention.forward = mend(attention)
    with pytest.raises(KvtuneError):
        load_cache(FULL, network)


def test_a_model_is_tried_once(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(LlamaConfig(**tiny_fields))
    load_cache(FULL, network)
    monkeypatch.setattr(self_check, "_compare", lambda *_: pytest.fail("tried again"))
    load_cache(PLAN, network)


def masked(*gaps: slice, width: int = 30) -> Tensor:
    mask = torch.ones(2, width, dtype=torch.long)
    for gap in gaps:
        mask[1, gap] = 0
    return mask


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (masked(slice(20, None)), "row 1 .* padded on the left"),
        (masked(slice(5, 9)), "row 1 .* padded on the left"),
        (masked(slice(0, 3), slice(9, 12)), "row 1 .* padded on the left"),
        (masked(slice(None)), "row 1 .* no token"),
        (masked(width=29), "shape"),
        (masked(width=31), "shape"),
        (masked()[:1], "shape"),
        (torch.ones(2, 1, 30, 30).tril(), "4 dimensions"),
        (torch.zeros(2, 30), "no token"),  # what is added to scores is not what is asked for
    ],
)
@pytest.mark.parametrize("kind", [torch.long, torch.float, torch.bool])
def test_padding_that_is_not_on_the_left_is_refused(
    network: Any, mask: Tensor, told: str, kind: torch.dtype
) -> None:
    with load_cache(FULL, network) as cache, pytest.raises(KvtuneError, match=told):
        network(ids(30, 30)["input_ids"], attention_mask=mask.to(kind), past_key_values=cache)


@pytest.mark.parametrize("kind", [torch.long, torch.float, torch.bool])
def test_left_padding_of_any_kind_of_number_is_the_same(network: Any, kind: torch.dtype) -> None:
    inputs = ids(30, 12)
    inputs["attention_mask"] = inputs["attention_mask"].to(kind)
    expected = network(**inputs).logits[:, -1]
    with load_cache(FULL, network) as cache:
        found = network(**inputs, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_later_mask_must_continue_the_first(network: Any) -> None:
    inputs, then = ids(30, 12), torch.tensor([[5], [6]])
    with load_cache(FULL, network) as cache:
        network(**inputs, past_key_values=cache)
        with pytest.raises(KvtuneError, match="pads other tokens"):
            network(then, attention_mask=masked(slice(0, 3), width=31), past_key_values=cache)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_the_model_answers_as_before_when_the_block_ends(network: Any, before: str) -> None:
    network.set_attn_implementation(before)
    expected = network(**ids(20)).logits
    with load_cache(PLAN, network) as cache:
        network(**ids(20), past_key_values=cache)
    assert network.config._attn_implementation == before
    assert torch.equal(network(**ids(20)).logits, expected)
    with pytest.raises(KvtuneError, match="no longer answers"):
        network(torch.tensor([[5]]), past_key_values=cache)
    cache.close()


def test_a_cache_that_was_never_closed_does_not_keep_the_model(network: Any) -> None:
    before = network.config._attn_implementation
    load_cache(PLAN, network)
    load_cache(PLAN, network).close()
    assert network.config._attn_implementation == before


def test_generate_takes_a_second_turn_into_the_same_cache(network: Any) -> None:
    first = ids(40)["input_ids"]
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with load_cache(PLAN, network) as cache:
        told = network.generate(first, past_key_values=cache, **asked)
        more = torch.cat([told, torch.tensor([[7, 8, 9, 10, 11]])], 1)
        again = network.generate(more, past_key_values=cache, **asked)
        assert again.shape == (1, 40 + 4 + 5 + 4)
        assert set(cache.kept()[0]) == {12}  # of the prompt; all that followed is in 16 bits
        assert cache.layers[0].paged.lengths[1].tolist() == [4 + 5 + 3] * 2
        with pytest.raises(KvtuneError, match="has read its prompts"):
            generate(network, cache, first, new_tokens=3)


def test_a_turn_at_once_is_the_turn_token_by_token(network: Any) -> None:
    turn, answers = torch.tensor([[7, 8, 9, 10, 11]]), []
    for parts in (turn.split(5, 1), turn.split(1, 1)):
        with load_cache(PLAN, network) as cache, torch.no_grad():
            network(**ids(40), past_key_values=cache)
            logits = [network(part, past_key_values=cache).logits for part in parts]
        answers.append(torch.cat(logits, 1))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
