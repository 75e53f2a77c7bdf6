"""Prompts to try things on: layers made of seeds, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.method import Method
from kvtune.policies.signals import Future, Signals

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """A prompt of one layer and a budget.

    Args:
        prompt_tokens: P.
        budget: tokens a head.
        kv_heads: H.
        group: query heads that share a KV head.
        seed: of the tensors.
        head_dim: D.
    """

    prompt_tokens: int
    budget: int
    kv_heads: int = 2
    group: int = 1
    seed: int = 0
    head_dim: int = 16

    def __str__(self) -> str:
        """Short, for test ids."""
        return f"p{self.prompt_tokens}-b{self.budget}-h{self.kv_heads}x{self.group}"


@dataclass(frozen=True)
class PlainRope:
    """A rotary embedding as signals carry it."""

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0


def uniform(seed: int, *shape: int) -> Tensor:
    """Numbers in [-2, 2), float32; the same on every machine."""
    return _drawn(seed, shape).clone()  # nobody shares what somebody may change


@lru_cache(maxsize=1024)
def _drawn(seed: int, shape: tuple[int, ...]) -> Tensor:
    drawn = np.random.default_rng(seed).random(shape)
    return torch.from_numpy(drawn * 4 - 2).float()


def make_signals(case: Case) -> Signals:
    """A layer's prompt with attention that differs between heads and tokens."""
    shape = (case.prompt_tokens, case.head_dim)
    queries = uniform(case.seed, case.kv_heads * case.group, *shape)
    keys, values = uniform(case.seed + 1, 2, case.kv_heads, *shape)
    return Signals(
        queries,
        keys,
        values,
        case.head_dim**-0.5,
        layer=case.seed % 5,
        rope=PlainRope(tuple(100.0 ** (-pair / 4) for pair in range(case.head_dim // 2))),
        reconstruction=uniform(case.seed + 2, case.kv_heads, case.prompt_tokens).square(),
        head_scores=uniform(case.seed + 3, case.kv_heads * case.group).square(),
        layer_error=0.1 + case.seed % 7 / 10,
        future=make_future(case),
        linked=tuple(uniform(case.seed + 7, 2, case.kv_heads, *shape)),
        sentence_ends=uniform(case.seed + 8, case.prompt_tokens + 7) > 1.2,
        repeat_queries=uniform(case.seed + 9, case.kv_heads * case.group, 6, case.head_dim),
        study_queries=uniform(case.seed + 10, case.kv_heads * case.group, 5, case.head_dim),
        learned=_learned(case),
    )


def _learned(case: Case) -> dict[str, Tensor]:
    """Orthogonal matrices of the heads, and 16 kernels of width 3."""
    squares = uniform(case.seed + 11, 2, case.kv_heads, case.head_dim, case.head_dim)
    of_keys, of_values = torch.linalg.qr(squares).Q
    return {
        "oscar_keys": of_keys, "oscar_values": of_values,
        "lococo_weight": uniform(case.seed + 12, 16, 2 * case.head_dim, 3),
        "lococo_bias": uniform(case.seed + 13, 16), "lococo_share": torch.tensor(0.5),
    }  # fmt: skip


@lru_cache(maxsize=64)
def shared_signals(case: Case) -> Signals:
    """The same layer, one object for all who only look at it: what is derived is derived once.

    A method that changes what it is given is found by ``choice_is_the_same_again``.
    """
    return make_signals(case)


def make_future(case: Case, observed: int = 7, probes: int = 3) -> Future:
    """Observed tokens after the prompt, and probes at them."""
    shape = (observed, case.head_dim)
    keys, values = uniform(case.seed + 5, 2, case.kv_heads, *shape)
    gradients = uniform(case.seed + 6, probes, observed, case.kv_heads * case.group, case.head_dim)
    queries = uniform(case.seed + 4, case.kv_heads * case.group, *shape)
    return Future(queries, keys, values, gradients)


def lean_signals(method: Method, full: Signals) -> Signals:
    """Only what the method says that it needs: a shorter tail of queries, recorded sums."""
    needs = method.needs
    window = min(needs.window, full.prompt_tokens)
    tail = full.queries[:, full.prompt_tokens - window :]
    moments = tuple(part.flatten(0, 1) for part in full.query_moments())
    future = full.future
    if future is not None and not needs.probes:
        future = replace(future, probes=None)
    return Signals(
        tail,
        full.keys,
        full.values,
        full.scale,
        full.column_sums().flatten(0, 1) if needs.column_sums else None,
        layer=full.layer,
        rope=full.rope if needs.rope else None,
        recorded_query_moments=(moments[0], moments[1]) if needs.query_moments else None,
        recorded_later_queries=full.later_queries().flatten(0, 1) if needs.later_queries else None,
        reconstruction=full.reconstruction if needs.reconstruction else None,
        head_scores=full.head_scores if needs.calibration else None,
        layer_error=full.layer_error if needs.calibration else None,
        future=future if needs.future else None,
        linked=full.linked if needs.linked else None,
        sentence_ends=full.sentence_ends if needs.sentences else None,
        repeat_queries=full.repeat_queries if needs.repeat_queries else None,
        study_queries=full.study_queries if needs.study_queries else None,
        learned=full.learned if needs.learned else {},
    )


def side_by_side(first: Signals, second: Signals) -> Signals:
    """Two prompts of one layer, the heads of the second behind those of the first."""
    names = (
        "queries", "keys", "values", "reconstruction", "head_scores", "repeat_queries",
        "study_queries",
    )  # fmt: skip
    both: dict[str, Any] = {
        name: torch.cat([getattr(x, name) for x in (first, second)]) for name in names
    }
    pairs = zip(first.given("linked"), second.given("linked"), strict=True)
    keys, values = (torch.cat(pair) for pair in pairs)
    return replace(first, **both, linked=(keys, values), future=None, _memo={})


def permuted_signals(full: Signals, order: Tensor) -> Signals:
    """The same layer with its KV heads, and their groups of query heads, in another order."""
    group = full.queries.shape[0] // len(order)
    queries = (order[:, None] * group + torch.arange(group)).flatten()
    future = full.given("future")
    return replace(
        full,
        queries=full.queries[queries],
        keys=full.keys[order],
        values=full.values[order],
        reconstruction=full.given("reconstruction")[order],
        head_scores=full.given("head_scores")[queries],
        repeat_queries=full.given("repeat_queries")[queries],
        study_queries=full.given("study_queries")[queries],
        future=Future(
            future.queries[queries],
            future.keys[order],
            future.values[order],
            full.probes()[:, :, queries],
        ),
        linked=tuple(other[order] for other in full.given("linked")),
        _memo={},
    )


def variants(kind: type[T]) -> Iterator[T]:
    """The default, then one parameter at a time at its bounds, beyond its default, or in words."""
    yield kind()
    hints = get_type_hints(kind)
    for each in fields(kind):  # type: ignore[arg-type]
        bounds = (each.metadata.get("low"), each.metadata.get("high"))
        values: list[Any] = [value for value in bounds if value is not None]
        if get_origin(hints[each.name]) is Literal:
            values += get_args(hints[each.name])
        if isinstance(each.default, int) and not isinstance(each.default, bool):
            values.append(2 * each.default + 1)
        for value in values:
            try:
                yield kind(**{each.name: value})
            except KvtuneError:
                continue  # a rule between values forbids it
