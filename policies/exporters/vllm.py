"""vLLM: a YAML file for ``vllm serve --config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtune.common.yaml_tree import flow
from kvtune.policies.exporter import EngineLimits, Export, Exporter, Line, Plan, bytes_line, comment
from kvtune.policies.flatten import (
    Flat,
    dropped_methods,
    flatten,
    grouping_text,
    lost_refinements,
    reach,
)

DTYPES = {
    "fp8": (8, 8),
    "int8_per_token_head": (8, 8),
    "turboquant_k8v4": (8, 4),
    "int4_per_token_head": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}
"""Values of kv-cache-dtype that are used here, with the bits of keys and of values."""
_NEAREST = {
    ("fp8", "fp8"): "fp8", ("int8", "int8"): "int8_per_token_head",
    ("int4", "int4"): "int4_per_token_head",
}  # fmt: skip
_NARROW = 12  # mean bits below which a layer is quantised
_BATCHED_TOKENS = 512


@dataclass(frozen=True)
class Vllm(Exporter):
    """One cache dtype with exempted layers, and one window size for chosen layers; no eviction."""

    name = "vllm"
    stack = "vLLM"
    stack_version = "0.33.0"
    source = "vllm/config/cache.py, vllm/engine/arg_utils.py, vllm/models/llama.py"
    proof = "schema mirror"
    limits = EngineLimits(
        frozenset({"full"}), frozenset({"bf16", "fp8", "int8", "int4"}),
        frozenset({"bf16", "fp8", "int8", "int4"}), "layer", "layer",
        distinct_budgets=1, distinct_formats=1, keys_differ_from_values=False,
    )  # fmt: skip

    def render(self, plan: Plan) -> Export:
        """The YAML and what it loses."""
        dtype, exempt, format_lines = _formats(plan)
        window, windowed, token_lines = _windows(plan)
        config: dict[str, Any] = {
            "model": plan.model,
            "max-model-len": plan.sequence_tokens,
            "max-num-seqs": plan.batch,
            "kv-cache-dtype": dtype,
        }
        if exempt:
            config["kv-cache-dtype-skip-layers"] = [str(layer) for layer in exempt]
        if windowed:
            # A windowed layer is given window - 1 + this many tokens; the default saves nothing.
            config["max-num-batched-tokens"] = max(_BATCHED_TOKENS, plan.batch)
            config["hf-overrides"] = _overrides(plan.facts.layers, window, windowed)
        check(config, plan.facts.layers)
        text = comment(self.header(plan)) + "".join(_line(k, v) for k, v in config.items())
        size = bytes_line(plan, _bytes(plan, config, window, windowed))
        notes = _NOTES + (_WINDOW_NOTES if windowed else ())
        return self.done(
            {"vllm.yaml": text}, [*token_lines, *format_lines, *lost_refinements(plan), size], notes
        )


_NOTES = (
    "vllm serve --config vllm.yaml",
    "generated tokens are stored like the prompt's.",
    "int4/int8_per_token_head run on the Triton backend only; turboquant_* also exempts the first "
    "and the last two layers by itself.",
    "fp8 scales come from the checkpoint, else 1.0; calculate_kv_scales no longer exists.",
)
_WINDOW_NOTES = (
    "hf-overrides windows are read by Llama models; Qwen2 refuses mixed layer types, and Gemma, "
    "Granite, Cohere2 and gpt-oss read their own.",
    "leave disable-hybrid-kv-cache-manager unset: it would allocate every layer in full.",
)
_KEYS = {
    "model", "max-model-len", "max-num-seqs", "kv-cache-dtype", "kv-cache-dtype-skip-layers",
    "max-num-batched-tokens", "hf-overrides",
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
    for layer in config.get("kv-cache-dtype-skip-layers", []):
        if not (isinstance(layer, str) and layer.isdigit() and int(layer) < layers):
            raise ValueError(f"kv-cache-dtype-skip-layers: {layer!r} is no layer of {layers}")
    for key in ("max-model-len", "max-num-seqs", "max-num-batched-tokens"):
        if key in config and not (isinstance(config[key], int) and config[key] > 0):
            raise ValueError(f"{key} must be a whole number above 0")
    if config.get("max-num-batched-tokens", config["max-num-seqs"]) < config["max-num-seqs"]:
        raise ValueError("max-num-batched-tokens must be at least max-num-seqs")
    overrides = config.get("hf-overrides", {"layer_types": ["full_attention"] * layers})
    kinds = overrides.get("layer_types", [])
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types must name {layers} layers full_ or sliding_attention")
    if overrides.get("sliding_window", 1) < 1:
        raise ValueError("sliding_window must be above 0")


def _formats(plan: Plan) -> tuple[str, list[int], list[Line]]:
    """The dtype, the layers that stay in 16 bits, and what that loses."""
    layers = [flatten(layer) for layer in plan.policy.heads]
    narrow = [flat for flat in layers if _is_narrow(flat)]
    exempt = [layer for layer, flat in enumerate(layers) if not _is_narrow(flat)]
    if not narrow:
        lost = [flat for flat in layers if flat.key_bits + flat.value_bits < 32]
        return "auto", [], [_format_line(layers, "auto", bool(lost))]
    together = flatten(
        [
            o
            for layer, flat in zip(plan.policy.heads, layers, strict=True)
            if _is_narrow(flat)
            for o in layer
        ]
    )
    dtype = _dtype(together)
    rounded = any(
        len(flat.key_formats) > 1 or len(flat.value_formats) > 1 for flat in (*layers, together)
    )
    lines = [_format_line(narrow, dtype, rounded)]
    if exempt:
        mixed = any(layers[layer].key_bits + layers[layer].value_bits < 32 for layer in exempt)
        status = "not expressible" if mixed else "kept"
        detail = f"{len(exempt)} of {len(layers)} layers stay in 16 bits (skip list)"
        lines.append(Line("formats by layer", status, detail))  # type: ignore[arg-type]
    return dtype, exempt, lines


def _is_narrow(flat: Flat) -> bool:
    return (flat.key_bits + flat.value_bits) / 2 < _NARROW


def _dtype(flat: Flat) -> str:
    if len(flat.key_formats) == len(flat.value_formats) == 1:
        nearest = _NEAREST.get((flat.key_formats[0], flat.value_formats[0]))
        if nearest:
            return nearest
    wide_enough = [
        (keys + values, name)
        for name, (keys, values) in DTYPES.items()
        if keys >= min(flat.key_bits, 8) and values >= min(flat.value_bits, 8)
    ]
    return min(wide_enough, key=lambda pair: pair[0])[1]


def _format_line(layers: list[Flat], dtype: str, rounded: bool) -> Line:
    keys = "/".join(dict.fromkeys(name for flat in layers for name in flat.key_formats))
    values = "/".join(dict.fromkeys(name for flat in layers for name in flat.value_formats))
    label = f"keys {keys}, values {values}"
    if rounded:
        detail = f"one dtype and 16 bits, by layer; used {dtype} instead"
        return Line(label, "not expressible", detail)
    if dtype == "auto":
        return Line(label, "kept", "16 bits")
    if (keys, values) not in _NEAREST:
        return Line(label, "not expressible", f"no such dtype; used {dtype} instead")
    scales = "scales of the checkpoint, else 1.0" if dtype == "fp8" else "a scale a token and head"
    return Line(label, "approximated", f"{dtype}: {scales}{grouping_text(*layers)}")


def _windows(plan: Plan) -> tuple[int, list[int], list[Line]]:
    """The window, the layers that have it, and what that loses."""
    context = plan.context_tokens
    rows = [[reach(option, context) for option in layer] for layer in plan.policy.heads]
    windowed = [layer for layer, reaches in enumerate(rows) if set(reaches) == {"window"}]
    sizes = {
        option.budget.resolve(context) for layer in windowed for option in plan.policy.heads[layer]
    } - {0}
    if not sizes:
        windowed = []
    heads = plan.facts.layers * plan.facts.kv_heads
    lines = [
        Line(f"method {name}, {count} of {heads} heads", "not expressible", _why_dropped(name))
        for name, count in dropped_methods(plan).items()
        if name != "full" or _beside_windows(rows, windowed)
    ]
    if windowed:
        detail = (
            f"{len(windowed)} layers slide a window of {max(sizes)} over prompt and answer, during "
            "the prompt too; kvtune trims once, when the prompt is complete"
        )
        lines.append(Line("window", "approximated", detail))
    if len(sizes) > 1:
        detail = f"one size; used {max(sizes)} instead of {sorted(sizes)}"
        lines.append(Line("window sizes", "not expressible", detail))
    return max(sizes, default=0), windowed, lines or [Line("tokens", "kept", "all of them")]


def _beside_windows(rows: list[list[Any]], windowed: list[int]) -> bool:
    return any("window" in row for layer, row in enumerate(rows) if layer not in windowed)


def _why_dropped(name: str) -> str:
    if name == "streaming_llm":
        return "no sinks, and a window without them harms; dropped, all tokens stay"
    if name == "full":
        return "windows are by layer, and other heads of the layer need more; all tokens stay"
    return "vLLM evicts nothing; dropped, all tokens stay"


def _overrides(layers: int, window: int, windowed: list[int]) -> dict[str, Any]:
    kinds = ["full_attention"] * layers
    for layer in windowed:
        kinds[layer] = "sliding_attention"
    return {"sliding_window": window, "layer_types": kinds}


def _bytes(plan: Plan, config: dict[str, Any], window: int, windowed: list[int]) -> int:
    """What vLLM allocates for one sequence of the full context, scales included, pages not."""
    exempt = {int(layer) for layer in config.get("kv-cache-dtype-skip-layers", [])}
    if config["kv-cache-dtype"].startswith("turboquant"):
        exempt |= {0, 1, plan.facts.layers - 2, plan.facts.layers - 1}
    batched = config.get("max-num-batched-tokens", 0)
    total = 0.0
    for layer in range(plan.facts.layers):
        tokens = plan.context_tokens
        if layer in windowed:
            tokens = min(tokens, window - 1 + batched)
        dtype = "auto" if layer in exempt else config["kv-cache-dtype"]
        total += tokens * plan.facts.kv_heads * _token_bytes(dtype, plan.facts.head_dim)
    return int(total)


def _token_bytes(dtype: str, head_dim: int) -> float:
    """Bytes of one token of one KV head, keys and values."""
    if dtype == "auto":
        return 4.0 * head_dim
    scales = 0.0 if dtype == "fp8" else 8.0  # a float32 each for keys and for values
    return head_dim * sum(DTYPES[dtype]) / 8 + scales


def _line(key: str, value: Any) -> str:
    """One key; only the overrides, a mapping, take several lines."""
    if isinstance(value, dict):
        return f"{key}:\n" + "".join("  " + _line(*entry) for entry in value.items())
    return f"{key}: {flow(value)}\n"
