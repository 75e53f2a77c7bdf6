"""Exporters of stacks that store the whole cache in one of a few types and evict nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

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
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy

Rule = Callable[[Any], bool]


@dataclass(frozen=True)
class CacheType:
    """One type of the whole cache.

    Args:
        name: as the stack calls it.
        bits: codes of keys, and of values.
        token_bytes: of one token of one KV head, keys and values with their scales, by head
            dimension.
        like: the name of kvtune's format that it is nearest to.
        detail: what differs from that.
        channels: that a head must be a multiple of.
        own: the format that is the type's own arithmetic, where there is one.
    """

    name: str
    bits: tuple[int, int]
    token_bytes: Callable[[int], float]
    like: str
    detail: str = ""
    channels: int = 1
    own: Format | None = None


def sixteen_bits(name: str) -> CacheType:
    """The engine's name of an uncompressed cache."""
    return CacheType(name, (16, 16), lambda head_dim: 4.0 * head_dim, "bf16", "16 bits")


def asymmetric(name: str, bits: int, scale_bytes: float) -> CacheType:
    """Integers with a scale and a zero point a token and head.

    Args:
        name: as the stack calls it.
        bits: of a code.
        scale_bytes: of a token and head, keys' and values' scales and zero points together.
    """
    return CacheType(
        name,
        (bits, bits),
        lambda head_dim: 2 * head_dim * bits / 8 + scale_bytes,
        f"int{bits}",
        "asymmetric, a scale and a zero point a token and head",
    )


def limits_of_types(types: tuple[CacheType, ...]) -> EngineLimits:
    """What a stack with these types can take; one whose arithmetic is known stores all alike."""
    own = tuple(each.own for each in types if each.own is not None)
    stored = frozenset((*(each.like for each in types), *(form.name for form in own)))
    return EngineLimits(
        frozenset({"full"}), stored, stored, "engine", "engine", distinct_budgets=0,
        distinct_formats=1, keys_differ_from_values=False, own=own, stores_alike=bool(own),
    )  # fmt: skip


