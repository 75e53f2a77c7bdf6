"""Protected spans: never dropped, never in fewer bits, and the method chooses as ever elsewhere."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch

from kvtune.policies.apply import apply_options
from kvtune.policies.formats.grouped import Int2
from kvtune.policies.method import ScoredMethod, methods
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.protected import Protected
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy_file.document import read_policy
from kvtune.policies.testing.cases import Case, make_signals
from kvtune.tuner.options import every_method

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = Case(101, 0, group=3)


@pytest.mark.parametrize(("budget", "inside"), [(40, 20), (20, 20), (7, 7), (0, 0), (500, 20)])
def test_the_span_stays_and_the_rest_is_the_methods_choice(budget: int, inside: int) -> None:
    signals = make_signals(CASE)
    kept = Protected("h2o", start=30, stop=50).keep(signals, budget)
    scores = H2O().ranked(signals, max(min(budget, 101) - inside, 0))
    for row, score in zip(kept.tolist(), scores.tolist(), strict=True):
        span = list(range(30, 30 + inside))
        others = sorted(set(range(101)) - set(range(30, 50)), key=lambda t: (-score[t], -t))
        assert row == sorted(span + others[: min(budget, 101) - inside])


def test_a_span_stays_in_16_bits() -> None:
    signals = make_signals(CASE)
    option = Option(Protected("h2o", 0, 16), Budget(tokens=48), Int2(), Int2())
    stored = apply_options([option], 48, signals).of_policy(0)
    assert torch.equal(stored.keys[:, :16], signals.keys[:, :16])
    rest = option.method.keep(signals, 48)[:, 16:, None].expand(-1, -1, CASE.head_dim)
    assert not torch.isclose(stored.keys[:, 16:], signals.keys.gather(1, rest)).all(-1).any()
    assert stored.footprint_bytes == (2 * option.footprint(48, 101, CASE.head_dim),)


def test_every_method_that_only_ranks_tokens_can_be_wrapped() -> None:
    kinds = (kind() for kind in methods().values())
    ranking = {
        method.name
        for method in kinds
        if isinstance(method, ScoredMethod) and method.ranks_alone and not method.looks_ahead
    }
    assert {*get_args(get_type_hints(Protected)["by"])} == ranking
    signals = make_signals(CASE)
    for name in sorted(ranking - {"compresskv", "kvzip"}):  # which the case has no signals for
        kept = Protected(name, start=30, stop=50).keep(signals, 40)  # type: ignore[arg-type]
        assert all({*range(30, 50)} <= {*row} and len({*row}) == 40 for row in kept.tolist())


def test_a_policy_file_wraps_a_method_and_no_search_does() -> None:
    text = "kvtune_policy: 1\npolicy: {method: {name: protected, by: tova, stop: 9}, budget: 20}\n"
    policy = read_policy(text).bind(2, 3)
    assert policy.heads[0][0].method == Protected("tova", stop=9)
    assert not any(isinstance(method, Protected) for method in every_method())
