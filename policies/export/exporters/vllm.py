"""vLLM: a YAML file for ``vllm serve --config``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from kvtune.common.vllm_releases import EXPORTED
from kvtune.common.yaml_tree import flow
from kvtune.policies.export.capacity import bytes_line, sequences_that_fit
from kvtune.policies.export.contract import Export, Exporter
from kvtune.policies.export.flatten import (
    Flat,
    Heads,
    dropped_methods,
    flatten,
    grouping_text,
    lost_exact_tokens,
    planned_heads,
    reach,
)
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.export.lines import Line, comment
from kvtune.policies.export.plan import Plan
from kvtune.policies.formats.token_head import Fp8TokenHead, Int4TokenHead, Int8TokenHead
from kvtune.policies.option import Option

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
_NEAREST = {
    ("fp8", "fp8"): "fp8", ("int8", "int8"): "int8_per_token_head",
    ("int4", "int4"): "int4_per_token_head",
    **{(f"{kind}_token_head",) * 2: f"{kind}_per_token_head" for kind in ("int8", "fp8", "int4")},
}  # fmt: skip
_OWN = Int8TokenHead(), Fp8TokenHead(), Int4TokenHead()
_STORED = frozenset({"bf16", *(name for pair in _NEAREST for name in pair)})
_NARROW = 12  # mean bits below which a layer is quantised
_BATCHED_TOKENS = 512
_PAGE = 32  # tokens of a block at most; 16 where all layers have one dtype


@dataclass(frozen=True)
class Vllm(Exporter):
    """One cache dtype with exempted layers, and one window size for chosen layers; no eviction."""

    name = "vllm"
    stack = "vLLM"
    stack_version = EXPORTED
    source = "vllm/config/cache.py, vllm/engine/arg_utils.py, vllm/models/llama.py"
    proof = "schema mirror"
    limits = EngineLimits(
        frozenset({"full"}), _STORED, _STORED, "layer", "layer",
        distinct_budgets=1, distinct_formats=1, keys_differ_from_values=False, own=_OWN,
    )  # fmt: skip

    def render(self, plan: Plan) -> Export:
        """The YAML and what it loses."""
        heads, allocator = planned_heads(plan)
        dtype, exempt, format_lines = _formats(plan)
        windows = _windows(heads, plan.context_tokens)
        dropped = _dropped_lines(plan, heads, windows)
        model, model_lines, model_notes = _model(plan)
        config: dict[str, Any] = {
            **model,
            "max-model-len": plan.sequence_tokens,
            "kv-cache-dtype": dtype,
        }
        if exempt:
            config["kv-cache-dtype-skip-layers"] = [str(layer) for layer in exempt]
        if windows:
            # A windowed layer is given window - 1 + this many tokens; the default saves nothing.
            config["max-num-batched-tokens"] = _BATCHED_TOKENS
            config["hf-overrides"] = _overrides(plan.facts.layers, windows)
        if plan.room_bytes is not None:
            config["kv-cache-memory-bytes"] = plan.room_bytes
        size = sequence_bytes(config, plan.facts.kv_heads, plan.facts.head_dim, plan.facts.layers)
        batch, sequences = sequences_that_fit(plan, self.stack, size)
        config["max-num-seqs"] = min(batch, config.get("max-num-batched-tokens", batch))
        check(config, plan.facts.layers)
        losses = [
            *dropped, *([allocator] if allocator.status != "kept" else []), *format_lines,
            *lost_exact_tokens(plan),
        ]  # fmt: skip
        header = [*self.header(plan, losses), *model_notes]
        text = comment(header) + "".join(_line(k, v) for k, v in config.items())
        prompt = _bytes(plan, config)
        notes = _NOTES + (_WINDOW_NOTES if windows else ()) + tuple(model_notes)
        others = [bytes_line(plan, prompt), sequences, *model_lines]
        held = prompt, config["max-num-seqs"]
        return self.done(plan, {"vllm.yaml": text}, losses, others, notes, held)


_NOTES = (
    "vllm serve --config vllm.yaml",
    "generated tokens are stored like the prompt's.",
    "kv-cache-memory-bytes, where given, is what the plan leaves for caches; it overrides "
    "gpu-memory-utilization.",
    "int4, int8 and fp8_per_token_head run on the Triton backend only; turboquant_* also exempts "
    "the first and the last two layers by itself.",
    "fp8 scales come from the checkpoint, else 1.0; calculate_kv_scales no longer exists.",
)
_WINDOW_NOTES = (
    "hf-overrides windows are read by Llama models; Qwen2 refuses mixed layer types, and Gemma, "
    "Granite, Cohere2 and gpt-oss read their own.",
    "leave disable-hybrid-kv-cache-manager unset: it would allocate every layer in full.",
)
_KEYS = {
    "model", "max-model-len", "max-num-seqs", "kv-cache-dtype", "kv-cache-dtype-skip-layers",
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
    for layer in config.get("kv-cache-dtype-skip-layers", []):
        if not (isinstance(layer, str) and layer.isdecimal() and int(layer) < layers):
            raise ValueError(f"kv-cache-dtype-skip-layers: {layer!r} is no layer of {layers}")
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
    if keys in {form.name for form in _OWN}:
        return Line(label, "kept", f"{dtype}: its own arithmetic")
    scales = "scales of the checkpoint, else 1.0" if dtype == "fp8" else "a scale a token and head"
    return Line(label, "approximated", f"{dtype}: {scales}{grouping_text(*layers)}")


def _model(plan: Plan) -> tuple[dict[str, str], list[Line], list[str]]:
    """How the model and its weights are named, lines on the weights, and what is left to say.

    vLLM quantises to fp8 when it loads; narrower weights have to be in the checkpoint, which the
    model's own id does not name.
    """
    weights = plan.weights
    in_checkpoint = weights not in ("", "bf16", "fp8")
    model = plan.given_model if in_checkpoint else plan.model
    named = {"model": model} if model else {}
    notes = [] if named else ["model is left out: vllm serve MODEL --config vllm.yaml"]
    if weights == "fp8":
        detail = "quantised when they are loaded, unless the checkpoint already is"
        return {**named, "quantization": "fp8"}, [Line("weights fp8", "kept", detail)], notes
    if in_checkpoint:
        detail = f"not quantised when loaded: the checkpoint has to hold {weights} weights"
        notes.append(f"the plan assumed {weights} weights: name a checkpoint that holds them.")
        return named, [Line(f"weights {weights}", "approximated", detail)], notes
    return named, [], notes


def _windows(heads: Heads, context: int) -> dict[int, int]:
    """The windows of layers whose heads keep the newest tokens and no others, or nothing."""
    rows = [[reach(option, context) for option in layer] for layer in heads]
    return {
        layer: max(each.window for each in reaches)
        for layer, reaches in enumerate(rows)
        if {"window"} <= {each.shape for each in reaches} <= {"window", "none"}
    }


def _dropped_lines(plan: Plan, heads: Heads, windows: dict[int, int]) -> list[Line]:
    """What becomes of methods that evict."""
    others = tuple(row for layer, row in enumerate(heads) if layer not in windows)
    dropped = dropped_methods(others, plan.context_tokens)
    count = plan.facts.layers * plan.facts.kv_heads
    lines = [
        Line(f"method {name}, {some} of {count} heads", "not expressible", _why_dropped(name))
        for name, some in dropped.items()
    ]
    if windows:
        widest = max(windows.values())
        detail = (
            f"{len(windows)} layers slide a window of {widest} over prompt and answer, during "
            "the prompt too; kvtune trims once, when the prompt is complete"
        )
        lines.append(Line("window", "approximated", detail))
        windowed = [option for layer in windows for option in heads[layer]]
        lines += _emptied_lines(windowed, plan, count)
        sizes = {reach(option, plan.context_tokens).window for option in windowed}
        if len(sizes) > 1:
            detail = f"one size; used {widest} instead of {sorted(sizes)}"
            lines.append(Line("window sizes", "not expressible", detail))
    return lines or [Line("tokens", "kept", "all of them")]


def _emptied_lines(windowed: list[Option], plan: Plan, count: int) -> list[Line]:
    """Heads that keep nothing of a prompt, in layers that vLLM can only give a window."""
    emptied = [each for each in windowed if reach(each, plan.context_tokens).shape == "none"]
    names = Counter(option.method.name for option in emptied)
    detail = "they keep nothing of the prompt; their layer has one window, which they get too"
    return [
        Line(f"method {name}, {some} of {count} heads", "not expressible", detail)
        for name, some in names.items()
    ]


def _why_dropped(name: str) -> str:
    if name == "streaming_llm":
        return "no sinks, and a window without them harms; dropped, all tokens stay"
    if name == "full":
        return "windows are by layer, and other heads of the layer need more; all tokens stay"
    return "vLLM evicts nothing; dropped, all tokens stay"


def _overrides(layers: int, windows: dict[int, int]) -> dict[str, Any]:
    kinds = ["sliding_attention" if at in windows else "full_attention" for at in range(layers)]
    return {"sliding_window": max(windows.values()), "layer_types": kinds}


def sequence_bytes(
    config: dict[str, Any], kv_heads: int, head_dim: int, layers: int, page: int = _PAGE
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


def _bytes(plan: Plan, config: dict[str, Any]) -> int:
    """Bytes of one prompt there, scales included, pages not."""
    context, (sliding, window) = plan.context_tokens, _sliding(config)
    few = min(context, window - 1 + config.get("max-num-batched-tokens", 0))
    return sum(
        int((few if layer in sliding else context)
            * plan.facts.kv_heads * _token_bytes(dtype, plan.facts.head_dim))
        for layer, dtype in enumerate(_dtypes(config, plan.facts.layers))
    )  # fmt: skip


def _sliding(config: dict[str, Any]) -> tuple[set[int], int]:
    """Layers that slide, and their window."""
    overrides = config.get("hf-overrides", {})
    kinds = overrides.get("layer_types", [])
    sliding = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    return sliding, overrides.get("sliding_window", 1)


def _dtypes(config: dict[str, Any], layers: int) -> list[str]:
    """Every layer's dtype; turboquant exempts the first and the last two layers by itself."""
    exempt = {int(layer) for layer in config.get("kv-cache-dtype-skip-layers", [])}
    if config["kv-cache-dtype"].startswith("turboquant"):
        exempt |= {0, 1, layers - 2, layers - 1}
    return ["auto" if at in exempt else config["kv-cache-dtype"] for at in range(layers)]


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