@dataclass(frozen=True)
class EngineWide(Exporter):
    """Takes the narrowest type with enough bits for keys and for values, in the mean.

    ``types`` go from wide to narrow; the first takes heads of any size. ``schema`` has a rule for
    each key that the files may hold: what the stack refuses, and what it takes silently though it
    is wrong. ``page_tokens`` is what a sequence is rounded up to.
    """

    types: ClassVar[tuple[CacheType, ...]]
    schema: ClassVar[dict[str, Rule]]
    page_tokens: ClassVar[int] = 1
    why_dropped: ClassVar[str]
    notes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def config(self, plan: Plan, chosen: CacheType, batch: int) -> dict[str, Any]:
        """Keys of ``schema`` and their values."""

    @abstractmethod
    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """The name and the text of the file, without its header."""

    def files(self, config: dict[str, Any], header: list[str]) -> dict[str, str]:
        """All files, each under the header."""
        name, text = self.file(config)
        return {name: comment(header) + text}

    def format_lines(self, plan: Plan, chosen: CacheType) -> list[Line]:
        """What becomes of the formats of keys and values."""
        return [_format_line(plan, chosen, self.types)]

    def model_lines(self, plan: Plan) -> list[str]:
        """What is still to be said of the model and its weights."""
        return model_lines(plan)

    def check(self, config: dict[str, Any], plan: Plan) -> None:
        """Refuse what the stack would refuse, or silently take wrongly."""
        check(config, self.schema, self.stack)

    def render(self, plan: Plan) -> Export:
        """The file and what it loses."""
        heads, allocator = planned_heads(plan)
        chosen = self._chosen(plan)
        page = self.page_tokens
        size = _bytes(plan, chosen, -(-plan.sequence_tokens // page) * page)
        batch, sequences = sequences_that_fit(plan, self.stack, size)
        config = self.config(plan, chosen, batch)
        self.check(config, plan)
        losses = [
            *token_lines(plan, dropped_methods(heads, plan.context_tokens), self.why_dropped),
            *([allocator] if allocator.status != "kept" else []),
            *self.format_lines(plan, chosen),
            *lost_exact_tokens(plan),
        ]
        of_model = self.model_lines(plan)
        files = self.files(config, [*self.header(plan, losses), *of_model])
        bytes_ = _bytes(plan, chosen, plan.context_tokens)
        held = bytes_, batch, size
        others = [bytes_line(plan, bytes_), sequences]
        return self.done(plan, files, losses, others, (*self.notes, *of_model), held)

    def runs(self, plan: Plan) -> Policy | None:
        """All tokens in the chosen type, where its arithmetic is known."""
        chosen = self._chosen(plan)
        form = Bf16() if chosen.bits == (16, 16) else chosen.own
        option = Option(keys=form, values=form) if form else None
        return Policy.uniform(option, plan.facts.layers, plan.facts.kv_heads) if option else None

    def _chosen(self, plan: Plan) -> CacheType:
        flat = flatten(list(plan.policy.options()))
        needed = flat.key_bits, flat.value_bits
        enough = [
            each for each in self.types
            if all(has >= min(wants, 16) for has, wants in zip(each.bits, needed, strict=True))
            and plan.facts.head_dim % each.channels == 0
        ]  # fmt: skip
        return enough[-1]


def _format_line(plan: Plan, chosen: CacheType, types: tuple[CacheType, ...]) -> Line:
    flat = flatten(list(plan.policy.options()))
    names = {*flat.key_formats, *flat.value_formats}
    label = f"keys {'/'.join(flat.key_formats)}, values {'/'.join(flat.value_formats)}"
    if names == {"bf16"}:
        return Line(label, "kept", "16 bits")
    if {form for o in plan.policy.options() for form in (o.keys, o.values)} == {chosen.own}:
        return Line(label, "kept", f"{chosen.name}: its own arithmetic")
    if names == {chosen.like}:
        return Line(label, "approximated", chosen.detail + grouping_text(flat))
    why = _why_not(names, plan.facts.head_dim, types)
    wider = chosen.bits == (16, 16)
    return Line(label, "not expressible", f"{why}; used {chosen.name} instead", wider)


def _why_not(names: set[str], head_dim: int, types: tuple[CacheType, ...]) -> str:
    """Why a stack with these types cannot store the formats."""
    if len(names) > 1:
        return "one type for all heads"
    for each in types:
        if {each.like} == names and head_dim % each.channels:
            return f"heads of {head_dim} are no multiple of {each.channels}"
    return "no such type"


def token_lines(plan: Plan, dropped: dict[str, int], why: str) -> list[Line]:
    """What becomes of methods that evict, where the stack does not."""
    if not dropped:
        return [Line("tokens", "kept", "all of them")]
    heads = plan.facts.layers * plan.facts.kv_heads
    detail = f"dropped, all tokens stay: {why}"
    return [
        Line(f"method {name}, {count} of {heads} heads", "not expressible", detail)
        for name, count in dropped.items()
    ]


def check(config: dict[str, Any], schema: dict[str, Rule], stack: str) -> None:
    """Refuse keys and values that the stack does not know, or takes silently though wrong.

    Raises:
        ValueError: the configuration breaks a rule.
    """
    if unknown := set(config) - set(schema):
        raise ValueError(f"no settings of {stack}: {sorted(unknown)}")
    for key, value in config.items():
        if not schema[key](value):
            raise ValueError(f"{key} cannot be {value!r}")


def one_of(*names: object) -> Rule:
    """A rule: one of these."""
    return lambda value: value in names


def positive(value: Any) -> bool:
    """A rule: a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def text(value: Any) -> bool:
    """A rule: a text that is not empty."""
    return isinstance(value, str) and bool(value)


def model_lines(plan: Plan) -> list[str]:
    """What is still to be said of the model and its weights."""
    lines = [] if plan.model else ["the model is left out: name it yourself."]
    if plan.weights not in ("", "bf16"):
        lines.append(f"the plan assumed {plan.weights} weights: load a checkpoint that holds them.")
    return lines


def _bytes(plan: Plan, chosen: CacheType, tokens: int) -> int:
    heads = plan.facts.layers * plan.facts.kv_heads
    return int(heads * tokens * chosen.token_bytes(plan.facts.head_dim))
