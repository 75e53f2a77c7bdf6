"""Gram tables: what every option costs every KV head, and how heads add up.

For a configuration that gives head i the option o_i, the second-order KL divergence a token is

    sum_i loss[i, o_i]  +  | sum_i factor[i, o_i] |^2 - sum_i | factor[i, o_i] |^2

``loss`` holds each head's own term, measured exactly; ``factor`` spans the terms between heads.
Both are kept sample by sample (factors sample group by sample group once compacted), so that
intervals can be resampled and search, selection and evaluation never share a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvtune.common.bounds import Name
from kvtune.policies.option import Ledger, Option
from kvtune.policies.placement import may_lie_on_host
from kvtune.simulator.quality.rules import Rule

Floats = NDArray[np.float32]
_ROUNDING = 1e-9  # nats/token: what replay says of the same sums in another order


@dataclass(frozen=True)
class SampleFacts:
    """Where one sample's numbers belong: its id, its split and the kind of text."""

    id: Name
    split: Name
    kind: Name


@dataclass(frozen=True)
class Tables:
    """Losses of options, in nats of KL divergence a token.

    Args:
        model: whose trace they were made of.
        layers: L.
        kv_heads: H; heads are numbered layer by layer, I = L * H.
        head_dim: D.
        prompt_tokens: P of the samples.
        options: what may be done to a head, O of them, the same for all heads.
        samples: n of them.
        loss: own terms, ``[n, I, O]`` nats/token.
        factor: ``[g, I, O, r]``, square root of nats/token; ``[n, ...]`` until compacted.
        group: which factor each sample uses, ``[n]``.
        rules: numbered behind the options; a configuration that has one has it for all heads.
    """

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    prompt_tokens: int
    options: tuple[Option, ...]
    samples: tuple[SampleFacts, ...]
    loss: Floats
    factor: Floats
    group: NDArray[np.int64]
    rules: tuple[Rule, ...] = ()

    @property
    def heads(self) -> int:
        """I, all KV heads of all layers."""
        return self.layers * self.kv_heads

    def rule_of(self, choice: NDArray[np.int64]) -> Rule | None:
        """The rule that a configuration is, ``[I]``; None where heads have options of their own."""
        behind = int(choice[0]) - len(self.options)
        return self.rules[behind] if behind >= 0 else None

    def given(self, choice: NDArray[np.int64]) -> list[Option]:
        """The options that any head of a configuration has."""
        if (rule := self.rule_of(choice)) is not None:
            return [rule.option]
        return [self.options[option] for option in np.unique(choice)]

    def of_split(self, split: str) -> Tables:
        """The samples of one split alone."""
        if split not in self._known_splits:
            rows = [row for row, sample in enumerate(self.samples) if sample.split == split]
            self._known_splits[split] = self.subset(rows)
        return self._known_splits[split]

    @cached_property
    def _known_splits(self) -> dict[str, Tables]:
        """Of those asked for: a search asks with every candidate."""
        return {}

    def subset(self, rows: Sequence[int]) -> Tables:
        """Some of the samples; those that stand side by side, as a split's do, are not copied."""
        picked = np.asarray(rows, int)
        groups, index = np.unique(self.group[picked], return_inverse=True)
        return replace(
            self,
            samples=tuple(self.samples[row] for row in rows),
            loss=_rows(self.loss, picked),
            factor=_rows(self.factor, groups),
            group=index.astype(np.int64),
            rules=tuple(rule.on(picked) for rule in self.rules),
        )

    def with_options(self, columns: Sequence[int]) -> Tables:
        """Some of the options."""
        picked = np.asarray(columns, int)
        return replace(
            self,
            options=tuple(self.options[column] for column in columns),
            loss=self.loss[:, :, picked],
            factor=self.factor[:, :, picked],
        )

    def with_floors(self) -> Tables:
        """The same options, which keep of prompts shorter than the samples' no fewer tokens.

        On prompts as long as the samples' they keep what they did, so that losses are the same.
        """
        kept = self.prompt_tokens
        return replace(self, options=tuple(each.with_floor(kept) for each in self.options))

    def sample_weights(self, emphasis: Mapping[str, float] | None = None) -> Floats:
        """Every kind of text counts alike, however many samples it has; sums to one, ``[n]``.

        Args:
            emphasis: kinds that count so many times the others.
        """
        kinds = [sample.kind for sample in self.samples]
        each = [(emphasis or {}).get(kind, 1.0) / kinds.count(kind) for kind in kinds]
        return np.array(each, np.float32) / np.float32(sum(each))

    def footprints(self, prompt_tokens: int, head_dim: int) -> NDArray[np.int64]:
        """Bytes of one head under each option, ``[O]``, at any prompt length."""
        ledgers = self._ledgers(prompt_tokens, head_dim)
        return np.array([ledger.resident_bytes for ledger in ledgers], np.int64)

    def bytes_read(self, prompt_tokens: int, head_dim: int) -> NDArray[np.int64]:
        """Bytes of one head that a decode step reads under each option, ``[O]``; likewise."""
        ledgers = self._ledgers(prompt_tokens, head_dim)
        return np.array([ledger.read_bytes for ledger in ledgers], np.int64)

    def bytes_moved(self, prompt_tokens: int, head_dim: int) -> NDArray[np.int64]:
        """Bytes of one head that a step brings over from the host under each option, ``[O]``."""
        ledgers = self._ledgers(prompt_tokens, head_dim)
        return np.array([ledger.moved_bytes for ledger in ledgers], np.int64)

    def _ledgers(self, prompt_tokens: int, head_dim: int) -> Sequence[Ledger]:
        """Of every option; a search asks for the same lengths with every candidate."""
        key = prompt_tokens, head_dim
        if key not in self._known_ledgers:
            self._known_ledgers[key] = [
                option.ledger(option.budget.resolve(prompt_tokens), prompt_tokens, head_dim)
                for option in self.options
            ]
        return self._known_ledgers[key]

    @cached_property
    def _known_ledgers(self) -> dict[tuple[int, int], list[Ledger]]:
        return {}

    def by_sample(self, choice: NDArray[np.int64], cross: float = 1.0) -> Floats:
        """Loss of one configuration on every sample, ``[n]`` nats/token.

        Args:
            choice: option of each head, ``[I]``.
            cross: how much of the terms between heads to count.
        """
        if (rule := self.rule_of(choice)) is not None:
            return rule.loss
        head = np.arange(self.heads)
        own = self.loss[:, head, choice].sum(1)
        picked = self.factor[:, head, choice]  # [g, I, r]
        between = (picked.sum(1) ** 2).sum(-1) - (picked**2).sum((1, 2))
        loss: Floats = np.maximum(own + cross * between[self.group], 0)
        return loss


