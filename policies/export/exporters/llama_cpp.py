"""llama.cpp: an INI preset for llama-server, and the same as flags."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from kvtune.policies.export import engine_wide
from kvtune.policies.export.engine_wide import (
    CacheType,
    EngineWide,
    limits_of_types,
    one_of,
    positive,
    text,
)
from kvtune.policies.export.flatten import flatten, grouping_text
from kvtune.policies.export.lines import Line, comment
from kvtune.policies.export.plan import Plan
from kvtune.policies.format import Format
from kvtune.policies.formats.llama_cpp import Q4, Q8

TYPES = {"q4_0": 4.5, "q8_0": 8.5, "f16": 16.0}
"""Cache types that are used here, with bits an element, scales included.

Keys and values get the same one: of other pairs default CUDA builds have no attention kernel, and
compute on the CPU (llama.cpp issues 24485, 27109 and 28455).
"""
NEAREST = {"bf16": "f16", "int8": "q8_0", "int4": "q4_0"}
BLOCK = 32
CODES = {"q4_0": 4, "q8_0": 8, "f16": 16}
PADDING = 256  # a slot's context is rounded up to so many tokens
WHY_DROPPED = (
    "llama.cpp evicts nothing before a slot is full, and a slot holds prompt and answer whole"
)
SCHEMA = {
    "model": text,
    "ctx-size": positive,
    "parallel": positive,
    "flash-attn": one_of("auto", "on"),
    "cache-type-k": one_of(*TYPES),
    "cache-type-v": one_of(*TYPES),
}
_OWN: dict[str, Format] = {"q8_0": Q8(rotation="hadamard"), "q4_0": Q4(rotation="hadamard")}
_CACHE_TYPES = tuple(
    CacheType(
        name,
        (CODES[name], CODES[name]),
        lambda head_dim, bits=TYPES[name]: 2 * head_dim * bits / 8,  # type: ignore[misc]
        like,
        channels=1 if name == "f16" else BLOCK,
        own=_OWN.get(name),
    )
    for like, name in NEAREST.items()
)


@dataclass(frozen=True)
class LlamaCpp(EngineWide):
    """One type for all keys and values; nothing is evicted."""

    name = "llama-cpp"
    stack = "llama.cpp"
    stack_version = "0c1e57098bba (October 2026)"
    source = "common/arg.cpp, src/llama-context.cpp, tools/server/README.md"
    proof = "ran"
    types = _CACHE_TYPES
    limits = limits_of_types(_CACHE_TYPES)
    page_tokens = PADDING
    why_dropped = WHY_DROPPED
    notes = (
        "llama-server --models-preset llama-preset.ini; or the line in llama-server.txt",
        "ctx-size is shared by the slots: prompt and answer, times parallel.",
        "generated tokens are stored like the prompt's, in the types above.",
        "keys and values have the same type: with other pairs default CUDA builds compute "
        "attention on the CPU.",
        "the model must be a GGUF file.",
    )
    schema = SCHEMA

    def config(self, plan: Plan, chosen: CacheType, batch: int) -> dict[str, Any]:
        """Keys of the preset, which are llama-server's flags."""
        return {
            **({"model": plan.given_model} if plan.given_model else {}),
            "ctx-size": plan.sequence_tokens * batch,
            "parallel": batch,
            "flash-attn": "auto" if chosen.name == "f16" else "on",
            "cache-type-k": chosen.name,
            "cache-type-v": chosen.name,
        }

    def check(self, config: dict[str, Any], plan: Plan) -> None:
        """Also what keys break together, and heads that are no whole blocks."""
        check(config, plan.facts.head_dim)

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """The configuration file in llama-server's preset format."""
        lines = "".join(f"{key} = {value}\n" for key, value in config.items())
        return "llama-preset.ini", f"version = 1\n\n[kvtune]\n{lines}"

    def files(self, config: dict[str, Any], header: list[str]) -> dict[str, str]:
        """The preset, and the line that says the same in flags."""
        name, preset = self.file(config)
        return {
            name: comment(header, ";") + preset,
            "llama-server.txt": comment(header) + flags(config),
        }

    def format_lines(self, plan: Plan, chosen: CacheType) -> list[Line]:
        """Of keys and of values; how the policy groups keys belongs to theirs."""
        return _format_lines(plan, chosen.name)

    def model_lines(self, plan: Plan) -> list[str]:
        """The GGUF file that is to be named, and what its weights are to be."""
        return model_lines(plan)


