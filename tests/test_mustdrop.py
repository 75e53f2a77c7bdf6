"""MustDrop's rule against a straight-line version in float64."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.policies.methods.mustdrop import MustDrop
from kvtune.policies.testing.cases import Case, make_signals

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("start", "stop"), [(0, 61), (9, 40), (50, 900)])
@pytest.mark.parametrize("budget", [8, 30, 45])
def test_what_stays_is_what_the_two_thresholds_leave(start: int, stop: int, budget: int) -> None:
    signals = make_signals(Case(61, budget, group=3))
    q, k = signals.queries.double().numpy(), signals.keys.double().numpy()
    drawn = np.zeros((8, 61))
    for head, query in enumerate(q):
        for row in range(8):
            at = 53 + row
            weight = np.exp(k[head // 3, : at + 1] @ query[at] * signals.scale)
            drawn[row, : at + 1] += weight / weight.sum() / len(q)
    span = [j for j in range(61) if start <= j < stop]
    others = [j for j in range(61) if j not in span]
    total = drawn[:, span].sum()

    method = MustDrop(start=start, stop=stop, window=8, overall=0.02, individual=0.05)
    kept = method.keep(signals, budget)
    assert (kept == kept[0]).all()  # heads choose alike
    stay = set(kept[0].tolist())
    if budget >= len(others):
        assert {*others} <= stay
        mine = stay - {*others}
        factors = np.geomspace(1e-2, 1e2, 40001)[:, None]
        small = drawn[:, span].sum(0) < 0.02 * factors * total
        faint = drawn[:, span].max(0) < 0.05 * factors
        stays = np.array([j in mine for j in span])
        assert (~(small & faint) == stays).all(1).any()
    else:
        assert stay <= {*others}
