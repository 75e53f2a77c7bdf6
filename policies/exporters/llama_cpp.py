"""llama.cpp: an INI preset for llama-server, and the same as flags."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from kvtune.policies.exporter import EngineLimits, Export, Exporter, Line, Plan, bytes_line, comment
from kvtune.policies.flatten import (
    dropped_methods,
    flatten,
    grouping_text,
    lost_refinements,
    reach,
)

TYPES = {"f16": 16.0, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}
"""Cache types that are used here, with bits an element, scales included."""
_NEAREST = {"bf16": "f16", "int8": "q8_0", "int4": "q4_0"}
_BLOCK = 32
_CODES = {"q4_0": 4, "q5_0": 5, "q8_0": 8, "f16": 16}


@dataclass(frozen=True)
class LlamaCpp(Exporter):
    """One type for all keys and one for all values; sinks when the context shifts; no eviction."""

    name = "llama-cpp"
    stack = "llama.cpp"
    stack_version = "0c1e57098bba (October 2026)"
    source = "common/arg.cpp, src/llama-context.cpp, tools/server/README.md"
    proof = "schema mirror"
    limits = EngineLimits(
        frozenset({"full"}), frozenset(_NEAREST), frozenset(_NEAREST), "engine", "engine",
        distinct_budgets=0, distinct_formats=1,
    )  # fmt: skip

    def render(self, plan: Plan) -> Export:
        """The preset, the flags and what they lose."""
        flat = flatten(list(plan.policy.options()))
        head_dim, grouping = plan.facts.head_dim, grouping_text(flat)
        keys, key_line = _type("keys", flat.key_formats, flat.key_bits, head_dim, grouping)
        values, value_line = _type("values", flat.value_formats, flat.value_bits, head_dim)
        settings, tokens_lines = _tokens(plan)
        preset: dict[str, object] = {
            "model": plan.model,
            "ctx-size": plan.sequence_tokens * plan.batch,
            "parallel": plan.batch,
            "flash-attn": "on" if values != "f16" else "auto",
            "cache-type-k": keys,
            "cache-type-v": values,
            **settings,
        }
        check(preset, head_dim)
        header = self.header(plan)
        files = {
            "llama-preset.ini": comment(header, ";") + _ini(preset),
            "llama-server.txt": comment(header) + _flags(preset),
        }
        report = [*tokens_lines, key_line, value_line, *lost_refinements(plan)]
        report.append(bytes_line(plan, _bytes(plan, keys, values)))
        return self.done(files, report, _NOTES)


_NOTES = (
    "llama-server --models-preset llama-preset.ini; or the line in llama-server.txt",
    "ctx-size is shared by the slots: context times parallel.",
    "generated tokens are stored like the prompt's, in the types above.",
    "the model must be a GGUF file.",
)


def check(preset: dict[str, object], head_dim: int) -> None:
    """What llama-server would refuse, or silently take wrongly.

    Raises:
        ValueError: the preset breaks a rule of the stack.
    """
    known = {
        "model", "ctx-size", "parallel", "flash-attn", "cache-type-k", "cache-type-v",
        "context-shift", "keep",
    }  # fmt: skip
    if unknown := set(preset) - known:
        raise ValueError(f"no flags of llama-server: {sorted(unknown)}")
    for key in ("cache-type-k", "cache-type-v"):
        if preset[key] not in TYPES:
            raise ValueError(f"{key} cannot be {preset[key]}")
        if preset[key] != "f16" and head_dim % _BLOCK:
            raise ValueError(f"{key} {preset[key]} needs heads of a multiple of {_BLOCK}")
    if preset["cache-type-v"] != "f16" and preset["flash-attn"] != "on":
        raise ValueError("quantised values need flash attention")


def _type(
    role: str, names: tuple[str, ...], bits: float, head_dim: int, grouping: str = ""
) -> tuple[str, Line]:
    """The cache type for all heads' keys or values; ``grouping`` is how the policy differs."""
    label = f"{role} {'/'.join(names)}"
    wide_enough = next(name for name, codes in _CODES.items() if codes >= bits)
    chosen = _NEAREST.get(names[0], wide_enough) if len(names) == 1 else wide_enough
    if chosen != "f16" and head_dim % _BLOCK:
        detail = f"heads of {head_dim} are no multiple of {_BLOCK}; used f16 instead"
        return "f16", Line(label, "not expressible", detail)
    if len(names) > 1:
        detail = f"one type for all heads; used {chosen} instead (the mean is {bits:.1f} bits)"
        return chosen, Line(label, "not expressible", detail)
    if chosen == "f16":
        return chosen, Line(label, "kept", "16 bits, as f16")
    if names[0] not in _NEAREST:
        return chosen, Line(label, "not expressible", f"no such type; used {chosen} instead")
    detail = f"{chosen}: blocks of {_BLOCK} channels of a token, symmetric, one 16-bit scale"
    return chosen, Line(label, "approximated", detail + grouping)


def _tokens(plan: Plan) -> tuple[dict[str, object], list[Line]]:
    """Settings and lines for what is evicted."""
    reaches = {reach(option, plan.context_tokens) for option in plan.policy.options()}
    if reaches == {"all"}:
        return {}, [Line("tokens", "kept", "all of them")]
    if reaches == {"sinks"}:
        sinks = max(getattr(option.method, "sinks", 0) for option in plan.policy.options())
        detail = (
            f"the first {sinks} tokens are kept when the context is full and half of the rest is "
            "dropped; until then nothing is evicted, so the budget is not kept"
        )
        line = Line("method streaming_llm", "approximated", detail)
        return {"context-shift": "true", "keep": sinks}, [line]
    heads = plan.facts.layers * plan.facts.kv_heads
    detail = "llama.cpp evicts nothing here; dropped, all tokens stay"
    return {}, [
        Line(f"method {name}, {count} of {heads} heads", "not expressible", detail)
        for name, count in dropped_methods(plan).items()
    ]


def _bytes(plan: Plan, keys: str, values: str) -> int:
    elements = plan.facts.layers * plan.facts.kv_heads * plan.facts.head_dim * plan.context_tokens
    return int(elements * (TYPES[keys] + TYPES[values]) / 8)


def _ini(preset: dict[str, object]) -> str:
    lines = "".join(f"{key} = {value}\n" for key, value in preset.items())
    return f"version = 1\n\n[kvtune]\n{lines}"


def _flags(preset: dict[str, object]) -> str:
    flags = [
        f"--{key}" if value == "true" else f"--{key} {shlex.quote(str(value))}"
        for key, value in preset.items()
    ]
    return "llama-server " + " ".join(flags) + "\n"
