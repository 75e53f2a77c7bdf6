"""Baselines of reading.py: published rules of head scores, and readers, filled to a share of bytes.

Each in 16 bits and in 4 bits with sinks in 16, where it can be filled in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.head_plans import headkv_plan, most, two_kinds
from kvtune.policies.head_scores import Floats
from kvtune.policies.method import Method
from kvtune.policies.methods.actqkv import ActQKV
from kvtune.policies.methods.infllm import InfLLM
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.recycled import Recycled
from kvtune.policies.methods.shadowkv import ShadowKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.tuner.baselines import fill

FORMS: tuple[Format, ...] = (Bf16(), Int4(exact_first=4))
FIRST: tuple[Method, ...] = (Quest(), Quest(block=64), TokenSelect(sinks=4, recent=16))
OTHERS: tuple[Method, ...] = (
    Landmark(block=16),
    Landmark(block=64),
    InfLLM(block=16, sinks=4, recent=32),
    ActQKV(block=16, sinks=4, recent=32),
    ShadowKV(),
    Recycled(stride=50),
)

Baseline = Sequence[Policy]
"""One method filled to a share, in every format that it can be filled in."""


@dataclass(frozen=True)
class Filler:
    """Fills baselines to shares of a prompt's bf16 bytes.

    Args:
        shape: tokens of the prompt, layers, KV heads and head_dim.
        full: bf16 bytes of the prompt.
    """

    shape: tuple[int, int, int, int]
    full: int

    def reader(self, share: float, method: Method) -> Baseline:
        """Filled to the share; what reads more only to choose attends to that share of tokens."""
        budget = int(share * self.full)
        options = [Option(method, keys=form, values=form) for form in FORMS]
        filled = [fill(option, AsGiven(), budget, *self.shape, reads=True) for option in options]
        if there := [policy for policy in filled if policy is not None]:
            return there
        option = Option(method, Budget(tokens=max(round(share * self.shape[0]), 1)))
        name = f"{method.label}, attending to the share and reading more"
        return [Policy.uniform(option, *self.shape[1:3], name=name)]

    def by_heads(self, share: float, heads: dict[str, Floats]) -> list[Baseline]:
        """RazorAttention, DuoAttention, its rule, RLKV and HeadKV, where there are scores."""
        each = [self._head_plans(share, heads, form) for form in FORMS]
        names = dict.fromkeys(name for plans in each for name in plans)
        return [[plans[name] for plans in each if name in plans] for name in names]

    def _head_plans(
        self, share: float, heads: dict[str, Floats], form: Format
    ) -> dict[str, Policy]:
        """Every published rule filled to the share, where it can be."""
        budget, tokens = int(share * self.full), self.shape[0]
        rest = max(round(share / 2 * tokens), 8)
        kinds = {
            "RazorAttention": ("induction", Razor()),
            "DuoAttention": ("duo", StreamingLLM()),
            "DuoAttention's rule on retrieval heads": ("retrieval", StreamingLLM()),
            "RLKV": ("rlkv", StreamingLLM()),
        }

        def headkv(mean: int) -> Policy:
            return stored(headkv_plan(heads["retrieval"], mean), form)

        mean = self._most(budget, 9, 4 * tokens, headkv)
        found = {"HeadKV": None if mean is None else headkv(mean)}
        for name, (score, method) in kinds.items():
            if score in heads:
                make = most_of(name, heads[score], method, form)
                found[name] = self._filled(budget, make, heads[score].size, rest)
        return {name: policy for name, policy in found.items() if policy is not None}

    def _filled(
        self, budget: int, make: Callable[[int, int], Policy], heads: int, rest: int
    ) -> Policy | None:
        """As many heads in full as fit; then as many tokens of the others as still do."""
        count = self._most(budget, 1, heads, lambda n: make(n, rest))
        if count is None:
            return None
        more = self._most(budget, rest, self.shape[0], lambda tokens: make(count, tokens))
        return make(count, more or rest)

    def _most(self, budget: int, low: int, high: int, make: Callable[[int], Policy]) -> int | None:
        """The largest number whose plan takes no more than the budget, by bisection."""
        best = None
        while low <= high:
            middle = (low + high) // 2
            if make(middle).footprint(self.shape[0], self.shape[-1]) <= budget:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best


def stored(policy: Policy, form: Format) -> Policy:
    """The same policy with keys and values in a format, which its name says."""
    heads = tuple(tuple(replace(o, keys=form, values=form) for o in row) for row in policy.heads)
    return replace(policy, name=f"{policy.name}, {form.label}", heads=heads)


def most_of(name: str, score: Floats, method: Method, form: Format) -> Callable[[int, int], Policy]:
    """Return plans that keep ``count`` best-scored heads whole, and ``rest`` tokens of others."""

    def plan(count: int, rest: int) -> Policy:
        return stored(two_kinds(name, most(score, count / score.size), method, rest), form)

    return plan
