"""llama.cpp: an INI preset for llama-server, and the same as flags."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from kvtune.policies.export.capacity import bytes_line, sequences_that_fit
from kvtune.policies.export.contract import Export, Exporter
from kvtune.policies.export.flatten import (
    dropped_methods,
    flatten,
    grouping_text,
    lost_exact_tokens,
    planned_heads,
)
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.export.lines import Line, comment
from kvtune.policies.export.plan import Plan

TYPES = {"q4_0": 4.5, "q8_0": 8.5, "f16": 16.0}
"""Cache types that are used here, with bits an element, scales included.

Keys and values get the same one: of other pairs default CUDA builds have no attention kernel, and
compute on the CPU (llama.cpp issues 24485, 27109 and 28455).
"""
NEAREST = {"bf16": "f16", "int8": "q8_0", "int4": "q4_0"}
BLOCK = 32
CODES = {"q4_0": 4, "q8_0": 8, "f16": 16}
PADDING = 256  # a slot's context is rounded up to so many tokens


@dataclass(frozen=True)
class LlamaCpp(Exporter):
    """One type for all keys and values; nothing is evicted."""

    name = "llama-cpp"
    stack = "llama.cpp"
    stack_version = "0c1e57098bba (October 2026)"
    source = "common/arg.cpp, src/llama-context.cpp, tools/server/README.md"
    proof = "schema mirror"
    limits = EngineLimits(
        frozenset({"full"}), frozenset(NEAREST), frozenset(NEAREST), "engine", "engine",
        distinct_budgets=0, distinct_formats=1, keys_differ_from_values=False,
    )  # fmt: skip

    def render(self, plan: Plan) -> Export:
        """The preset, the flags and what they lose."""
        heads, allocator = planned_heads(plan)
        head_dim = plan.facts.head_dim
        kind = _type(plan)
        size = _bytes(plan, kind, -(-plan.sequence_tokens // PADDING) * PADDING)
        batch, sequences = sequences_that_fit(plan, self.stack, size)
        preset: dict[str, object] = {
            **({"model": plan.given_model} if plan.given_model else {}),
            "ctx-size": plan.sequence_tokens * batch,
            "parallel": batch,
            "flash-attn": "auto" if kind == "f16" else "on",
            "cache-type-k": kind,
            "cache-type-v": kind,
        }
        check(preset, head_dim)
        dropped = dropped_methods(heads, plan.context_tokens)
        losses = [
            *token_lines(plan, dropped),
            *([allocator] if allocator.status != "kept" else []),
            *_format_lines(plan, kind),
            *lost_exact_tokens(plan),
        ]
        header = [*self.header(plan, losses), *model_lines(plan)]
        files = {
            "llama-preset.ini": comment(header, ";") + _ini(preset),
            "llama-server.txt": comment(header) + flags(preset),
        }
        prompt = _bytes(plan, kind, plan.context_tokens)
        notes = _NOTES + tuple(model_lines(plan))
        return self.done(
            plan, files, losses, [bytes_line(plan, prompt), sequences], notes, (prompt, batch)
        )


_NOTES = (
    "llama-server --models-preset llama-preset.ini; or the line in llama-server.txt",
    "ctx-size is shared by the slots: prompt and answer, times parallel.",
    "generated tokens are stored like the prompt's, in the types above.",
    "keys and values have the same type: with other pairs default CUDA builds compute attention on "
    "the CPU.",
    "the model must be a GGUF file.",
)


def check(preset: dict[str, object], head_dim: int) -> None:
    """What llama-server would refuse, or silently take wrongly.

    Raises:
        ValueError: the preset breaks a rule of the stack.
    """
    known = {"model", "ctx-size", "parallel", "flash-attn", "cache-type-k", "cache-type-v"}
    if unknown := set(preset) - known:
        raise ValueError(f"no flags of llama-server: {sorted(unknown)}")
    for key in ("cache-type-k", "cache-type-v"):
        if preset[key] not in TYPES:
            raise ValueError(f"{key} cannot be {preset[key]}")
        if preset[key] != "f16" and head_dim % BLOCK:
            raise ValueError(f"{key} {preset[key]} needs heads of a multiple of {BLOCK}")
    if preset["cache-type-k"] != preset["cache-type-v"]:
        raise ValueError("keys and values of different types fall back to the CPU")
    if preset["cache-type-v"] != "f16" and preset["flash-attn"] != "on":
        raise ValueError("quantised values need flash attention")


def _type(plan: Plan) -> str:
    """The narrowest cache type that has enough bits for keys and for values, in the mean."""
    flat = flatten(list(plan.policy.options()))
    if plan.facts.head_dim % BLOCK:
        return "f16"
    needed = max(flat.key_bits, flat.value_bits)
    return next(name for name, codes in CODES.items() if codes >= needed)


def _format_lines(plan: Plan, kind: str) -> list[Line]:
    """What becomes of keys and of values; how the policy groups keys belongs to theirs."""
    flat = flatten(list(plan.policy.options()))
    return [
        _format_line(plan, f"keys {'/'.join(flat.key_formats)}", flat.key_formats, kind,
                     grouping_text(flat)),
        _format_line(plan, f"values {'/'.join(flat.value_formats)}", flat.value_formats, kind, ""),
    ]  # fmt: skip


def _format_line(plan: Plan, label: str, names: tuple[str, ...], kind: str, grouping: str) -> Line:
    if len(names) > 1:
        return Line(label, "not expressible", f"one type for all heads; used {kind} instead")
    if names == ("bf16",):
        if kind == "f16":
            return Line(label, "kept", "16 bits, as f16")
        return Line(label, "not expressible", f"keys and values have one type; used {kind} instead")
    if plan.facts.head_dim % BLOCK:
        detail = f"heads of {plan.facts.head_dim} are no multiple of {BLOCK}; used f16 instead"
        return Line(label, "not expressible", detail)
    nearest = NEAREST.get(names[0])
    if nearest is None:
        return Line(label, "not expressible", f"no such type; used {kind} instead")
    detail = f"{kind}: blocks of {BLOCK} channels of a token, symmetric, one 16-bit scale"
    if nearest != kind:
        detail = f"as wide as the other half needs, since both have one type; used {kind} instead"
        return Line(label, "not expressible", detail)
    return Line(label, "approximated", detail + grouping)


def token_lines(plan: Plan, dropped: dict[str, int]) -> list[Line]:
    """What becomes of methods that evict."""
    if not dropped:
        return [Line("tokens", "kept", "all of them")]
    heads = plan.facts.layers * plan.facts.kv_heads
    detail = (
        "dropped, all tokens stay: llama.cpp evicts nothing before a slot is full, and a slot "
        "holds prompt and answer whole"
    )
    return [
        Line(f"method {name}, {count} of {heads} heads", "not expressible", detail)
        for name, count in dropped.items()
    ]


def model_lines(plan: Plan) -> list[str]:
    """What is still to be said of the model: the file, and what its weights are to be."""
    lines = []
    if not plan.given_model:
        lines.append("model is left out: name the GGUF file of the model, model = PATH.gguf")
    if plan.weights:
        lines.append(f"the plan assumed {plan.weights} weights: take a GGUF of as few bits.")
    return lines


def _bytes(plan: Plan, kind: str, tokens: int) -> int:
    elements = plan.facts.layers * plan.facts.kv_heads * plan.facts.head_dim * tokens
    return int(elements * 2 * TYPES[kind] / 8)


def _ini(preset: dict[str, object]) -> str:
    lines = "".join(f"{key} = {value}\n" for key, value in preset.items())
    return f"version = 1\n\n[kvtune]\n{lines}"


def flags(preset: dict[str, object]) -> str:
    """The line that starts the server."""
    given = [f"--{key} {shlex.quote(str(value))}" for key, value in preset.items()]
    return "llama-server " + " ".join(given) + "\n"
