"""A study at one moment, frozen: what screens and reports are drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    PolicyDocument,
    Provenance,
    Quality,
    Serving,
    read_policy,
)
from kvtune.simulator.memory.weights import check_format, weight_bytes
from kvtune.simulator.model_facts import model_facts
from kvtune.tuner.explore.facts import EACH, Facts
from kvtune.tuner.explore.measured import Measured
from kvtune.tuner.explore.plans import Plan, Plans
from kvtune.tuner.result import Baseline
from kvtune.tuner.stored_result import StoredResult

State = Literal["running", "finished", "stopped"]


@dataclass(frozen=True)
class Study:
    """What a run directory holds.

    Args:
        folder: the run directory.
        facts: what all plans share.
        plans: one a finished trial that fits, in the order of finishing.
        outcome: the result, once the search has finished.
        state: running, finished, or stopped before its end.
        measured: live runs asked for since, by trial.
    """

    folder: Path
    facts: Facts
    plans: Plans
    outcome: StoredResult | None
    state: State
    measured: Mapping[int, Measured] = field(default_factory=dict)

    @cached_property
    def chosen(self) -> int | None:
        """Row of the plan that was chosen, or would be now; None of no plan."""
        if not len(self.plans):
            return None
        if self.outcome is not None:
            wanted = self.outcome.parameters
            rows = [row for row, p in enumerate(self.plans.parameters) if p == wanted]
            if rows:
                return rows[0]
        return self._best_so_far()

    def _best_so_far(self) -> int:
        """Of plans within the limit: the widest weights, most tokens at once, then least loss.

        Each plan's own loss counts here. The search's end counts, at every point of the front, the
        loss on samples that the choice did not see, which one plan's line cannot tell; it may then
        pick a plan that serves fewer.
        """
        loss = self.plans.kl[:, 0]
        within = np.flatnonzero(loss <= self.facts.largest_kl)
        if not len(within):
            return int(loss.argmin())
        tokens = (self.plans.context_tokens * self.plans.sequences)[within]
        return int(within[np.lexsort((loss[within], -tokens, -self._weight_bytes[within]))[0]])

    def believed(self, plan: Plan) -> float:
        """Loss without the luck of being the best of many, where the result has it, nats/token."""
        if self.outcome is not None:
            for point in self.outcome.front:
                if point.parameters == plan.parameters:
                    return point.believed
        return plan.kl.value

    @cached_property
    def weights(self) -> NDArray[np.str_]:
        """Format of the model's weights beside each plan, ``[n]``."""
        plans, same = self.plans.parameters, self.facts.weights
        return np.array([str(each.get("weights", same)) for each in plans], np.str_)

    @cached_property
    def _weight_bytes(self) -> NDArray[np.float64]:
        """Bytes of the model's weights beside each plan; 0 where all have the same, ``[n]``."""
        if self.facts.weights != EACH:
            return np.zeros(len(self.plans))
        names, rows = np.unique(self.weights, return_inverse=True)
        sizes = [weight_bytes(self.facts.shape, check_format(str(name))).value for name in names]
        return np.array(sizes)[rows]

    def weight_bytes_of(self, plan: Plan) -> float:
        """Bytes of the model's weights beside a plan; 0 where all plans have the same."""
        return float(self._weight_bytes[np.flatnonzero(self.plans.trial == plan.trial)[0]])

    @cached_property
    def option_counts(self) -> NDArray[np.float64]:
        """How many heads of each plan take each option, ``[n, O]``."""
        count, width = len(self.plans), len(self.facts.options)
        flat = self.plans.heads.astype(np.int64) + width * np.arange(count)[:, None]
        found = np.bincount(flat.ravel(), minlength=count * width)
        return found.reshape(count, width).astype(np.float64)

    def using(self, options: Iterable[bool]) -> NDArray[np.bool_]:
        """Which plans give some head one of the marked options, ``[n]``."""
        heads = self.option_counts @ np.array(list(options), np.float64)
        return np.asarray(heads > 0, np.bool_)

    def policy(self, plan: Plan) -> Policy:
        """The plan as a policy."""
        given, heads = self.given, self.facts.shape.kv_heads
        rows = plan.heads.reshape(-1, heads)
        allocator = given[int(plan.heads[0])].allocator
        options = tuple(tuple(self.facts.options[o] for o in row) for row in rows)
        return Policy(f"kvtune plan {plan.trial}", options, allocator)

    @cached_property
    def given(self) -> list[Policy]:
        """What a head may be given, each as a policy of one head."""
        return self.facts.given

    def baseline_policy(self, baseline: Baseline) -> Policy | None:
        """The policy of a baseline, where its file is there, its budgets as shares of a prompt."""
        if not baseline.policy:
            return None
        shape = self.facts.shape
        try:
            found = read_policy(self.folder / baseline.policy).bind(shape.layers, shape.kv_heads)
        except KvtuneError:
            return None
        tokens = self.facts.measured_tokens
        heads = tuple(tuple(_as_share(option, tokens) for option in row) for row in found.heads)
        return replace(found, heads=heads)

    def is_chosen(self, plan: Plan) -> bool:
        """Whether it is the plan that was chosen, or would be now."""
        return self.chosen is not None and self.plans.trial[self.chosen] == plan.trial

    def live(self, plan: Plan) -> Measured | None:
        """What live runs found of a plan: asked for since, or the search's own."""
        if plan.trial in self.measured or self.outcome is None or not self.is_chosen(plan):
            return self.measured.get(plan.trial)
        ours, outcome = self.outcome.plan, self.outcome
        if ours.live is None:
            return None
        return Measured(
            kl=ours.live,
            perplexity_change=ours.perplexity_change,
            retrieval_accuracy=ours.retrieval_accuracy,
            full_cache_accuracy=outcome.full_cache_accuracy,
            prompt_bytes=ours.prompt_bytes,
            device=str(outcome.provenance.get("device", "")),
            by_kind=ours.live_by_kind,
        )

    def quality(self, plan: Plan) -> Estimate:
        """The plan's loss at the best tier there is: live, held out if chosen, selection."""
        if (live := self.live(plan)) is not None:
            return live.kl
        if self.outcome is not None and self.is_chosen(plan):
            return self.outcome.quality.kl
        return plan.kl

    @property
    def stack(self) -> str:
        """Whose losses the plans' are: that of a stack which stores answers as prompts, or ""."""
        from kvtune.tuner.within import stores_alike

        stack = "" if self.facts.stand_in else self.facts.stack
        return stack if stores_alike(stack) else ""

    def document(self, plan: Plan, weights: str) -> PolicyDocument:
        """The plan as a policy file, with where it comes from."""
        facts, shape = self.facts, self.facts.shape
        weights = str(plan.parameters["weights"]) if weights == EACH else weights
        source: Literal["own trace", "stand-in"] = "stand-in" if facts.stand_in else "own trace"
        trace = str((self.outcome.provenance if self.outcome else {}).get("trace", ""))
        return PolicyDocument(
            policy=self.policy(plan),
            model=model_facts(shape),
            provenance=Provenance(
                quality=Quality(source, facts.stand_in, self.quality(plan), self.stack),
                kvtune=facts.kvtune,
                trace=trace,
                seed=facts.seed,
            ),
            serving=Serving(
                weights,
                plan.context_tokens,
                facts.generated_tokens,
                plan.sequences,
                facts.gpu,
            ),
        )


def _as_share(option: Option, prompt_tokens: int) -> Option:
    """A budget in tokens of the samples' prompts, carried over to longer prompts as a share."""
    if option.budget.tokens is None:
        return option
    share = Budget(share=min(option.budget.tokens / prompt_tokens, 1.0))
    return replace(option, budget=share).with_floor(prompt_tokens)