def check(preset: dict[str, Any], head_dim: int) -> None:
    """What llama-server would refuse, or silently take wrongly, key by key and of keys together.

    Raises:
        ValueError: the preset breaks a rule of the stack.
    """
    engine_wide.check(preset, SCHEMA, "llama-server")
    for key in ("cache-type-k", "cache-type-v"):
        if preset[key] != "f16" and head_dim % BLOCK:
            raise ValueError(f"{key} {preset[key]} needs heads of a multiple of {BLOCK}")
    if preset["cache-type-k"] != preset["cache-type-v"]:
        raise ValueError("keys and values of different types fall back to the CPU")
    if preset["cache-type-v"] != "f16" and preset["flash-attn"] != "on":
        raise ValueError("quantised values need flash attention")


def _format_lines(plan: Plan, kind: str) -> list[Line]:
    """What becomes of keys and of values; how the policy groups keys belongs to theirs."""
    options = list(plan.policy.options())
    flat = flatten(options)
    sides = {
        "keys": (flat.key_formats, grouping_text(flat), {option.keys for option in options}),
        "values": (flat.value_formats, "", {option.values for option in options}),
    }
    return [
        _own_line(f"{side} {names[0]}", kind)
        if forms == {_OWN.get(kind)}
        else _format_line(plan, f"{side} {'/'.join(names)}", names, kind, grouping)
        for side, (names, grouping, forms) in sides.items()
    ]


def _own_line(label: str, kind: str) -> Line:
    return Line(label, "kept", f"{kind}: its own arithmetic, rotated before")


def _format_line(plan: Plan, label: str, names: tuple[str, ...], kind: str, grouping: str) -> Line:
    if names == ("bf16",) and kind == "f16":
        return Line(label, "kept", "16 bits, as f16")
    if why := _why_not(plan, names, kind):
        return Line(label, "not expressible", f"{why}; used {kind} instead", kind == "f16")
    detail = f"{kind}: blocks of {BLOCK} channels of a token, symmetric, one 16-bit scale"
    return Line(label, "approximated", detail + grouping)


def _why_not(plan: Plan, names: tuple[str, ...], kind: str) -> str:
    """Why keys or values of these formats are stored in a type that is not theirs; "" where not."""
    if len(names) > 1:
        return "one type for all heads"
    if names == ("bf16",):
        return "keys and values have one type"
    if plan.facts.head_dim % BLOCK:
        return f"heads of {plan.facts.head_dim} are no multiple of {BLOCK}"
    nearest = names[0] if names[0] in TYPES else NEAREST.get(names[0])
    if nearest is None:
        return "no such type"
    return "" if nearest == kind else "as wide as the other half needs, since both have one type"


def model_lines(plan: Plan) -> list[str]:
    """What is still to be said of the model: the file, and what its weights are to be."""
    lines = []
    if not plan.given_model:
        lines.append("model is left out: name the GGUF file of the model, model = PATH.gguf")
    if plan.weights:
        lines.append(f"the plan assumed {plan.weights} weights: take a GGUF of as few bits.")
    return lines


def flags(preset: dict[str, object]) -> str:
    """The line that starts the server."""
    given = [f"--{key} {shlex.quote(str(value))}" for key, value in preset.items()]
    return "llama-server " + " ".join(given) + "\n"