def _rows(array: Floats, rows: NDArray[np.int64]) -> Floats:
    """Rows of an array: a view where they follow one another, else a copy."""
    if len(rows) and (np.diff(rows) == 1).all():
        return array[rows[0] : rows[-1] + 1]
    return array[rows]


def compact(tables: Tables, group: Sequence[int], rank: int) -> Tables:
    """Share one rank-``rank`` factor among the samples of a group; own terms stay exact.

    Args:
        tables: with one factor a sample.
        group: group number of each sample, ``[n]``, from 0 without gaps.
        rank: columns kept of each group's factor.
    """
    numbers = np.asarray(group, np.int64)
    factors = [
        low_rank(tables.factor[tables.group[numbers == g]], rank) for g in range(numbers.max() + 1)
    ]
    return replace(tables, factor=np.stack(factors), group=numbers)


def join(parts: Sequence[Tables]) -> Tables:
    """Tables of more samples, from tables of some each; the same model and options."""
    first = np.cumsum([0, *(len(part.factor) for part in parts)])
    return replace(
        parts[0],
        samples=tuple(sample for part in parts for sample in part.samples),
        loss=np.concatenate([part.loss for part in parts]),
        factor=np.concatenate([part.factor for part in parts]),
        group=np.concatenate([part.group + at for part, at in zip(parts, first, strict=False)]),
    )


def on_both_sides(tables: Tables) -> Tables:
    """The same options once more with their prompt on the host, which loses as much.

    Left out are those of which pages do not hold all.
    """
    mine = [
        o for o, option in enumerate(tables.options) if may_lie_on_host(option, tables.head_dim)
    ]
    there = tuple(replace(tables.options[o], tier="host") for o in mine)
    return replace(
        tables,
        options=(*tables.options, *there),
        loss=np.concatenate([tables.loss, tables.loss[:, :, mine]], 2),
        factor=np.concatenate([tables.factor, tables.factor[:, :, mine]], 2),
    )


def low_rank(factors: Floats, rank: int, weights: Floats | None = None) -> Floats:
    """One ``[I, O, rank]`` factor whose products are the (weighted) mean of several factors'.

    The mean over samples of U_n U_n^T is that of the samples' features standing side by side; its
    leading directions are found by randomised subspace iteration (Halko, Martinsson and Tropp,
    SIAM Review 2011), which for thousands of features is a hundred times faster than all of them.
    """
    count, heads, options, features = factors.shape
    weights = np.full(count, 1 / count, np.float32) if weights is None else weights
    scaled = factors * np.sqrt(weights)[:, None, None, None]
    side = scaled.transpose(1, 2, 0, 3).reshape(heads * options, count * features)
    if side.shape[1] <= rank:
        projected = np.pad(side, ((0, 0), (0, rank - side.shape[1])))
        return projected.reshape(heads, options, rank)
    basis = np.random.default_rng(0).standard_normal((side.shape[1], rank + 16), np.float32)
    for _ in range(3):
        basis = np.linalg.qr(side.T @ (side @ basis))[0]
    small = side @ basis
    _, turn = np.linalg.eigh((small.T @ small).astype(np.float64))
    projected = small @ turn[:, ::-1][:, :rank].astype(np.float32)
    return projected.reshape(heads, options, rank)


def head_exchangeable(
    tables: Tables, model: str, layers: int, kv_heads: int, head_dim: int
) -> Tables:
    """What the tables say of another model whose heads correspond to none of theirs.

    One thing carries over: what an option loses when all heads have it. That loss is divided
    evenly among the other model's heads, without terms between heads, so that a policy with one
    option for all heads loses what it loses on the source, and the order of the heads and layers
    of either model cannot matter.
    """
    heads, count = layers * kv_heads, len(tables.samples)
    alike = [tables.by_sample(np.full(tables.heads, o)) for o in range(len(tables.options))]
    losses = np.stack(alike, 1)
    losses[losses < _ROUNDING] = 0  # of a cache that loses nothing
    each = losses[:, None] / np.float32(heads)  # [n, 1, O]
    return replace(
        tables,
        model=model,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        loss=np.broadcast_to(each, (count, heads, len(tables.options))),
        factor=np.zeros((1, heads, len(tables.options), 1), np.float32),
        group=np.zeros(count, np.int64),
    )
