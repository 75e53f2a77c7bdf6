"""A model's shape from a GGUF file's own header, its layers as llama.cpp reads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.profiles.gguf_header import HINT, Header, read_header
from kvtune.profiles.layer_cache import LatentAttention, LayerCache
from kvtune.profiles.parameter_counts import Experts, ParameterCounts, StoredWeights
from kvtune.profiles.shape import ModelShape

# Every n-th layer is full, by architecture (llama.cpp, src/models, set_swa_pattern); the window of
# every other architecture is not used there.
_FULL_EVERY = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gemma4": 6, "llama4": 4, "gpt-oss": 2, "cohere2": 4,
    "exaone4": 4, "exaone-moe": 4, "olmo2": 4, "afmoe": 4, "smallthinker": 4, "mellum": 4,
}  # fmt: skip
_FULL_FIRST = ("smallthinker",)  # there the first of each group is full, not the last
_ALL_FULL = (
    "llama", "mistral3", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl",
    "phi2", "phi3", "phimoe", "starcoder2", "minicpm", "minicpm3", "deepseek2", "granite", "falcon",
)  # fmt: skip
_DEFAULT_WINDOW = {"llama4": 8192, "gemma2": 4096}
_RECURRENT_ONLY = ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
_WITH_STATE = (
    "jamba", "granitehybrid", "nemotron_h", "nemotron_h_moe", "lfm2", "lfm2moe", "falcon-h1",
    "qwen3next", "qwen35", "qwen35moe",
)  # fmt: skip
_INTERVAL = ("qwen3next", "qwen35", "qwen35moe")
_ENCODERS = ("bert", "nomic-bert", "jina-bert-v2", "modern-bert", "gemma-embedding", "t5encoder")


def shape_from_gguf(path: Path) -> ModelShape:
    """The shape that a GGUF file's metadata and tensors describe, over all files of a split model.

    Raises:
        KvtuneError: no such file, no GGUF, an encoder, or a key is missing.
    """
    return _shape(_Keys(read_header(path)))


class _Keys:
    """The keys of one architecture, without their prefix."""

    def __init__(self, header: Header) -> None:
        self.header, self.where = header, str(header.path)
        self.architecture = str(header.keys.get("general.architecture", ""))
        if not self.architecture:
            raise KvtuneError("'general.architecture' is missing", where=self.where, hint=HINT)
        if self.architecture in _ENCODERS or self.architecture == "t5":
            raise KvtuneError(
                f"{self.architecture} is no decoder: only decoders' caches are counted",
                where=self.where,
            )
        self.layers = self.count("block_count", least=1, most=1024)

    def get(self, key: str) -> Any:
        """A value, None where the key is absent."""
        return self.header.keys.get(f"{self.architecture}.{key}")

    def count(
        self, key: str, default: int | None = None, *, least: int = 0, most: int = 2**31
    ) -> int:
        """A whole number; the largest of a list."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise KvtuneError(f"the key {key!r} is missing", where=self.where, hint=HINT)
        if isinstance(value, list):
            value = max(value, default=None)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            shown = str(value)[:20]
            raise KvtuneError(
                f"{key!r} must be a whole number from {least} to {most:,}, not {shown}",
                where=self.where,
            )
        return value

    def each(self, key: str, default: int) -> list[int]:
        """A whole number a layer, whether the key holds one or a list."""
        value = self.get(key)
        if not isinstance(value, list):
            return [self.count(key, default, most=2**20)] * self.layers
        if len(value) != self.layers:
            raise KvtuneError(
                f"{key!r} has {len(value)} entries for {self.layers} layers", where=self.where
            )
        if any(not isinstance(v, int) or not 0 <= v <= 2**20 for v in value):
            raise KvtuneError(f"{key!r} must hold whole numbers", where=self.where)
        return [int(v) for v in value]


