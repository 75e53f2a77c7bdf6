"""The attention seam: the same numbers as transformers' own attention, and a handler's rights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from kvtune.common.errors import KvtuneError
from kvtune.traces import seam
from kvtune.traces.signals import column_sums

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOWS: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama3-rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, {**WINDOWS, "use_sliding_window": True}),
    "qwen3": (Qwen3Config, {}),
    "gemma3": (Gemma3TextConfig, {**WINDOWS, "query_pre_attn_scalar": 8}),
}


@pytest.fixture
def seamed(tiny_fields: dict[str, Any], make_network: Callable[..., Any]) -> Callable[[str], Any]:
    """A function that makes a random network of a named configuration, on the seam."""

    def make(name: str) -> Any:
        seam.register()
        config, fields = CONFIGS[name]
        network = make_network(config(**tiny_fields, **fields))
        network.set_attn_implementation(seam.NAME)
        return network

    return make


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 258, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_through_the_seam_gives_what_transformers_sdpa_gives(
    seamed: Callable[[str], Any], name: str
) -> None:
    model = seamed(name)
    ids = random_tokens(40)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation(seam.NAME)
        found = model(ids, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and attention of the last T positions, with all scores in one tensor."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    at = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    key = torch.arange(k.shape[2])[None]
    seen = (key <= at) & (key > at - (window or k.shape[2]))
    mass = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf")).softmax(-1)
    return mass @ v, mass


@pytest.mark.parametrize("window", [None, 1, 5, 30, 100])
@pytest.mark.parametrize(("queries", "keys"), [(30, 30), (7, 30), (1, 30), (1, 1)])
def test_causal_attention_is_softmax_over_the_keys_in_reach(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, window: int | None
) -> None:
    monkeypatch.setattr(seam, "_TILE_QUERIES", 4)
    draw = torch.Generator().manual_seed(queries)
    q = torch.randn(1, 4, queries, 8, generator=draw)
    k, v = torch.randn(2, 1, 2, keys, 8, generator=draw)
    for answer in (seam.causal_attention, seam.prompt_attention):
        found = answer(q, k, v, 0.3, window)
        torch.testing.assert_close(found, naive(q, k, v, 0.3, window)[0])


def test_prompts_are_read_without_the_attention_that_plans_every_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed: list[bool] = []
    monkeypatch.setattr(
        seam, "_sdpa", lambda *_, **__: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    x = torch.zeros(1, 2, 3, 8)
    seam.prompt_attention(x, x, x, 1.0)
    seam.prompt_attention(x, x, x, 1.0, window=3)
    assert allowed == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tile_bytes", [1, 3000, 2**26])
def test_column_sums_in_tiles_are_the_sums_of_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, tile_bytes: int, window: int | None
) -> None:
    monkeypatch.setattr("kvtune.traces.signals._TILE_BYTES", tile_bytes)
    draw = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 4, 30, 8, generator=draw), torch.randn(1, 2, 30, 8, generator=draw)
    found = column_sums(q[0], k[0], 0.4, window)
    torch.testing.assert_close(found, naive(q, k, k, 0.4, window)[1][0].sum(1))


def test_a_handler_answers_every_layer_once_in_order_and_no_longer_than_its_block(
    seamed: Callable[[str], Any],
) -> None:
    model = seamed("gemma3")
    calls: list[tuple[int, float, int | None]] = []

    def handler(
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        calls.append((layer, scale, window))
        return torch.zeros_like(q)

    with torch.no_grad():
        before = model(random_tokens(9), use_cache=False).logits
        with seam.attending(handler):
            silenced = model(random_tokens(9), use_cache=False).logits
        after = model(random_tokens(9), use_cache=False).logits
    assert calls == [(0, 8**-0.5, 8), (1, 8**-0.5, 8), (2, 8**-0.5, None)]
    assert not torch.allclose(before, silenced)
    assert torch.equal(before, after)


def test_a_handler_that_fails_is_removed() -> None:
    with pytest.raises(RuntimeError), seam.attending(lambda *_: pytest.fail("not called")):
        raise RuntimeError
    assert seam._handler.get() is None


def test_no_mask_of_n_by_n_is_built(tiny_model: Any) -> None:
    masks: list[object] = []

    def spy(_: object, args: object, kwargs: dict[str, object]) -> None:
        masks.append(kwargs.get("attention_mask"))

    attention = tiny_model.model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        with torch.no_grad():
            tiny_model.model(random_tokens(9), use_cache=False)
    finally:
        hook.remove()
    assert masks == [None]


def test_padding_is_refused(tiny_model: Any) -> None:
    padded = torch.tensor([[0, 1, 1]])
    with pytest.raises(KvtuneError, match="gaps"):
        tiny_model.model(random_tokens(3), attention_mask=padded, use_cache=False)


def test_attention_with_a_softcap_is_refused(
    tiny_fields: dict[str, Any], make_network: Callable[..., Any]
) -> None:
    seam.register()
    model = make_network(Gemma2Config(**tiny_fields))
    model.set_attn_implementation(seam.NAME)
    with pytest.raises(KvtuneError, match="softcap"):
        model(random_tokens(3), use_cache=False)
