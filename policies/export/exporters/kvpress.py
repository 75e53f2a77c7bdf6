"""NVIDIA kvpress: the press that drops a prompt's tokens, and its ratio in every layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kvtune.policies.export.capacity import bytes_line
from kvtune.policies.export.contract import Export, Exporter, whole_prompts
from kvtune.policies.export.flatten import Heads, dropped_methods, planned_heads, reach
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.export.lines import Line
from kvtune.policies.export.plan import Plan
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy

_SIXTEEN = frozenset({"bf16"})
_NOTES = (
    "import json, kvpress; told = json.load(open('kvpress.json')); "
    "press = getattr(kvpress, told['press'])(**told['settings']); "
    "press = kvpress.PerLayerCompressionPress(press, told['compression_ratios'])",
    "with press(model): model(input_ids, past_key_values=DynamicCache()); then generate from it",
    "load the model with attn_implementation='sdpa'; batches without padding, transformers < 5.3.",
    "ratios hold for prompts as long as the plan's; the answer's tokens all stay.",
)


@dataclass(frozen=True)
class KVPress(Exporter):
    """One press for the model and a ratio a layer, in 16 bits.

    A press that keeps other tokens in every head (AdaKV, DuoAttention) only masks the others, and
    saves no memory.
    """

    name = "kvpress"
    stack = "NVIDIA kvpress"
    stack_version = "0.5.5"
    source = "kvpress/presses/per_layer_compression_press.py, scorer_press.py"
    proof = "ran"
    limits = EngineLimits(
        frozenset({"full", "streaming_llm", "snapkv"}), _SIXTEEN, _SIXTEEN,
        budgets="layer", formats="engine", distinct_formats=0,
    )  # fmt: skip

    def render(self, plan: Plan) -> Export:
        """The press and its ratios."""
        heads, allocator = planned_heads(plan)
        press, settings, tokens_lines = _press(heads, plan.context_tokens)
        kept = [_kept(layer, plan.context_tokens) if press else None for layer in heads]
        losses = [
            *tokens_lines,
            *(_budget_lines(heads, plan.context_tokens) if press else []),
            *([allocator] if allocator.status != "kept" else []),
            *_format_lines(list(plan.policy.options())),
        ]
        told = {
            "header": self.header(plan, losses),
            "press": press or "StreamingLLMPress",
            "settings": settings,
            "compression_ratios": [_ratio(each, plan.context_tokens) for each in kept],
        }
        tokens = sum(plan.context_tokens if each is None else each for each in kept)
        size = tokens * plan.facts.kv_heads * 4 * plan.facts.head_dim
        files = {"kvpress.json": json.dumps(told, indent=1) + "\n"}
        return self.done(plan, files, losses, [bytes_line(plan, size)], _NOTES, (size, None, 0))

    def runs(self, plan: Plan) -> Policy | None:
        """Known where no press drops anything."""
        press, _, _ = _press(planned_heads(plan)[0], plan.context_tokens)
        return None if press else whole_prompts(plan.facts)


def _press(heads: Heads, context: int) -> tuple[str, dict[str, Any], list[Line]]:
    """The one press of all heads that drop tokens; "" and what is lost where there is none."""
    options = [option for layer in heads for option in layer]
    presses = {_one_press(option, context) for option in options} - {None}
    if len(presses) == 1 and () not in presses:
        ((name, settings, status, detail),) = presses
        dropping = dropped_methods(heads, context)
        return name, dict(settings), [Line(f"method {m}", status, detail) for m in dropping]
    if not presses:
        return "", {}, [Line("tokens", "kept", "all of them")]
    why = "one press for all heads" if len(presses) > 1 else "no such press"
    return "", {}, [
        Line(f"method {name}, {count} of {len(options)} heads", "not expressible",
             f"{why}; dropped, all tokens stay")
        for name, count in dropped_methods(heads, context).items()
    ]  # fmt: skip


def _one_press(option: Option, context: int) -> Any:
    """Name, settings, status and detail of an option's press; () of one that kvpress has not.

    None where all tokens stay.
    """
    kept, method = reach(option, context), option.method
    if kept.shape == "all":
        return None
    if kept.shape in ("window", "sinks+window", "none"):
        renumbered = isinstance(method, StreamingLLM) and method.positions != "kept"
        settings = (("n_sink", kept.sinks),)
        if kept.shape == "none":
            return "StreamingLLMPress", settings, "approximated", "one token stays at least"
        if renumbered:
            detail = "keys stay at the positions that they were computed at"
            return "StreamingLLMPress", settings, "approximated", detail
        return "StreamingLLMPress", settings, "kept", "the same tokens"
    if isinstance(method, SnapKV) and method.recent is None:
        observed = ("window_size", method.window), ("kernel_size", method.kernel)
        same = method.pooling == "mean" and method.group == "pooled"
        detail = "the same scores" if same else "its scores pool by mean, within a query head"
        return "SnapKVPress", observed, "kept" if same else "approximated", detail
    return ()


def _kept(layer: Sequence[Option], context: int) -> int:
    """Tokens that each head of a layer keeps: what they keep in the mean, one at least."""
    return max(1, round(fmean(option.budget.resolve(context) for option in layer)))


def _ratio(kept: int | None, context: int) -> float:
    """Of which kvpress, which rounds down, makes these tokens."""
    return 0.0 if kept is None or kept >= context else round(1 - (kept + 0.5) / context, 9)


def _budget_lines(heads: Heads, context: int) -> list[Line]:
    """Whether each layer's heads keep as many tokens as the plan says."""
    budgets = [{option.budget.resolve(context) for option in layer} for layer in heads]
    if all(len(layer) == 1 and min(layer) > 0 for layer in budgets):
        return [Line("budgets", "kept", f"a ratio a layer, for a prompt of {context} tokens")]
    return [Line("budgets", "approximated", "a layer's heads keep what they keep in the mean")]


def _format_lines(options: Sequence[Option]) -> list[Line]:
    """What becomes of formats: 16 bits."""
    keys, values = ("/".join(dict.fromkeys(names)) for names in zip(
        *((option.keys.name, option.values.name) for option in options), strict=True
    ))  # fmt: skip
    if keys == values == "bf16":
        return [Line("keys and values bf16", "kept", "16 bits")]
    detail = "presses and quantised layers do not go together; 16 bits instead"
    return [Line(f"keys {keys}, values {values}", "not expressible", detail, wider=True)]
