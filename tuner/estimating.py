"""What is estimated: every combination of card, weights, context, batch and policy asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from kvtune.common.errors import DoesNotFitError, KvtuneError
from kvtune.profiles.split import can_split
from kvtune.simulator.latency.chunks import chunked_prefill
from kvtune.simulator.latency.reading import WHOLE, Reading
from kvtune.simulator.latency.stacks import KV_BYTES, KvFormat
from kvtune.tuner.cases import FULL, Card, Case, Split, worth
from kvtune.tuner.target import beyond_length

if TYPE_CHECKING:
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.elsewhere import StackChoice
    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.cost import Cost, PartRead
    from kvtune.simulator.deployment import Deployment
    from kvtune.simulator.memory.plan import MemoryPlan


@dataclass(frozen=True)
class Asked:
    """What ``kvtune estimate`` was asked for.

    Args:
        model: as the loader takes it.
        shape: its shape.
        generated_tokens: tokens that each sequence generates.
        cards: where it may run.
        contexts: prompt tokens of a sequence.
        batches: sequences at once.
        weights: weight formats; ``auto`` for the widest that fits.
        document: a policy to set beside the full cache, or None.
        evicts: whether its methods go on evicting while tokens are generated.
        gpus: cards that share each layer; with ``total_gpus``, 1 tries all that divide it.
        total_gpus: cards in all, used as copies of the model that share the sequences; or None.
        stack: whose kernels.
        kv_format: of a stack's cache.
        expert_parallel: groups of GPUs that have routed experts of their own, under a stack.
        told: notes on the options.
        reading: whether a prefix is held, and how many tokens are read at once.
    """

    model: str
    shape: ModelShape
    generated_tokens: int
    cards: Sequence[Card]
    contexts: Sequence[int]
    batches: Sequence[int]
    weights: Sequence[str]
    document: PolicyDocument | None
    evicts: bool
    gpus: int = 1
    total_gpus: int | None = None
    stack: StackChoice = "kvtune"
    kv_format: KvFormat = "bfloat16"
    expert_parallel: int = 1
    told: tuple[str, ...] = ()
    reading: Reading = WHOLE

    @property
    def is_one(self) -> bool:
        """Whether there is one card, weight format, context, batch and way to use the cards."""
        several = (self.cards, self.weights, self.contexts, self.batches, self.splits())
        return all(len(each) == 1 for each in several) and self.total_gpus is None

    @property
    def notes(self) -> tuple[str, ...]:
        """On the options; that the longest prompt and its answer exceed the model's length."""
        beyond = beyond_length(self.shape, max(self.contexts), self.generated_tokens)
        return (*self.told, *((beyond,) if beyond else ()))

    def cases(self) -> Iterator[Case]:
        """Every combination by card: those that fit first, of them the cheapest, then by memory."""
        every = [list(self._on(card)) for card in self.cards]
        for cases in sorted(every, key=worth):
            yield from cases

    def _on(self, card: Card) -> Iterator[Case]:
        """All that was asked for on one card."""
        every = product(self.splits(), self.weights, self.contexts, self.batches)
        for split, weights, context, batch in every:
            try:
                yield from self.of(card, context, batch, split, weights)
            except DoesNotFitError as error:
                yield from self.refused(card, context, batch, split, weights, str(error))

    def refused(
        self, card: Card, context: int, batch: int, split: Split, weights: str, reason: str
    ) -> list[Case]:
        """One combination of which not even the weights and a small cache fit."""
        return [
            Case(card, context, batch, name, None, None, reason, split, weights)
            for name in self._names()
        ]

    def splits(self) -> list[Split]:
        """How the cards may be used: as asked for, or every way that gives all of them work.

        Raises:
            KvtuneError: so many cards cannot be used.
        """
        if self.total_gpus is None:
            return [Split(self.gpus)]
        total = self.total_gpus
        if total % self.gpus:
            raise KvtuneError(
                f"--total-gpus {total} is no multiple of --gpus {self.gpus}",
                hint="leave --gpus out to see every way that they can be used.",
            )
        shared = (
            [n for n in range(1, total + 1) if total % n == 0] if self.gpus == 1 else [self.gpus]
        )
        groups = self.expert_parallel
        found = [n for n in shared if can_split(self.shape, n) and n % groups == 0]
        if not found:
            raise KvtuneError(
                f"{self.shape.name} cannot be shared by any of {total} GPUs in {groups} groups",
                hint="fewer groups are asked for by --expert-parallel.",
            )
        return [Split(n, total // n) for n in found]

    def of(
        self,
        card: Card,
        context: int,
        batch: int,
        split: Split | None = None,
        weights: str | None = None,
    ) -> list[Case]:
        """One combination: the full cache, and the policy where there is one.

        Left out, the first use of the cards and the first weight format that were asked for.

        Raises:
            KvtuneError: not even the weights and a small cache fit.
        """
        split, weights = split or self.splits()[0], weights or self.weights[0]
        from kvtune.simulator.deployment import Deployment
        from kvtune.simulator.memory.plan import memory_plan

        deployment = Deployment(
            self.shape, card.gpu, split.gpus, self.stack, self.kv_format, self.expert_parallel
        )
        at_once = split.batch(batch)
        budget = memory_plan(
            deployment.local, card.gpu, card.memory_bytes,
            context_tokens=context, generated_tokens=self.generated_tokens,
            # Of a policy more may fit than useful caches in 16 bits: the search asks as for one.
            batch=1 if self.document else at_once, weights=weights,
        ).at(at_once)  # fmt: skip
        costs = self._costs(deployment, budget)
        return [
            Case(card, context, batch, name, budget, cost, split=split, weights=weights)
            for name, cost in costs.items()
        ]

    def _costs(self, deployment: Deployment, budget: MemoryPlan) -> dict[str, Cost]:
        from kvtune.simulator.cost import full_cost, per_second, policy_cost

        part = self._part(deployment, budget)
        alone = full_cost(budget, part, KV_BYTES[self.kv_format])
        times = deployment.times(alone.latency, alone.prefill, budget, self.reading)
        full = replace(
            alone, latency=times.step, prefill=times.prefill, front=times.front,
            tokens_per_second=per_second(times.step, budget.batch),
        )  # fmt: skip
        costs = {FULL: full}
        if self.document is not None:
            self._check_alone(deployment.gpus)
            policy = self.document.bind(self.shape.layers, self.shape.kv_heads)
            costs[policy.name] = policy_cost(policy, budget, evicts=self.evicts, part=part)
        return costs

    def _part(self, deployment: Deployment, budget: MemoryPlan) -> PartRead | None:
        """How long prompts take that stand behind a prefix or are read in chunks; else None.

        Raises:
            KvtuneError: no prompt is left.
        """
        from kvtune.simulator.cost import PartRead

        new = self.reading.new_tokens(budget.context_tokens)
        if self.reading == WHOLE or self.stack != "kvtune":
            return None
        seconds = chunked_prefill(
            deployment.local, deployment.gpu, budget.weight_format, new,
            self.reading.prefix_tokens, self.reading.chunk_tokens, execution="runtime",
        )  # fmt: skip
        return PartRead(new, seconds)

    def _check_alone(self, gpus: int) -> None:
        """Refuse a policy over several GPUs or under another stack."""
        check_runtime_alone(self.stack)
        if gpus > 1:
            raise KvtuneError(
                "a policy can be costed on one GPU only, as yet",
                hint="leave out --gpus, or --policy.",
            )

    def _names(self) -> list[str]:
        shape = self.shape
        named = [self.document.bind(shape.layers, shape.kv_heads).name] if self.document else []
        return [FULL, *named]


_IN_8_BITS = dict.fromkeys(
    ("vllm", "sglang", "trtllm"), ", with --kv-cache-dtype fp8 for a cache of 8 bits"
) | {"llama-cpp": ", with --engine-args '-ctk q8_0 -ctv q8_0' for a cache of 8 bits"}
_BY_PLUGIN = "kvtune serve-sim --stack vllm --policy serves it as kvtune's plugin does; "


def check_runtime_alone(stack: str) -> None:
    """Refuse a policy under a stack that does not run it.

    Raises:
        KvtuneError: any but kvtune's own runtime.
    """
    if stack != "kvtune":
        raise KvtuneError(
            f"--policy is costed as kvtune's own runtime runs it, and --stack {stack} runs its own "
            "cache",
            hint=f"leave out --stack; or leave out --policy{_IN_8_BITS.get(stack, '')}; "
            f"{_BY_PLUGIN if stack == 'vllm' else ''}kvtune export --compare says what each stack "
            "can be given.",
        )
