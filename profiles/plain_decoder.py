"""Shapes of plain decoders without their class: Llama, Mistral, Qwen2 and Qwen3 as published.

Loading transformers takes seconds, and what most people have are these four. Any key or value that
is not known to leave parameters and cache alone means that the class is asked instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtune.profiles.shape import Biases, ModelShape

_WIDTHS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip
# Keys that say nothing of parameters and cache, whatever they hold.
_OTHERS = frozenset((
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "initializer_range", "max_window_layers", "pretraining_tp", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "hidden_act", "id2label", "label2id", "torchscript",
))  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """What differs between the classes.

    Args:
        biases: of the attention projections.
        query_key_norm: whether queries and keys are normalised a head.
        slides: whether ``sliding_window`` makes layers slide.
        window_is_off: whether it means nothing until ``use_sliding_window`` is set.
        head_dim: whether it must be stated, as the class assumes a number of its own.
    """

    biases: Biases = "none"
    query_key_norm: bool = False
    slides: bool = False
    window_is_off: bool = False
    head_dim: bool = False


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(slides=True),
    "qwen2": _Family(biases="qkv", window_is_off=True),
    "qwen3": _Family(query_key_norm=True, window_is_off=True, head_dim=True),
}
# Switches, and the value with which they change nothing.
_OFF: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "is_decoder": (True, False), "is_encoder_decoder": (False,), "model_type": tuple(_FAMILIES),
    "partial_rotary_factor": (1, 1.0), "layer_types": (),
}  # fmt: skip
_READ = {*_WIDTHS, *_OFF, *_OTHERS, "head_dim", "sliding_window", "tie_word_embeddings"}


def plain_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape of a configuration, without a name; None where only its class can tell."""
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or not _is_plain(config, family):
        return None
    windows = _windows(config, family)
    return ModelShape(
        name="", layers=config["num_hidden_layers"], query_heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], head_dim=_head_dim(config),
        hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"], max_context=config["max_position_embeddings"],
        tied_embeddings=config["tie_word_embeddings"], windows=windows, biases=family.biases,
        query_key_norm=family.query_key_norm,
    )  # fmt: skip


def _is_plain(config: Mapping[str, Any], family: _Family) -> bool:
    if set(config) - _READ or not all(_is_count(config.get(key)) for key in _WIDTHS):
        return False
    if not isinstance(config.get("tie_word_embeddings"), bool):
        return False
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * config["num_hidden_layers"]:
        return False
    switched = any(
        config[key] not in off for key, off in _OFF.items() if off and config.get(key) is not None
    )
    return not switched and _heads_fit(config, family) and _window_is_known(config, family)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _heads_fit(config: Mapping[str, Any], family: _Family) -> bool:
    stated = config.get("head_dim")
    if stated is None:
        return not family.head_dim and config["hidden_size"] % config["num_attention_heads"] == 0
    return _is_count(stated)


def _window_is_known(config: Mapping[str, Any], family: _Family) -> bool:
    """Mistral's class slides unless the file says that it does not; Llama's knows no window."""
    if family.window_is_off:
        return True
    window = config.get("sliding_window", 0 if family.slides else None)
    if not family.slides:
        return window is None
    return "layer_types" not in config and (window is None or _is_count(window))


def _windows(config: Mapping[str, Any], family: _Family) -> tuple[int | None, ...]:
    window = config.get("sliding_window") if family.slides else None
    return (window,) * int(config["num_hidden_layers"])


def _head_dim(config: Mapping[str, Any]) -> int:
    stated = config.get("head_dim")
    return int(stated or config["hidden_size"] // config["num_attention_heads"])
