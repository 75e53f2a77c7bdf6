"""A model's shape from its Hugging Face ``config.json``: plain JSON, nothing is executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError
from kvtune.profiles.config_file import read_config
from kvtune.profiles.context_length import longest_context
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.stored_weights import stored_weights

if TYPE_CHECKING:
    from kvtune.profiles.model_class import ClassFacts

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


def shape_from_config(path: Path | str) -> ModelShape:
    """The shape that a ``config.json`` (or the folder that holds it) describes.

    Raises:
        KvtuneError: no such file, no JSON, or no decoder that transformers has a class for.
    """
    config, file = read_config(path)
    name = file.resolve().parent.name.lower() or "model"
    return shape_of(config, str(file), name, folder=file.parent)


def shape_of(
    config: Mapping[str, Any], file: str, name: str, folder: Path | None = None
) -> ModelShape:
    """The shape of a configuration that was read.

    Args:
        config: its content.
        file: named in errors.
        name: the shape's.
        folder: that may hold the weights, whose sizes are then read from the files.
    """
    config = _completed(config)
    text = _text_of(config)
    _check_heads(text, file)
    from kvtune.profiles.model_class import facts_of

    facts = facts_of(config, file)
    heads, width = _heads(facts)
    longest = longest_context(text, file, facts.max_context)
    return ModelShape(
        name=name,
        layers=len(facts.layers),
        query_heads=facts.query_heads,
        kv_heads=facts.query_heads if facts.latent else heads,
        head_dim=width,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        vocab_size=facts.vocab_size,
        max_context=longest,
        rotary_elements=_rotary_elements(text, longest, width),
        tied_embeddings=facts.tied,
        windows=tuple(layer.window for layer in facts.layers),
        latent=facts.latent,
        experts=facts.experts,
        query_key_norm=facts.query_norm_width > 0,
        norms_over_heads=facts.query_norm_width > width,
        cache=facts.layers,
        counted=facts.counts,
        stored=stored_weights(config, facts.counts, file, folder),
        source=file,
    )


def _text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model inside a multimodal one."""
    for key in _TEXT_CONFIGS:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            return {**config, **_text_of(inner)}
    return config


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose own numbers go before what its class assumes beside them.

    Gemma 4's class takes 512 for the heads of full layers, and ignores their number unless a
    switch is set; a file that states one width of heads, or their number, means it. The published
    files state all of them.
    """
    full = {k: _completed(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    if full.get("head_dim", 0) is None:  # some classes divide by what the file says not to know
        del full["head_dim"]
    if str(config.get("model_type")).startswith(("gemma4", "embedding_gemma2")):
        if "head_dim" in full and "per_layer_config" not in full:
            full.setdefault("global_head_dim", full["head_dim"])
        if full.get("num_global_key_value_heads"):
            full.setdefault("attention_k_eq_v", True)
    return full


def _check_heads(text: Mapping[str, Any], file: str) -> None:
    """What classes do not check: heads that do not divide, widths that are no whole numbers."""
    heads, shared = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise KvtuneError(
            f"'num_key_value_heads' ({shared}) must divide 'num_attention_heads' ({heads})",
            where=file,
        )
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "head_dim"):
        value = text.get(key)
        wrong = isinstance(value, (bool, float, str)) or (isinstance(value, int) and value < 1)
        if wrong:
            raise KvtuneError(
                f"{key!r} must be a whole number of at least 1, not {repr(value)[:40]}", where=file
            )


def _rotary_elements(text: Mapping[str, Any], longest: int, width: int) -> int | None:
    """Numbers in the tables of rotary embeddings where there are more than one a position.

    Linear scaling tables every position that it divides; sliding layers may have their own base.
    """
    scaling = text.get("rope_scaling")
    linear = isinstance(scaling, Mapping) and "linear" in (
        scaling.get("rope_type"), scaling.get("type")
    )  # fmt: skip
    factor = scaling.get("factor") if linear and isinstance(scaling, Mapping) else 1
    tables = (factor if isinstance(factor, (int, float)) else 1) + ("rope_local_base_freq" in text)
    return int(tables * longest * width) if tables != 1 else None


def _heads(facts: ClassFacts) -> tuple[int, int]:
    """KV heads and head width of most layers that cache keys; of latents what their heads have."""
    if facts.latent is not None:
        return 1, facts.latent.nope_dim
    sizes = Counter((layer.kv_heads, layer.key_dim) for layer in facts.layers if layer.kv_heads)
    return sizes.most_common(1)[0][0] if sizes else (0, 0)
