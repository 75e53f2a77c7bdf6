"""A model's shape from its Hugging Face ``config.json``: plain JSON, nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.profiles.shape import (
    Biases,
    Experts,
    LatentAttention,
    ModelShape,
    alternating_windows,
)

# What the configuration classes assume where the file says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gpt_oss": {"sliding_window_pattern": 2, "attention_bias": True},
}
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text")
_QUERY_KEY_NORM = ("qwen3", "qwen3_moe", "gemma3_text")
_FOUR_NORMS = ("gemma2", "gemma3_text")
_UNSUPPORTED = ("mamba", "mamba2", "rwkv", "bert", "t5", "whisper", "falcon_mamba")


def shape_from_config(path: Path | str) -> ModelShape:
    """The shape that a ``config.json`` (or the folder that holds it) describes.

    Parameters are counted for Llama-like decoders, Qwen2/3 and their mixtures, Gemma 2/3, Phi-3/4,
    Mistral/Mixtral, DeepSeek-V2/V3 and gpt-oss; other decoders with the same keys count as Llama.

    Raises:
        KvtuneError: no such file, no JSON, a key is missing or no whole number.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    config = _Config(_read(file), str(file))
    return _shape(config, file.resolve().parent.name.lower() or "model")


class _Config:
    """The keys of one configuration, with defaults of its type and errors that name the file."""

    def __init__(self, raw: Mapping[str, Any], file: str) -> None:
        inner = raw.get("text_config")
        text = {**raw, **inner} if isinstance(inner, Mapping) else dict(raw)
        self.kind = str(text.get("model_type", ""))
        self.file = file
        given = {key: value for key, value in text.items() if value is not None}
        self.values: dict[str, Any] = {**_DEFAULTS.get(self.kind, {}), **given}
        if self.kind in _UNSUPPORTED:
            raise KvtuneError(f"{self.kind!r} models have no KV cache to tune", where=file)

    def count(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number; ``default`` where the key is absent."""
        value = self.values.get(key, default)
        if value is None:
            raise KvtuneError(
                f"the key {key!r} is missing", where=self.file, hint="is it a decoder's config?"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise KvtuneError(
                f"{key!r} must be a whole number of at least {minimum}, not {value!r}",
                where=self.file,
            )
        return value

    def has(self, key: str) -> bool:
        """Whether the key says something."""
        return key in self.values

    def flag(self, key: str, default: bool = False) -> bool:
        """A switch."""
        return bool(self.values.get(key, default))


def _read(file: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise KvtuneError(
            f"cannot read it: {error.strerror}", where=str(file), hint="a config.json is wanted."
        ) from error
    except ValueError as error:
        raise KvtuneError(f"this is no valid JSON: {error}", where=str(file)) from error
    if not isinstance(raw, Mapping):
        raise KvtuneError("a model's configuration is a JSON object", where=str(file))
    return raw


def _shape(config: _Config, name: str) -> ModelShape:
    heads = config.count("num_attention_heads")
    hidden = config.count("hidden_size")
    layers = config.count("num_hidden_layers")
    return ModelShape(
        name=name,
        layers=layers,
        query_heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=config.count("head_dim", max(1, hidden // heads)),
        hidden_size=hidden,
        intermediate_size=config.count("intermediate_size"),
        vocab_size=config.count("vocab_size"),
        max_context=config.count("max_position_embeddings"),
        tied_embeddings=config.flag("tie_word_embeddings", config.kind in _TIED_BY_DEFAULT),
        windows=_windows(config, layers),
        latent=_latent(config),
        experts=_experts(config, layers),
        biases=_biases(config),
        query_key_norm=config.kind in _QUERY_KEY_NORM,
        norms_per_layer=4 if config.kind in _FOUR_NORMS else 2,
        sinks=config.kind == "gpt_oss",
        source=config.file,
    )


def _kv_heads(config: _Config, heads: int) -> int:
    kv_heads = config.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise KvtuneError(
            f"'num_key_value_heads' ({kv_heads}) must divide 'num_attention_heads' ({heads})",
            where=config.file,
        )
    return kv_heads


def _biases(config: _Config) -> Biases:
    if config.kind in ("qwen2", "qwen2_moe"):
        return "qkv"
    return "all" if config.flag("attention_bias") else "none"


def _windows(config: _Config, layers: int) -> tuple[int | None, ...]:
    """A layer's window: listed types first, then a pattern, then one window for all or some."""
    window = config.count("sliding_window", 0, minimum=0) or None
    types = config.values.get("layer_types")
    if isinstance(types, list):
        if len(types) != layers:
            raise KvtuneError(
                f"'layer_types' has {len(types)} entries for {layers} layers", where=config.file
            )
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if config.kind in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        if not config.flag("use_sliding_window"):
            return (None,) * layers
        first = config.count("max_window_layers", layers, minimum=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    if config.has("sliding_window_pattern"):
        return alternating_windows(layers, window, config.count("sliding_window_pattern"))
    return alternating_windows(layers, window, None)


def _latent(config: _Config) -> LatentAttention | None:
    if not config.has("kv_lora_rank"):
        return None
    return LatentAttention(
        kv_lora_rank=config.count("kv_lora_rank"),
        rope_dim=config.count("qk_rope_head_dim"),
        nope_dim=config.count("qk_nope_head_dim"),
        value_dim=config.count("v_head_dim"),
        query_lora_rank=config.count("q_lora_rank") if config.has("q_lora_rank") else None,
    )


def _experts(config: _Config, layers: int) -> Experts | None:
    """Experts under the three names that configurations use for their number."""
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    key = next((name for name in names if config.has(name)), None)
    if key is None:
        return None
    width = config.count("moe_intermediate_size", config.count("intermediate_size"))
    shared = config.count("n_shared_experts", 0, minimum=0) * width
    return Experts(
        count=config.count(key),
        active=config.count("num_experts_per_tok"),
        intermediate_size=width,
        shared_size=config.count("shared_expert_intermediate_size", shared, minimum=0),
        dense_layers=min(layers, config.count("first_k_dense_replace", 0, minimum=0)),
        biases=config.kind == "gpt_oss",
        score_correction=config.kind == "deepseek_v3",
        shared_gate=config.kind == "qwen2_moe",
    )
