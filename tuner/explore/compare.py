"""Two policies head by head and task by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvtune.common.estimate import Estimate
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.tuner.explore.facts import EACH
from kvtune.tuner.explore.plans import Floats, Integers, Plan
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.what_if import Figures, Setting, figures
from kvtune.tuner.result import Baseline


@dataclass(frozen=True)
class Side:
    """One of the two: a plan, or a baseline.

    Args:
        name: for people.
        selection: loss on the samples that plans are judged on; None of a baseline.
        held_out: loss on samples that no choice was made on, before anything ran live.
        live: measured on those, or None.
        by_kind: held-out loss by kind of text, predicted; empty where not known.
        live_by_kind: measured on those; empty where not known.
        policy: what each head gets, or None where only its loss is known.
        prompt_bytes: of one compressed prompt, at the plan's context.
        figures: memory and time, one row; None without a policy.
    """

    name: str
    selection: Estimate | None
    held_out: Estimate
    live: Estimate | None
    by_kind: dict[str, float]
    live_by_kind: dict[str, Estimate]
    policy: Policy | None
    prompt_bytes: int
    figures: Figures | None


def plan_side(study: Study, plan: Plan, setting: Setting) -> Side:
    """A plan of the study."""
    policy = study.policy(plan)
    live = study.live(plan)
    shown = _figures(study, policy, plan, setting)
    return Side(
        name=f"plan of trial {plan.trial}" + (f" as {study.stack} runs it" if study.stack else ""),
        selection=plan.kl,
        held_out=plan.held_out,
        live=live.kl if live else None,
        by_kind=dict(zip(study.facts.kinds, plan.by_kind, strict=True)),
        live_by_kind=live.by_kind if live else {},
        policy=policy,
        prompt_bytes=int(shown.prompt_bytes[0]),
        figures=shown,
    )


def baseline_side(study: Study, baseline: Baseline, plan: Plan, setting: Setting) -> Side:
    """A baseline, at the context and sequences of the plan that it stands beside."""
    policy = study.baseline_policy(baseline)
    shown = None if policy is None else _figures(study, policy, plan, setting)
    size = baseline.prompt_bytes if shown is None else int(shown.prompt_bytes[0])
    return Side(
        name=baseline.name + (" in kvtune's runtime" if study.stack else ""),
        selection=None,
        held_out=baseline.predicted,
        live=baseline.live,
        by_kind={kind: loss.value for kind, loss in baseline.by_kind.items()},
        live_by_kind=baseline.live_by_kind,
        policy=policy,
        prompt_bytes=size,
        figures=shown,
    )


def _figures(study: Study, policy: Policy, plan: Plan, setting: Setting) -> Figures:
    options = tuple(dict.fromkeys(policy.options()))
    number = {option: index for index, option in enumerate(options)}
    heads = np.array([[number[o] for o in policy.options()]])
    taken = np.bincount(heads[0], minlength=len(options))
    context = np.array([setting.context_tokens or plan.context_tokens], np.int64)
    sequences = np.array([setting.sequences or plan.sequences], np.int64)
    counts = taken[None].astype(np.float64)
    if setting.weights == EACH:
        setting = replace(setting, weights=str(plan.parameters.get("weights", EACH)))
    given = [Policy.uniform(option, 1, 1, allocator=policy.allocator) for option in options]
    return figures(study.facts, given, counts, context, sequences, setting, heads)


@dataclass(frozen=True)
class HeadMap:
    """A policy by layer and head, as numbers that can be drawn.

    Args:
        options: what each head gets, ``[L][H]``.
        tokens: kept of a prompt of ``context_tokens``, ``[L, H]``.
        context_tokens: P.
    """

    options: tuple[tuple[Option, ...], ...]
    tokens: Integers
    context_tokens: int

    @staticmethod
    def of(policy: Policy, context_tokens: int) -> HeadMap:
        """The policy on prompts of that many tokens."""
        return HeadMap(policy.heads, policy.budgets(context_tokens), context_tokens)

    @cached_property
    def share(self) -> Floats:
        """Kept tokens over all, ``[L, H]``."""
        return self.tokens / self.context_tokens

    def bytes(self, head_dim: int) -> NDArray[np.int64]:
        """Bytes of each head, ``[L, H]``."""
        rows = zip(self.options, self.tokens, strict=True)
        return np.array(
            [
                [
                    o.footprint(int(t), self.context_tokens, head_dim)
                    for o, t in zip(*row, strict=True)
                ]
                for row in rows
            ],
            np.int64,
        )


@dataclass(frozen=True)
class Difference:
    """Where two policies part.

    Args:
        heads: of them differ, of ``of`` in all.
        of: all KV heads.
        more: heads to which the first gives more bytes.
        fewer: heads to which it gives fewer.
        ratio: bytes of the first over those of the second, ``[L, H]``.
    """

    heads: int
    of: int
    more: int
    fewer: int
    ratio: Floats


def difference(first: Policy, second: Policy, context_tokens: int, head_dim: int) -> Difference:
    """Head by head, in bytes at that context."""
    ours, theirs = (HeadMap.of(p, context_tokens).bytes(head_dim) for p in (first, second))
    apart = sum(a != b for a, b in zip(first.options(), second.options(), strict=True))
    return Difference(
        heads=apart,
        of=ours.size,
        more=int((ours > theirs).sum()),
        fewer=int((ours < theirs).sum()),
        ratio=ours / np.maximum(theirs, 1),
    )


def common_kinds(sides: Sequence[Side]) -> list[str]:
    """Kinds of text that every side has a loss of."""
    return [kind for kind in sides[0].by_kind if all(kind in side.by_kind for side in sides)]
