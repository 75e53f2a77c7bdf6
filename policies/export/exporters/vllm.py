"""vLLM: a YAML file for ``vllm serve --config``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from kvtune.common.vllm_releases import EXPORTED
from kvtune.policies.export.capacity import bytes_line, sequences_that_fit
from kvtune.policies.export.contract import Export, Exporter
from kvtune.policies.export.flatten import (
    Heads,
    dropped_methods,
    lost_exact_tokens,
    planned_heads,
    reach,
)
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.export.lines import Line, comment
from kvtune.policies.export.plan import Plan
from kvtune.policies.export.vllm_config import check, line, prompt_bytes, sequence_bytes
from kvtune.policies.export.vllm_formats import OWN, STORED, formats, running
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy

_BATCHED_TOKENS = 512


@dataclass(frozen=True)
class Vllm(Exporter):
    """One cache dtype, and one window size for chosen layers; nothing is evicted."""

    name = "vllm"
    stack = "vLLM"
    stack_version = EXPORTED
    source = "vllm/config/cache.py, vllm/engine/arg_utils.py, vllm/models/llama.py"
    proof = "ran"
    limits = EngineLimits(
        frozenset({"full"}), STORED, STORED, "layer", "engine",
        distinct_budgets=1, distinct_formats=1, keys_differ_from_values=False, own=OWN,
        stores_alike=True,
    )  # fmt: skip

    def render(self, plan: Plan) -> Export:
        """The YAML and what it loses."""
        heads, allocator = planned_heads(plan)
        dtype, format_line = formats(plan)
        windows = _windows(heads, plan.context_tokens)
        dropped = _dropped_lines(plan, heads, windows)
        model, model_lines, model_notes = _model(plan)
        config: dict[str, Any] = {
            **model,
            "max-model-len": plan.sequence_tokens,
            "kv-cache-dtype": dtype,
        }
        if windows:
            # A windowed layer is given window - 1 + this many tokens; the default saves nothing.
            config["max-num-batched-tokens"] = _BATCHED_TOKENS
            config["hf-overrides"] = _overrides(plan.facts.layers, windows)
        if plan.room_bytes is not None:
            config["kv-cache-memory-bytes"] = plan.room_bytes
        shape = plan.facts.kv_heads, plan.facts.head_dim, plan.facts.layers
        size = sequence_bytes(config, *shape)
        batch, sequences = sequences_that_fit(plan, self.stack, size)
        config["max-num-seqs"] = min(batch, config.get("max-num-batched-tokens", batch))
        check(config, plan.facts.layers)
        losses = [
            *dropped, *([allocator] if allocator.status != "kept" else []), format_line,
            *lost_exact_tokens(plan),
        ]  # fmt: skip
        header = [*self.header(plan, losses), *model_notes]
        text = comment(header) + "".join(line(k, v) for k, v in config.items())
        prompt = prompt_bytes(config, *shape, plan.context_tokens)
        notes = _NOTES + (_WINDOW_NOTES if windows else ()) + tuple(model_notes)
        others = [bytes_line(plan, prompt), sequences, *model_lines]
        held = prompt, config["max-num-seqs"], size
        return self.done(plan, {"vllm.yaml": text}, losses, others, notes, held)

    def runs(self, plan: Plan) -> Policy | None:
        """All tokens in one dtype; a window's loss is not known."""
        heads, _ = planned_heads(plan)
        windows = _windows(heads, plan.context_tokens)
        return None if windows else running(plan, formats(plan)[0])


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
