"""What each layer of a transformers model caches, seen in the cache that four tokens fill."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import replace
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.profiles.class_values import first_of
from kvtune.profiles.layer_cache import LatentAttention, LayerCache


def layers_of(model: Any, text: Any, file: str) -> tuple[LayerCache, ...]:
    """What each layer caches, seen in the cache that four tokens fill.

    Of a model with towers that cannot run so, the text model alone is asked.
    """
    import transformers

    found = _filled(model, file)
    if found is None and text is not model.config:
        with contextlib.suppress(Exception):  # no class for the text alone
            alone = transformers.AutoModelForCausalLM.from_config(text).bfloat16().eval()
            found = _filled(alone, file)
    if found is None:
        raise KvtuneError(
            f"what {text.model_type} caches cannot be told without its weights", where=file,
            hint="an encoder caches nothing; a decoder with a cache of its own is not counted.",
        )  # fmt: skip
    each = _recurrent_bytes(text)
    return tuple(
        replace(layer, recurrent_bytes=each) if layer.recurrent_elements else layer
        for layer in found
    )


def _recurrent_bytes(text: Any) -> int:
    """Bytes of a recurrent number in engines that serve the model.

    Configurations name it; without a name it is float32 in Nemotron-H and in Kimi's delta
    attention, and as wide as the model's other numbers elsewhere.
    """
    name = next(
        (found for key in ("mamba_ssm_dtype", "mamba_ssm_cache_dtype")
         if (found := getattr(text, key, None))), None,
    )  # fmt: skip
    if name is None:
        return 4 if text.model_type in ("nemotron_h", "kimi_linear") else 2
    return 4 if "32" in str(name) else 2


def _filled(model: Any, file: str) -> tuple[LayerCache, ...] | None:
    """The layers of the cache that four tokens fill; None where the model cannot run so."""
    cache = filled_cache(model, 4)
    return None if cache is None else tuple(_layer(entry, file) for entry in cache.layers)


def filled_cache(model: Any, tokens: int) -> Any:
    """The cache that so many tokens fill; None where the model cannot run so."""
    import torch

    ids = torch.zeros(1, tokens, dtype=torch.long)
    for stand_in in (None, *_stand_ins()):
        if stand_in is not None:
            _replace_feed_forward(model, stand_in)
        try:
            out = model(input_ids=ids, use_cache=True)
        except Exception:  # noqa: S112 - experts' routing needs values, which the meta device lacks
            continue
        names = ("cache", "past_key_values", "cache_params")
        cache = next((c for name in names if (c := out.get(name)) is not None), None)
        if cache is not None and hasattr(cache, "layers"):
            return cache
    return None


def _stand_ins() -> tuple[Any, Any]:
    """Feed-forward blocks that hand their input on, alone and with router logits."""
    import torch

    class Alone(torch.nn.Module):
        def forward(self, hidden: Any, *_: Any, **__: Any) -> Any:
            return hidden

    class WithLogits(torch.nn.Module):
        def forward(self, hidden: Any, *_: Any, **__: Any) -> Any:
            return hidden, None

    return Alone, WithLogits


_FEED_FORWARD = re.compile(
    r"(MLP|Mlp|MoE|Moe|MOE|FFN|FeedForward|Experts|Mo[eE]Block|Alone|WithLogits)$"
)
_MIXES_TOKENS = re.compile(r"Attention|Mamba|Mixer|Conv|Delta|Layer|Block$")


def _replace_feed_forward(model: Any, stand_in: Any) -> None:
    """Put a stand-in where a whole feed-forward block of a decoder layer stands."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            inside = {type(part).__name__ for part in child.modules()} - {kind}
            if _FEED_FORWARD.search(kind) and not any(map(_MIXES_TOKENS.search, inside)):
                setattr(module, name, stand_in())


def _layer(entry: Any, file: str) -> LayerCache:
    import torch

    compressed = getattr(entry, "compressed_kv", None)
    if type(entry).__module__ != _COUNTED and compressed is None:
        raise KvtuneError(
            f"what a {type(entry).__name__} keeps beside keys and values is not counted", where=file
        )
    keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
    state = _state_parts(entry)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
        return LayerCache(**state)
    index = getattr(entry, "indexer_keys", None)
    window = getattr(entry, "sliding_window", None)
    return LayerCache(
        kv_heads=keys.shape[1],
        key_dim=keys.shape[-1],
        value_dim=0 if values is keys else values.shape[-1],
        window=int(window) if window else None,
        **state,
        index_dim=index.shape[-1] if isinstance(index, torch.Tensor) else 0,
        compress_rate=entry.compress_rate if compressed else 0,
        compressed_dim=_compressed_dim(entry) if compressed else 0,
    )


def _state_parts(entry: Any) -> dict[str, int]:
    """Bytes of a layer's states, with the channels of its convolutions and its recurrent numbers.

    Convolutions of different widths in one layer leave the parts unknown.
    """
    inputs, recurrent = (_tensors(entry, name) for name in ("conv_states", "recurrent_states"))
    size = sum(math.prod(s.shape[1:]) * s.element_size() for s in (*inputs, *recurrent))
    widths = {state.shape[-1] for state in inputs}
    if len(widths) != 1:
        return {"state_bytes": size}
    return {
        "state_bytes": size,
        "conv_channels": sum(math.prod(state.shape[1:-1]) for state in inputs),
        "conv_width": widths.pop(),
        "recurrent_elements": sum(math.prod(state.shape[1:]) for state in recurrent),
    }


def _tensors(entry: Any, name: str) -> list[Any]:
    import torch

    held = (getattr(entry, name, None) or {}).values()
    return [state for state in held if isinstance(state, torch.Tensor)]


_COUNTED = "transformers.cache_utils"  # whose layers have nothing but what is read here


def _compressed_dim(entry: Any) -> int:
    """Numbers of a compressed entry; where four tokens make none, as wide as what waits for it."""
    made, waiting = entry.compressed_kv, entry.buffer_kv
    return sum(
        (waiting[name] if entries is None else entries).shape[-1] for name, entries in made.items()
    )


def latent_of(text: Any, layers: tuple[LayerCache, ...]) -> LatentAttention | None:
    """The widths of multi-head latent attention, where a layer caches its latent."""
    rank = first_of(text, ("kv_lora_rank",))
    if not rank or not any(layer.key_dim == rank for layer in layers):
        return None
    return LatentAttention(
        kv_lora_rank=rank,
        rope_dim=first_of(text, ("qk_rope_head_dim",)),
        nope_dim=first_of(text, ("qk_nope_head_dim",)),
        value_dim=first_of(text, ("v_head_dim",)),
        query_lora_rank=first_of(text, ("q_lora_rank",)) or None,
    )
