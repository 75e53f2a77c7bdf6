"""What vLLM is told in a file, which of it is refused, and what it then holds of a sequence."""

from __future__ import annotations

from typing import Any

from kvtune.common.yaml_tree import flow

DTYPES = {
    "fp8": (8, 8),
    "int8_per_token_head": (8, 8),
    "fp8_per_token_head": (8, 8),
    "turboquant_k8v4": (8, 4),
    "int4_per_token_head": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}
"""Values of kv-cache-dtype that are used here, with the bits of keys and of values."""
PAGE_TOKENS = 32  # of a block at most; 16 where all layers have one dtype
_KEYS = {
    "model", "max-model-len", "max-num-seqs", "kv-cache-dtype",
    "max-num-batched-tokens", "hf-overrides", "kv-cache-memory-bytes", "quantization",
}  # fmt: skip


def check(config: dict[str, Any], layers: int) -> None:
    """What vLLM refuses, and what it takes silently though it is wrong.

    Raises:
        ValueError: the configuration breaks a rule.
    """
    if unknown := set(config) - _KEYS:
        raise ValueError(f"no flags of vLLM: {sorted(unknown)}")
    if config["kv-cache-dtype"] not in {"auto", *DTYPES}:
        raise ValueError(f"kv-cache-dtype cannot be {config['kv-cache-dtype']!r}")
    whole = ("max-model-len", "max-num-seqs", "max-num-batched-tokens", "kv-cache-memory-bytes")
    for key in whole:
        if key in config and not (isinstance(config[key], int) and config[key] > 0):
            raise ValueError(f"{key} must be a whole number above 0")
    if config.get("quantization", "fp8") != "fp8":
        raise ValueError(f"weights are not quantised to {config['quantization']} when loaded")
    if config.get("max-num-batched-tokens", config["max-num-seqs"]) < config["max-num-seqs"]:
        raise ValueError("max-num-batched-tokens must be at least max-num-seqs")
    overrides = config.get("hf-overrides", {"layer_types": ["full_attention"] * layers})
    kinds = overrides.get("layer_types", [])
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types must name {layers} layers full_ or sliding_attention")
    if overrides.get("sliding_window", 1) < 1:
        raise ValueError("sliding_window must be above 0")


def sequence_bytes(
    config: dict[str, Any], kv_heads: int, head_dim: int, layers: int, page: int = PAGE_TOKENS
) -> int:
    """What vLLM allocates for one sequence of the full length, in whole pages, scales included.

    A sliding layer is given its window less one and a chunk of the prompt, in whole pages and one
    more (held against the capacity that vLLM 0.32 logs).

    Args:
        config: as written.
        kv_heads: H.
        head_dim: D.
        layers: L.
        page: tokens of a block; layers of several dtypes may be given blocks of 32.
    """
    longest = config["max-model-len"]
    whole = -(-longest // page)
    sliding, window = _sliding(config)
    held = min(window - 1 + config.get("max-num-batched-tokens", 0), longest)
    some = min(-(-held // page) + 1, whole)
    pages = [some if at in sliding else whole for at in range(layers)]
    return sum(
        int(count * page * kv_heads * _token_bytes(dtype, head_dim))
        for count, dtype in zip(pages, _dtypes(config, layers), strict=True)
    )


def prompt_bytes(
    config: dict[str, Any], kv_heads: int, head_dim: int, layers: int, context: int
) -> int:
    """Bytes of one prompt there, scales included, pages not."""
    sliding, window = _sliding(config)
    few = min(context, window - 1 + config.get("max-num-batched-tokens", 0))
    return sum(
        int((few if layer in sliding else context)
            * kv_heads * _token_bytes(dtype, head_dim))
        for layer, dtype in enumerate(_dtypes(config, layers))
    )  # fmt: skip


def _sliding(config: dict[str, Any]) -> tuple[set[int], int]:
    """Layers that slide, and their window."""
    overrides = config.get("hf-overrides", {})
    kinds = overrides.get("layer_types", [])
    sliding = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    return sliding, overrides.get("sliding_window", 1)


def _dtypes(config: dict[str, Any], layers: int) -> list[str]:
    """Every layer's dtype; turboquant exempts the first and the last two layers by itself."""
    turboquant = config["kv-cache-dtype"].startswith("turboquant")
    exempt = {0, 1, layers - 2, layers - 1} if turboquant else set()
    return ["auto" if at in exempt else config["kv-cache-dtype"] for at in range(layers)]


def _token_bytes(dtype: str, head_dim: int) -> float:
    """Bytes of one token of one KV head, keys and values."""
    if dtype == "auto":
        return 4.0 * head_dim
    scales = 0.0 if dtype == "fp8" else 8.0  # a float32 each for keys and for values
    return head_dim * sum(DTYPES[dtype]) / 8 + scales


def line(key: str, value: Any) -> str:
    """One key; only the overrides, a mapping, take several lines."""
    if isinstance(value, dict):
        return f"{key}:\n" + "".join("  " + line(*entry) for entry in value.items())
    return f"{key}: {flow(value)}\n"
