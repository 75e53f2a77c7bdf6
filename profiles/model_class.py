"""What a configuration's own transformers class says: parameters by group, and what it caches.

The class is built on the meta device, where tensors have shapes and no memory, and is given four
tokens. Nothing is downloaded and no code that comes with a model is run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

import kvtune
from kvtune.common.errors import KvtuneError
from kvtune.common.files import cache_dir, write_text
from kvtune.profiles.class_cache import latent_of, layers_of
from kvtune.profiles.class_parameters import counts_of, experts_of, is_tied, query_norm_width
from kvtune.profiles.class_values import first_of
from kvtune.profiles.layer_cache import LatentAttention, LayerCache
from kvtune.profiles.own_code import check_own_code
from kvtune.profiles.parameter_counts import Experts, ParameterCounts
from kvtune.profiles.plain_decoder import plain_shape
from kvtune.profiles.shape import ModelShape

_MOST_PARAMETERS = 10**14
_TOWERS_AT_MOST = 2 * 10**9  # but for InternViT-6B, what public towers have


@dataclass(frozen=True)
class ClassFacts:
    """What a model's class says of it.

    Args:
        layers: what each layer caches.
        counts: parameters by group.
        query_heads: of a layer; 0 without attention.
        hidden_size: width of the residual stream.
        intermediate_size: width of the dense feed-forward block.
        vocab_size: rows of the embedding.
        max_context: positions that the class assumes or the file says; None without.
        tied: whether the output matrix is the embedding.
        experts: set for mixtures of experts.
        latent: set for multi-head latent attention.
        query_norm_width: numbers that are normalised together where queries are, 0 if they are not.
    """

    layers: tuple[LayerCache, ...]
    counts: ParameterCounts
    query_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int | None
    tied: bool
    experts: Experts | None = None
    latent: LatentAttention | None = None
    query_norm_width: int = 0


_FACTS = TypeAdapter(ClassFacts)


def facts_of(config: Mapping[str, Any], file: str) -> ClassFacts:
    """The facts of a configuration, remembered in the user's cache folder.

    Raises:
        KvtuneError: transformers has no decoder class of this type, or it refuses the numbers; or
            the model brings a class of its own, whose layers may be any.
    """
    if str(config.get("model_type")) not in _SAME_LAYERS:
        check_own_code(config, file)
    wanted = {k: v for k, v in config.items() if k not in _IRRELEVANT and not k.startswith("_")}
    if (plain := plain_shape(wanted)) is not None:
        return _plain(plain)
    kept = cache_dir() / "shapes" / f"{_digest(wanted)}.json"
    try:
        return _FACTS.validate_json(kept.read_bytes())
    except (OSError, ValidationError):
        facts = build_facts(wanted, file)
    with contextlib.suppress(KvtuneError):  # a cache that cannot be written only costs time
        write_text(kept, _FACTS.dump_json(facts).decode())
    return facts


def _plain(shape: ModelShape) -> ClassFacts:
    """The facts of a decoder whose class need not be asked."""
    return ClassFacts(
        layers=shape.layer_caches,
        counts=shape.parameter_counts(),
        query_heads=shape.query_heads,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_context=shape.max_context,
        tied=shape.tied_embeddings,
        query_norm_width=shape.query_key_norm * shape.head_dim,
    )


def _digest(config: Mapping[str, Any]) -> str:
    import importlib.metadata

    version = importlib.metadata.version("transformers")
    text = json.dumps([_FORMAT, kvtune.__version__, version, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_FORMAT = 5  # raised whenever the same class would be read otherwise
_IRRELEVANT = (
    "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "quantization_config", "compression_config", "attn_implementation", "device_map",
)  # fmt: skip


def build_facts(config: Mapping[str, Any], file: str) -> ClassFacts:
    """The facts of a configuration, from its class.

    Raises:
        KvtuneError: transformers has no decoder class of this type, or it refuses the numbers.
    """
    import torch

    with _quiet(), torch.device("meta"), torch.no_grad():
        made = _made_config(config, file)
        text = made.get_text_config(decoder=True)
        with contextlib.suppress(Exception):  # what a strict class says of a missing number
            # Some classes' own is above small vocabularies.
            made.pad_token_id = text.pad_token_id = None
        model, whole = _built(made, config, file)
        experts, counts = (
            experts_of(model, text, file),
            counts_of(model, 0 if whole else _TOWERS_AT_MOST),
        )
        vocabulary, tied = model.get_input_embeddings().weight.shape[0], is_tied(model)
        layers = layers_of(model, text, file)
        if not any(layer.elements_per_token or layer.state_bytes for layer in layers):
            raise KvtuneError(f"no layer of {text.model_type} caches anything", where=file)
        return ClassFacts(
            layers=layers,
            counts=counts,
            query_heads=first_of(text, ("num_attention_heads", "n_head", "n_heads")),
            hidden_size=first_of(text, ("hidden_size", "n_embd", "d_model")),
            intermediate_size=first_of(text, ("intermediate_size", "ffn_dim", "n_inner"), 1),
            vocab_size=vocabulary,
            max_context=first_of(text, ("max_position_embeddings", "n_positions")) or None,
            tied=tied,
            experts=experts,
            latent=latent_of(text, layers),
            query_norm_width=query_norm_width(model),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of kernels that are not installed and tokens out of range."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


# Types whose own code transformers does not hold, and the class of the same layers.
_SAME_LAYERS = {
    "kimi_k2": "deepseek_v3", "deepseek_r1": "deepseek_v3", "yi": "llama", "Yi": "llama",
    "aquila": "llama", "internlm2": "llama", "xverse": "llama", "baichuan": "llama",
    "mimo": "qwen2", "minimax_m1": "minimax", "minimax_text_01": "minimax",
}  # fmt: skip


_DECODERS = ("gpt_neox", "gpt_neox_japanese")  # whose class keeps that switch, unused


def _made_config(config: Mapping[str, Any], file: str) -> Any:
    """The configuration as its class completes it."""
    import transformers

    kind = str(config.get("model_type", ""))
    kind = _SAME_LAYERS.get(kind, kind)
    if not kind:
        raise KvtuneError(
            "the key 'model_type' is missing", where=file,
            hint="a config.json of the transformers kind names the model's type.",
        )  # fmt: skip
    if kind not in transformers.CONFIG_MAPPING:
        raise KvtuneError(
            f"no layers are known of models of type {kind[:60]!r}", where=file,
            hint="its code may come with the model, which is not run; a newer transformers, a "
            "GGUF file or a type with the same layers may be known.",
        )  # fmt: skip
    plain = copy.deepcopy({k: v for k, v in config.items() if k != "model_type"})
    try:
        made = transformers.AutoConfig.for_model(kind, **plain)
        if getattr(made, "is_encoder_decoder", False):
            raise KvtuneError(
                f"{kind} is an encoder-decoder; only decoders are counted", where=file
            )
        # BERT and its kin are decoders only where the file says so.
        if getattr(made, "is_decoder", None) is False and made.model_type not in _DECODERS:
            raise KvtuneError(
                f"{kind} is an encoder, which caches nothing", where=file,
                hint="an encoder's configuration that is a decoder's says 'is_decoder': true.",
            )  # fmt: skip
        return made
    except KvtuneError:
        raise
    except Exception as error:  # whatever its validators raise says what is wrong with the file
        raise KvtuneError(f"no {kind} model: {_short(error)}", where=file) from error


def _built(made: Any, config: Mapping[str, Any], file: str) -> tuple[Any, bool]:
    """The model on the meta device, and whether it has all its vision and audio towers."""
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    decoder, multimodal = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
    )
    kind, text = made.model_type, made.get_text_config(decoder=True)
    towers = any(key.endswith(("vision_config", "audio_config")) for key in config)
    # The class with towers first where there are any, the text model alone last.
    tries = [(decoder, made, True)]
    if towers or kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        tries = [(multimodal, made, True), (decoder, made, not towers), (decoder, text, False)]
    elif text is not made:
        tries.append((decoder, text, False))
    failures = []
    for loader, wanted, whole in tries:
        try:
            model = loader.from_config(
                wanted, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=False
            ).eval()
        except Exception as error:  # see _made_config
            failures.append(error)
            continue
        if sum(p.numel() for p in model.parameters()) > _MOST_PARAMETERS:
            raise KvtuneError("no model has as many parameters as this one would", where=file)
        return model, whole
    raise KvtuneError(
        f"{kind} is no decoder that transformers can build: {_short(failures[0])}", where=file
    ) from failures[0]


def _short(error: Exception) -> str:
    """The last line of a message, cut where it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    text = text.removeprefix("ValueError: ").replace("`", "'")
    return text if len(text) <= 160 else text[:157] + "..."