def _shape(keys: _Keys) -> ModelShape:
    hidden, heads = (
        keys.count("embedding_length", least=1, most=2**20),
        keys.count("attention.head_count", 0),
    )
    layers = _layers(keys, hidden, heads)
    if not any(layer.elements_per_token or layer.state_bytes for layer in layers):
        raise KvtuneError("no layer of this model caches anything", where=keys.where)
    counts = _counts(keys.header)
    latent = _latent(keys, heads)
    kept = Counter((layer.kv_heads, layer.key_dim) for layer in layers if layer.kv_heads)
    kv_heads, width = kept.most_common(1)[0][0] if kept else (0, 0)
    return ModelShape(
        name=keys.header.path.stem.lower(),
        layers=keys.layers,
        query_heads=heads,
        kv_heads=heads if latent else kv_heads,
        head_dim=latent.nope_dim if latent else width,
        hidden_size=hidden,
        intermediate_size=max(1, keys.count("feed_forward_length", 0)),
        vocab_size=_vocabulary(keys),
        max_context=keys.count("context_length", least=1),
        tied_embeddings="output.weight" not in keys.header.tensors,
        windows=tuple(layer.window for layer in layers),
        latent=latent,
        experts=_experts(keys),
        **_norms(keys.header, width, hidden),
        cache=layers,
        counted=counts,
        stored=_stored(keys.header, counts),
        source=keys.header.path.name,
    )


def _norms(header: Header, width: int, hidden: int) -> dict[str, Any]:
    """Which norms a layer has: of queries and keys by the head or over all, and of hidden width."""
    norms = {
        name.split(".", 2)[2]: tensor.numbers
        for name, tensor in header.tensors.items()
        if name.endswith("norm.weight") and name.startswith("blk.0.")
    }
    of_queries = norms.pop("attn_q_norm.weight", 0)
    norms.pop("attn_k_norm.weight", 0)
    wide = sum(numbers == hidden for numbers in norms.values())
    return {
        "query_key_norm": of_queries > 0,
        "norms_over_heads": of_queries > max(width, 1),
        "norms_per_layer": wide or 2,
    }


def _vocabulary(keys: _Keys) -> int:
    table = keys.header.tensors.get("token_embd.weight")
    if table is not None:
        return table.shape[-1]
    tokens = keys.header.keys.get("tokenizer.ggml.tokens")
    return keys.count("vocab_size", tokens if isinstance(tokens, int) else None, least=1)


# --- what is cached --------------------------------------------------------------------------


def _layers(keys: _Keys, hidden: int, heads: int) -> tuple[LayerCache, ...]:
    width = hidden // heads if heads else 0
    kv_heads = keys.each("attention.head_count_kv", heads)
    if keys.architecture in _RECURRENT_ONLY:
        kv_heads = [0] * keys.layers
    if keys.architecture in _INTERVAL:
        every = max(1, keys.count("full_attention_interval", 4))
        kv_heads = [n if (i + 1) % every == 0 else 0 for i, n in enumerate(kv_heads)]
    key, value = (
        keys.count(f"attention.{name}_length", width, most=2**16) for name in ("key", "value")
    )
    slides, window = _slides(keys)
    near = (
        keys.count("attention.key_length_swa", key),
        keys.count("attention.value_length_swa", value),
    )
    latent = _latent(keys, heads)
    shared = keys.count("attention.shared_kv_layers", 0)
    if keys.architecture == "gemma3n" and keys.get("attention.shared_kv_layers") is None:
        shared = max(0, keys.layers - 20)  # llama.cpp: the first 20 layers have a cache
    feed_forward = keys.each("feed_forward_length", 0)
    found = []
    for i, count in enumerate(kv_heads):
        state = _state_bytes(keys, hidden, attends=count > 0, feeds=feed_forward[i] > 0)
        if i >= keys.layers - shared or not count:
            found.append(LayerCache(state_bytes=state))
        elif latent is not None:
            found.append(LayerCache(1, latent.kv_lora_rank, latent.rope_dim))
        else:
            size = near if slides[i] else (key, value)
            found.append(LayerCache(count, *size, window if slides[i] else None, state))
    return tuple(found)


