"""CaM against a straight-line version in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtune.policies.methods.cam import CaM
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.testing.cases import Case, make_signals

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("budget", "merged"), [(20, 5), (12, 32), (60, 1)])
def test_values_are_merged_as_tokens_leave(budget: int, merged: int) -> None:
    signals = make_signals(Case(61, budget, group=3))
    method = CaM(sinks=4, merged=merged)
    kept = method.keep(signals, budget)
    assert torch.equal(kept, StreamingLLM(sinks=4).keep(signals, budget))
    stored = method.merge(signals, kept)
    assert stored is not None
    assert torch.equal(stored[0][0], signals.keys[0, kept[0]])
    q, k = signals.queries.double().numpy(), signals.keys.double().numpy()
    recent = budget - 4
    for head in range(2):
        drawn = np.zeros(61)
        for query in q[3 * head : 3 * head + 3]:
            for row in range(61):
                weight = np.exp(k[head, : row + 1] @ query[row] * signals.scale)
                drawn[: row + 1] += weight / weight.sum() / 3
        values = signals.values[head].double().numpy().copy()
        stay = [*range(4), *range(61 - recent, 61)]
        m = min(merged, recent)
        for i in range(4, 61 - recent):
            for j in range(i + 1, i + 1 + m):
                values[j] += min(1.0, drawn[i] / drawn[stay].mean()) * values[i] / m
        np.testing.assert_allclose(stored[1][head].numpy(), values[stay], rtol=1e-3, atol=1e-3)


def test_nothing_is_merged_where_nothing_leaves_or_only_sinks_stay() -> None:
    signals = make_signals(Case(20, 0))
    for budget in (0, 3, 4, 20, 50):
        assert CaM().merge(signals, CaM().keep(signals, budget)) is None
