"""ik_llama.cpp: flags for its llama-server, with other cache types in the first and last layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from kvtune.policies.export.capacity import bytes_line, sequences_that_fit
from kvtune.policies.export.contract import Export, Exporter, whole_prompts
from kvtune.policies.export.engine_wide import token_lines
from kvtune.policies.export.exporters.llama_cpp import (
    BLOCK,
    CODES,
    NEAREST,
    PADDING,
    TYPES,
    WHY_DROPPED,
    flags,
    model_lines,
)
from kvtune.policies.export.flatten import (
    dropped_methods,
    flatten,
    lost_exact_tokens,
    planned_heads,
)
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.export.lines import Line, comment
from kvtune.policies.export.plan import Plan
from kvtune.policies.policy import Policy

_ORDER = tuple(CODES)  # from narrow to wide


@dataclass(frozen=True)
class Ends:
    """Cache types by layer, as this stack can tell them apart.

    Args:
        between: of all layers but those at the ends.
        first: type and number of the first layers.
        last: likewise of the last ones.
    """

    between: str
    first: tuple[str, int] = ("", 0)
    last: tuple[str, int] = ("", 0)

    def kinds(self, layers: int) -> list[str]:
        """The type of each layer's cache."""
        (first, n), (last, m) = self.first, self.last
        return [first] * n + [self.between] * (layers - n - m) + [last] * m


@dataclass(frozen=True)
class IkLlama(Exporter):
    """One type for keys and values of most layers, wider ones at both ends; nothing is evicted."""

    name = "ik-llama"
    stack = "ik_llama.cpp"
    stack_version = "007d640098cb (2026)"
    source = "common/common.cpp; pull request 1599"
    proof = "schema mirror"
    limits = EngineLimits(
        frozenset({"full"}), frozenset(NEAREST), frozenset(NEAREST), "engine", "engine",
        distinct_budgets=0, distinct_formats=1, keys_differ_from_values=False,
    )  # fmt: skip

    def render(self, plan: Plan) -> Export:
        """The flags and what they lose."""
        heads, allocator = planned_heads(plan)
        ends = _ends(plan)
        kinds = ends.kinds(plan.facts.layers)
        size = _bytes(plan, kinds, -(-plan.sequence_tokens // PADDING) * PADDING)
        batch, sequences = sequences_that_fit(plan, self.stack, size)
        config = _config(plan, ends, batch)
        check(config, plan.facts.layers)
        losses = [
            *token_lines(plan, dropped_methods(heads, plan.context_tokens), WHY_DROPPED),
            *([allocator] if allocator.status != "kept" else []),
            _format_line(plan, ends, kinds),
            *lost_exact_tokens(plan),
        ]
        header = comment([*self.header(plan, losses), *model_lines(plan)])
        prompt = _bytes(plan, kinds, plan.context_tokens)
        notes = (*_NOTES, *model_lines(plan))
        return self.done(
            plan, {"ik-llama-server.txt": header + flags(config)}, losses,
            [bytes_line(plan, prompt), sequences], notes, (prompt, batch, size),
        )  # fmt: skip

    def runs(self, plan: Plan) -> Policy | None:
        """Known where every layer has 16 bits."""
        kinds = set(_ends(plan).kinds(plan.facts.layers))
        return whole_prompts(plan.facts) if kinds == {"f16"} else None


_NOTES = (
    "the line in ik-llama-server.txt starts ik_llama.cpp's llama-server; llama.cpp's does not know "
    "the types of first and last layers.",
    "ctx-size is shared by the slots: prompt and answer, times parallel.",
    "the model must be a GGUF file.",
)


def ends_for(needed: list[str]) -> Ends:
    """The smallest cache in which every layer has the type that it needs, or a wider one."""
    ranks, count = [_ORDER.index(name) for name in needed], len(needed)
    best: tuple[float, int, Ends] | None = None
    for n in range(count):
        for m in range(count - n):
            parts = ranks[:n], ranks[n : count - m], ranks[count - m :]
            first, between, last = (max(part, default=0) for part in parts)
            ends = Ends(
                _ORDER[between],
                (_ORDER[first], n) if n else ("", 0),
                (_ORDER[last], m) if m else ("", 0),
            )
            bits = sum(TYPES[kind] for kind in ends.kinds(count))
            if best is None or (bits, n + m) < best[:2]:
                best = bits, n + m, ends
    if best is None:
        raise ValueError("a model without layers")
    return best[2]


def check(config: dict[str, object], layers: int) -> None:
    """What ik_llama.cpp would refuse, or silently take wrongly.

    Raises:
        ValueError: the flags break a rule of the stack.
    """
    ended = 0
    for key, value in config.items():
        name, _, number = str(value).partition(",")
        if key in ("cache-type-k", "cache-type-v") and value not in TYPES:
            raise ValueError(f"{key} cannot be {value}")
        if key.startswith("cache-type-") and key.endswith(("-first", "-last")):
            if name not in TYPES or not number.isdecimal() or int(number) < 1:
                raise ValueError(f"{key} is a type, a comma and layers, not {value}")
            ended += int(number) * ("-k-" in key)
    if ended >= layers:
        raise ValueError(f"first and last layers are {ended} of {layers}")


def _config(plan: Plan, ends: Ends, batch: int) -> dict[str, object]:
    config: dict[str, object] = {"model": plan.given_model} if plan.given_model else {}
    config |= {"ctx-size": plan.sequence_tokens * batch, "parallel": batch, "flash-attn": "on"}
    for half in "kv":
        config[f"cache-type-{half}"] = ends.between
        for place, (kind, number) in (("first", ends.first), ("last", ends.last)):
            if number:
                config[f"cache-type-{half}-{place}"] = f"{kind},{number}"
    return config


def _ends(plan: Plan) -> Ends:
    """The types that the plan's layers get."""
    return ends_for([_needed(plan, layer) for layer in range(plan.facts.layers)])


def _needed(plan: Plan, layer: int) -> str:
    """The narrowest type with enough bits for a layer's keys and values, in the mean."""
    if plan.facts.head_dim % BLOCK:
        return _ORDER[-1]
    flat = flatten(list(plan.policy.heads[layer]))
    bits = max(flat.key_bits, flat.value_bits)
    return next(name for name in _ORDER if CODES[name] >= bits)


def _format_line(plan: Plan, ends: Ends, kinds: list[str]) -> Line:
    """What becomes of the formats of all layers."""
    rows = [{form.name for o in row for form in (o.keys, o.values)} for row in plan.policy.heads]
    names = sorted(set().union(*rows))
    label = f"keys and values {'/'.join(names)}"
    runs = [kinds[0], *(b for a, b in pairwise(kinds) if a != b)]
    used = ", ".join(runs)
    if names == ["bf16"]:
        return Line(label, "kept", "16 bits, as f16")
    near = all(
        len(row) == 1 and NEAREST.get(next(iter(row))) == kind
        for row, kind in zip(rows, kinds, strict=True)
    )
    if near:
        detail = f"{used}: blocks of {BLOCK} channels of a token, symmetric, one 16-bit scale"
        return Line(label, "approximated", detail)
    detail = f"a layer has one type, and only the ends differ; used {used} by layer instead"
    return Line(label, "not expressible", detail, set(kinds) == {"f16"})


def _bytes(plan: Plan, kinds: list[str], tokens: int) -> int:
    elements = 2 * plan.facts.kv_heads * plan.facts.head_dim * tokens
    return int(sum(elements * TYPES[kind] / 8 for kind in kinds))
