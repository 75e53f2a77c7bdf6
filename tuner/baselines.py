"""What a plan has to beat: one rule for all heads, its budget tuned to use the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.allocators.cake_layers import CakeLayers
from kvtune.policies.allocators.compresskv_layers import CompressKVLayers
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int3, Int4, Int8
from kvtune.policies.method import Method
from kvtune.policies.methods.cake import Cake
from kvtune.policies.methods.compresskv import CompressKV
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.keydiff import KeyDiff
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.traces.signals import SIGNALS

Stored = tuple[Method, Format]

_SCORING: tuple[Method, ...] = (SnapKV(), H2O(), H2O(recent_share=0.1))
PRECISIONS: tuple[Format, ...] = (
    Bf16(),
    Int8(),
    *(kind(exact_first=sinks) for kind in (Int4, Int3, Int2) for sinks in (0, 4)),
)
"""Those that the runtime has pages for: what a plan has to beat has to run."""
FAMILIES: dict[str, tuple[tuple[Allocator, Method], ...]] = {
    "uniform": tuple((AsGiven(), method) for method in (*_SCORING, StreamingLLM())),
    "pyramid": tuple((Pyramid(window=method.needs.window), method) for method in _SCORING),
    "adakv": tuple((AdaKV(), method) for method in _SCORING),
}
"""Every family's methods and how each one's budgets are split.

A pyramid is its authors' with an observation window, which every layer has; H2O has none, so its
last layers are left as little as the line gives them.
"""


STRONG: dict[str, tuple[tuple[Allocator, Method], ...]] = {
    "kvzip": ((ModelWide(), KVzip()),),
    "expected_attention": ((AsGiven(), ExpectedAttention()), (AdaKV(), ExpectedAttention())),
    "keydiff": ((AsGiven(), KeyDiff()),),
    "cake": ((CakeLayers(), Cake()),),
    "compresskv": ((CompressKVLayers(), CompressKV()),),
}
"""What others have published since, each with the allocator of its authors."""

COSTS: dict[str, str] = {
    "kvzip": "reads the prompt a second time, and holds all of it in all layers until then",
    "expected_attention": "keeps statistics of all prompt queries",
    "cake": "holds the whole prompt in all layers until the last one is read",
    "compresskv": "is calibrated on the model once",
}
"""What a family takes beside its bytes, where it is anything."""


def family_of(allocator: Allocator) -> str:
    """What rules are called whose budgets it divides; ``uniform`` where they stay as given."""
    return "uniform" if isinstance(allocator, AsGiven) else allocator.name


def strong_families(recorded: Collection[str]) -> list[str]:
    """The families of ``STRONG`` that read no signal but these."""

    def reads(allocator: Allocator, method: Method) -> bool:
        needs = allocator.needs | method.needs
        return all(name in recorded for name in SIGNALS if getattr(needs, name))

    return [name for name, entries in STRONG.items() if all(reads(*each) for each in entries)]


def candidates(
    family: str,
    budget_bytes: int,
    prompt_tokens: int,
    layers: int,
    kv_heads: int,
    head_dim: int,
    only: Collection[Stored] | None = None,
) -> list[Policy]:
    """A family's policies, every method in every precision, each filling ``budget_bytes``.

    ``only`` narrows them to some methods and precisions.
    """
    shape = (prompt_tokens, layers, kv_heads, head_dim)
    filled = [
        fill(Option(method, keys=form, values=form), allocator, budget_bytes, *shape)
        for allocator, method in (FAMILIES | STRONG)[family]
        for form in PRECISIONS
        if only is None or (method, form) in only
    ]
    return [policy for policy in filled if policy is not None]


def fill(
    option: Option,
    allocator: Allocator,
    budget_bytes: int,
    prompt_tokens: int,
    layers: int,
    kv_heads: int,
    head_dim: int,
    *,
    reads: bool = False,
) -> Policy | None:
    """The option everywhere with the largest budget that fits, to the token of a single head.

    ``reads`` fills with what a decode step reads instead of what is held.

    None where not even one token a head fits, or where everything fits with room to spare: a
    wider precision is then the fairer candidate.
    """

    family = family_of(allocator)

    def even(tokens: int, extra: int) -> NDArray[np.int64]:
        return (tokens + (np.arange(layers * kv_heads) < extra)).reshape(layers, kv_heads)

    def policy(tokens: int, extra: int) -> Policy:
        heads = tuple(
            tuple(replace(option, budget=Budget(tokens=n)) for n in row)
            for row in even(tokens, extra).tolist()
        )
        return Policy(f"{family} {option.method.label} {option.keys.label}", heads, allocator)

    @cache
    def head_takes(tokens: int) -> int:
        ledger = option.ledger(tokens, prompt_tokens, head_dim)
        return ledger.read_bytes if reads else ledger.resident_bytes

    def takes(tokens: int, extra: int = 0) -> int:
        """As ``Policy.footprint`` or ``read_bytes``, without a policy for each of its askings."""
        planned = allocator.plan(np.minimum(even(tokens, extra), prompt_tokens), prompt_tokens)
        payload = sum(head_takes(n) for n in planned.ravel().tolist())
        return payload + footprint_of_lengths(layers, kv_heads)

    if takes(1) > budget_bytes:
        return None
    tokens = _largest(lambda n: takes(n) <= budget_bytes, 1, prompt_tokens)
    if tokens == prompt_tokens:
        return replace(policy(tokens, 0), name=f"{family} full {option.keys.label}")
    return policy(
        tokens, _largest(lambda n: takes(tokens, n) <= budget_bytes, 0, layers * kv_heads)
    )


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in ``[low, high]`` that fits, by bisection; ``low`` is known to."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