def _slides(keys: _Keys) -> tuple[list[bool], int | None]:
    """Which layers slide, and over how many tokens."""
    name = keys.architecture
    window = keys.count("attention.sliding_window", _DEFAULT_WINDOW.get(name, 0))
    if name == "llama4":
        window = keys.count("attention.chunk_size", window or 8192)
    pattern = keys.get("attention.sliding_window_pattern")
    if not window or (name in _ALL_FULL and pattern is None):
        return [False] * keys.layers, None
    if isinstance(pattern, list):
        return [bool(v) for v in keys.each("attention.sliding_window_pattern", 0)], window
    every = pattern if isinstance(pattern, int) and pattern > 0 else _FULL_EVERY.get(name)
    if every is None:
        raise KvtuneError(
            f"which layers of {name[:40]!r} have its window of {window:,} tokens is not known",
            where=keys.where, hint=HINT,
        )  # fmt: skip
    full = 0 if name in _FULL_FIRST else every - 1
    return [i % every != full for i in range(keys.layers)], window


def _state_bytes(keys: _Keys, hidden: int, *, attends: bool, feeds: bool) -> int:
    """Bytes of a layer's recurrent state, kept in 32 bits by llama.cpp."""
    name = keys.architecture
    if name.startswith(("rwkv", "arwkv")):
        return 4 * (2 * hidden + hidden * keys.count("wkv.head_size", 64))
    if name not in (*_WITH_STATE, *_RECURRENT_ONLY) or (attends and name != "falcon-h1"):
        return 0
    if name.startswith("lfm2"):
        return 4 * hidden * max(0, keys.count("shortconv.l_cache", 3) - 1)
    if name.startswith("nemotron_h") and feeds:
        return 0
    inner, state = keys.count("ssm.inner_size"), keys.count("ssm.state_size")
    groups = keys.count("ssm.group_count", 0)
    kernel = max(0, keys.count("ssm.conv_kernel") - 1)
    return 4 * (kernel * (inner + 2 * groups * state) + state * inner)


def _latent(keys: _Keys, heads: int) -> LatentAttention | None:
    """Multi-head latent attention, where the file is made for caching latents."""
    if not keys.get("attention.kv_lora_rank") or keys.get("attention.key_length_mla") is None:
        return None
    rope = keys.count("rope.dimension_count")
    return LatentAttention(
        kv_lora_rank=keys.count("attention.kv_lora_rank"),
        rope_dim=rope,
        nope_dim=keys.count("attention.key_length_mla") - rope,
        value_dim=keys.count("attention.value_length_mla"),
        query_lora_rank=keys.count("attention.q_lora_rank", 0) or None,
    )


# --- weights ---------------------------------------------------------------------------------


def _experts(keys: _Keys) -> Experts | None:
    count = keys.count("expert_count", 0, most=8192)
    if not count:
        return None
    active = keys.count("expert_used_count", count)
    if not 1 <= active <= count:
        raise KvtuneError(f"a token cannot visit {active} of {count} experts", where=keys.where)
    width = keys.count("expert_feed_forward_length", keys.count("feed_forward_length", 1))
    return Experts(count, active, width)


def _group(name: str, dimensions: int) -> str:
    if name.startswith(("token_embd", "per_layer_token_embd", "position_embd")):
        return "embedding"
    if name == "output.weight":
        return "head"
    if dimensions < 2 or "ffn_gate_inp" in name:
        return "small"
    if "_exps" in name:
        return "experts"
    return "feed_forward" if ".ffn_" in name else "attention"


def _counts(header: Header) -> ParameterCounts:
    groups = dict.fromkeys(ParameterCounts.__dataclass_fields__, 0)
    for name, tensor in header.tensors.items():
        groups[_group(name, len(tensor.shape))] += tensor.numbers
    return ParameterCounts(**groups)


def _stored(header: Header, counts: ParameterCounts) -> StoredWeights:
    """The bytes of all tensors, and the format that most of them are in."""
    sizes = Counter[str]()
    matrices = 0
    for name, tensor in header.tensors.items():
        sizes[tensor.format] += tensor.bytes
        if _group(name, len(tensor.shape)) in ("attention", "feed_forward", "experts"):
            matrices += tensor.bytes
    name = sizes.most_common(1)[0][0] if sizes else "F16"
    total = sizes.total()
    bits = 8 * matrices / counts.matrices if counts.matrices else 16.0
    return StoredWeights(name, bits, total, total, total)
