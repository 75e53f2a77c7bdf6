"""What is estimated: every combination of card, weights, context, batch and policy asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from kvtune.common.errors import DoesNotFitError, KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.profiles.split import can_split
from kvtune.simulator.latency.chunks import chunked_prefill
from kvtune.simulator.latency.reading import WHOLE, Reading
from kvtune.simulator.latency.stacks import KV_BYTES, KvFormat
from kvtune.tuner.target import beyond_length

if TYPE_CHECKING:
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.elsewhere import StackChoice
    from kvtune.profiles.gpus import GpuProfile
    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.cost import Cost, PartRead
    from kvtune.simulator.deployment import Deployment
    from kvtune.simulator.memory.plan import MemoryPlan
    from kvtune.simulator.memory.weights import WeightFormat

FULL = "full cache"
STEP = 256  # tokens between the contexts that are tried
MILLION, SECONDS_PER_HOUR = 10**6, 3600


@dataclass(frozen=True)
class Card:
    """A card to estimate on.

    Args:
        gpu: its profile.
        memory_bytes: that may be used of it.
        price_per_hour: in any currency, or None.
    """

    gpu: GpuProfile
    memory_bytes: int
    price_per_hour: float | None


@dataclass(frozen=True)
class Split:
    """How cards are used together.

    Args:
        gpus: that share each layer of one copy of the model.
        copies: of the model, between which the sequences are dealt.
    """

    gpus: int = 1
    copies: int = 1

    @property
    def cards(self) -> int:
        """How many cards there are in all."""
        return self.gpus * self.copies

    def batch(self, sequences: int) -> int:
        """Sequences of the copy that is dealt the most."""
        return -(-sequences // self.copies)


ONE_CARD = Split()


@dataclass(frozen=True)
class Case:
    """One combination, and what it takes.

    Args:
        card: where it runs.
        context_tokens: prompt tokens of a sequence.
        batch: sequences at once, of all copies together.
        policy: name of the cache policy; ``full cache`` is the uncompressed one.
        budget: where one card's memory goes; None where not even the weights fit.
        cost: one card's memory, and one copy's time; None likewise.
        reason: why there is none.
        split: how many cards there are, and what they share.
        weights: format of the weights as it was asked for.
        engine_fits: whether an engine's own memory has room for all sequences; None where no
            engine was asked for, or what it takes is not known.
    """

    card: Card
    context_tokens: int
    batch: int
    policy: str
    budget: MemoryPlan | None
    cost: Cost | None
    reason: str = ""
    split: Split = ONE_CARD
    weights: str = "auto"
    engine_fits: bool | None = None

    @property
    def fits(self) -> bool:
        """Whether all sequences fit at once, by the engine where its memory is known."""
        if self.engine_fits is not None:
            return self.engine_fits
        return self.cost is not None and self.cost.sequences_that_fit >= self.split.batch(
            self.batch
        )

    def weight_format(self, shape: ModelShape) -> WeightFormat:
        """Of the budget; where there is none the one asked for, or the narrowest for ``auto``."""
        from kvtune.simulator.memory.weights import check_format, formats_by_width

        if self.budget is not None:
            return self.budget.weight_format
        if self.weights == "auto":
            return formats_by_width(shape, self.card.gpu)[-1]
        return check_format(self.weights)

    @property
    def sequences_that_fit(self) -> int | None:
        """At once, on all cards together."""
        return None if self.cost is None else self.cost.sequences_that_fit * self.split.copies

    @property
    def most_at_once(self) -> Estimate | None:
        """The same with its interval."""
        if self.cost is None:
            return None
        one, copies = self.cost.most_at_once, self.split.copies
        value, low, high = (copies * end for end in (one.value, one.low, one.high))
        return Estimate(value, low, high, one.unit, one.tier)

    @property
    def tokens_per_second(self) -> Estimate | None:
        """Tokens that all sequences together are given a second."""
        from kvtune.simulator.cost import per_second

        return per_second(self.cost.latency, self.batch) if self.cost else None

    @property
    def tokens_per_second_per_user(self) -> Estimate | None:
        """Tokens that each sequence is given a second."""
        from kvtune.simulator.cost import per_second

        return per_second(self.cost.latency, 1) if self.cost else None

    @property
    def cost_per_million_tokens(self) -> Estimate | None:
        """The cards' price over what they generate, in the price's currency; decoding alone."""
        rate, price = self.tokens_per_second, self.card.price_per_hour
        if rate is None or price is None:
            return None
        spent = price * self.split.cards * MILLION
        value, low, high = (
            spent / (SECONDS_PER_HOUR * end) for end in (rate.value, rate.high, rate.low)
        )
        return Estimate(value, low, high, "per million tokens", rate.tier)


def _worth(cases: Sequence[Case]) -> tuple[bool, float, int]:
    """By which cards are sorted, from their cases of the full cache and the policy."""
    fitting = [case for case in cases if case.policy == cases[-1].policy and case.fits]
    costs = [case.cost_per_million_tokens for case in fitting]
    least = min((cost.value for cost in costs if cost), default=0.0)
    return not fitting, least, cases[0].card.memory_bytes


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
        for cases in sorted(every, key=_worth):
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

    def what_would_fit(self, case: Case) -> list[str]:
        """How a case that does not fit could: fewer, shorter, compressed, narrower, larger."""
        at_most = case.cost.sequences_that_fit if case.cost else 0
        found = [f"--batch {at_most}"] if at_most else []
        if context := self._longest_context(case):
            found.append(f"--context {context}")
        if case.budget and case.policy == FULL and case.budget.cache_bytes:
            share = _two_digits_below(100 * case.budget.share_that_fits)
            found.append(f"a cache compressed to {share} % of bf16 (kvtune search)")
        if weights := self.narrower_weights(case):
            found.append(f"--weights {weights}")
        if larger := self._smallest_card(case):
            found.append(f"--gpu {larger}")
        return found

    def _fits(self, card: Card, case: Case, context: int, weights: str | None = None) -> bool:
        try:
            cases = self.of(card, context, case.batch, case.split, weights or case.weights)
        except KvtuneError:
            return False
        return next(found.fits for found in cases if found.policy == case.policy)

    def narrower_weights(self, case: Case) -> WeightFormat | None:
        """The widest format of weights, narrower than the case's, with which all of it fits."""
        from kvtune.simulator.memory.weights import formats_by_width, weight_bytes

        now = weight_bytes(self.shape, case.weight_format(self.shape)).value
        for weights in formats_by_width(self.shape, case.card.gpu):
            narrower = weight_bytes(self.shape, weights).value < now
            if narrower and self._fits(case.card, case, case.context_tokens, weights):
                return weights
        return None

    def _longest_context(self, case: Case) -> int | None:
        """The longest prompts that fit in the same batch, in steps of 256 tokens."""
        from bisect import bisect_left

        steps = range(STEP, case.context_tokens, STEP)
        fitting = bisect_left(
            steps, True, key=lambda context: not self._fits(case.card, case, context)
        )
        return steps[fitting - 1] if fitting else None

    def _smallest_card(self, case: Case) -> str | None:
        """The known card with the least memory on which all of it fits."""
        from kvtune.profiles.gpus import list_gpus

        larger = [gpu for gpu in list_gpus() if gpu.visible_bytes > case.card.memory_bytes]
        for gpu in sorted(larger, key=lambda gpu: gpu.visible_bytes):
            if self._fits(Card(gpu, gpu.visible_bytes, None), case, case.context_tokens):
                return gpu.slug
        return None


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


def _two_digits_below(percent: float) -> str:
    """A share that still fits when it is typed: rounded down to two digits, above zero."""
    step = 10.0 ** (math.floor(math.log10(percent)) - 1)
    return f"{math.floor(percent / step) * step:.2g}"
