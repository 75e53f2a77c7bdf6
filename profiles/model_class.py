"""What a configuration's own transformers class says: parameters by group, and what it caches.

The class is built on the meta device, where tensors have shapes and no memory, and is given four
tokens. Nothing is downloaded and no code that comes with a model is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.common.files import cache_dir, write_text
from kvtune.profiles.shape import Experts, LatentAttention, LayerCache, ParameterCounts

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


_FACTS = TypeAdapter(ClassFacts)


def facts_of(config: Mapping[str, Any], file: str) -> ClassFacts:
    """The facts of a configuration, remembered in the user's cache folder.

    Raises:
        KvtuneError: transformers has no decoder class of this type, or it refuses the numbers.
    """
    wanted = {k: v for k, v in config.items() if k not in _IRRELEVANT and not k.startswith("_")}
    kept = cache_dir() / "shapes" / f"{_digest(wanted)}.json"
    try:
        return _FACTS.validate_json(kept.read_bytes())
    except (OSError, ValidationError):
        facts = build_facts(wanted, file)
    try:
        write_text(kept, _FACTS.dump_json(facts).decode())
    except KvtuneError:  # a cache that cannot be written only costs time
        pass
    return facts


def _digest(config: Mapping[str, Any]) -> str:
    import importlib.metadata

    version = importlib.metadata.version("transformers")
    text = json.dumps([_FORMAT, version, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_FORMAT = 1
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
        model, whole = _built(made, config, file)
        layers = _layers(model, text, file)
        return ClassFacts(
            layers=layers,
            counts=_counts(model, 0 if whole else _TOWERS_AT_MOST),
            query_heads=_first(text, ("num_attention_heads", "n_head", "n_heads")),
            hidden_size=_first(text, ("hidden_size", "n_embd", "d_model")),
            intermediate_size=_first(text, ("intermediate_size", "ffn_dim", "n_inner"), 1),
            vocab_size=model.get_input_embeddings().weight.shape[0],
            max_context=_first(text, ("max_position_embeddings", "n_positions")) or None,
            tied=_is_tied(model),
            experts=_experts(model, text),
            latent=_latent(text, layers),
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

    decoder, multimodal = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
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
    return text if len(text) <= 160 else text[:157] + "..."


# --- what is cached --------------------------------------------------------------------------


def _layers(model: Any, text: Any, file: str) -> tuple[LayerCache, ...]:
    """What each layer caches, seen in the cache that four tokens fill."""
    import torch

    ids = torch.zeros(1, 4, dtype=torch.long)
    for stand_in in (None, *_stand_ins()):
        if stand_in is not None:
            _replace_feed_forward(model, stand_in)
        try:
            out = model(input_ids=ids, use_cache=True)
        except Exception:  # experts' routing looks at values, which the meta device has not
            continue
        cache = next(
            (c for n in ("cache", "past_key_values", "cache_params") if (c := out.get(n))), None
        )
        if cache is not None and hasattr(cache, "layers"):
            return tuple(_layer(entry) for entry in cache.layers)
    raise KvtuneError(
        f"what {text.model_type} caches cannot be told without its weights", where=file,
        hint="an encoder caches nothing; a decoder with a cache of its own kind is not counted.",
    )  # fmt: skip


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


_FEED_FORWARD = re.compile(r"MLP|Mlp|MoE|Moe|MOE|FeedForward|Experts|Alone|WithLogits")
_MIXES_TOKENS = re.compile(r"Attention|Mamba|Mixer|Conv|Delta|Layer|Block$")


def _replace_feed_forward(model: Any, stand_in: Any) -> None:
    """Put a stand-in where a whole feed-forward block of a decoder layer stands."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            inside = {type(part).__name__ for part in child.modules()} - {kind}
            if _FEED_FORWARD.search(kind) and not any(map(_MIXES_TOKENS.search, inside)):
                setattr(module, name, stand_in())


def _layer(entry: Any) -> LayerCache:
    import torch

    keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
    states = [
        state
        for name in ("conv_states", "recurrent_states")
        for state in (getattr(entry, name, None) or {}).values()
        if isinstance(state, torch.Tensor)
    ]
    state_bytes = sum(math.prod(s.shape[1:]) * s.element_size() for s in states)
    if not isinstance(keys, torch.Tensor) or keys.numel() == 0:
        return LayerCache(state_bytes=state_bytes)
    index = getattr(entry, "indexer_keys", None)
    window = getattr(entry, "sliding_window", None)
    return LayerCache(
        kv_heads=keys.shape[1],
        key_dim=keys.shape[-1],
        value_dim=values.shape[-1],
        window=int(window) if window else None,
        state_bytes=state_bytes,
        index_dim=index.shape[-1] if isinstance(index, torch.Tensor) else 0,
    )


def _latent(text: Any, layers: tuple[LayerCache, ...]) -> LatentAttention | None:
    rank = getattr(text, "kv_lora_rank", None)
    if not rank or not any(layer.key_dim == rank for layer in layers):
        return None
    return LatentAttention(
        kv_lora_rank=rank,
        rope_dim=text.qk_rope_head_dim,
        nope_dim=text.qk_nope_head_dim,
        value_dim=text.v_head_dim,
        query_lora_rank=getattr(text, "q_lora_rank", None),
    )


# --- parameters ------------------------------------------------------------------------------

_TOWER = re.compile(
    r"vision|visual|image|audio|speech|multi_modal|multimodal|mm_|projector|aligner|embed_tokens_"
    r"extend|vqmodel|\bmtp"
)
_FEED_FORWARD_NAME = re.compile(r"mlp|ffn|feed_forward|shared_expert|\bfc\d|dense_h_to_4h|moe|ff\b")


def _counts(model: Any, unknown: int) -> ParameterCounts:
    """Parameters by what becomes of them when weights are quantised, each counted once."""
    import torch

    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head_module = model.get_output_embeddings()
    head = id(head_module.weight) if head_module is not None else None
    groups = dict.fromkeys(ParameterCounts.__dataclass_fields__, 0) | {"unknown": unknown}
    for name, parameter in model.named_parameters():
        if _TOWER.search(name):
            group = "other"
        elif id(parameter) in looked_up:
            group = "embedding"
        elif id(parameter) == head:
            group = "head"
        else:
            group = _group(name, parameter)
        groups[group] += parameter.numel()
    return ParameterCounts(**groups)


def _group(name: str, parameter: Any) -> str:
    if parameter.dim() < 2 or "router" in name or name.endswith(("gate.weight", "conv1d.weight")):
        return "small"
    if ".experts." in name or name.endswith(("input_linear.weight", "output_linear.weight")):
        return "small" if "bias" in name else "experts"
    return "feed_forward" if _FEED_FORWARD_NAME.search(name) else "attention"


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _experts(model: Any, text: Any) -> Experts | None:
    names = [n for n, p in model.named_parameters() if _group(n, p) == "experts"]
    if not names:
        return None
    count = _first(
        text, ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    )
    active = _first(
        text, ("num_experts_per_tok", "moe_k", "top_k_experts", "num_experts_per_token", "moe_topk"), 1
    )
    width = _first(text, ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"), 1)
    if active > count:
        raise KvtuneError(f"a token cannot visit {active} of {count} experts", where="config.json")
    return Experts(max(1, count), active, width)


def _first(config: Any, names: tuple[str, ...], missing: int = 0) -> int:
    """The first of these attributes that holds a number; the largest of a list."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = max(v for v in value if isinstance(v, int))
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return missing
