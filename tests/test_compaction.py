"""Compaction by fitting, against straight-line versions in float64 and against scipy."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from kvtune.common.rotary import later_queries, turn
from kvtune.policies import fitting
from kvtune.policies.apply import apply_options
from kvtune.policies.attention import attend
from kvtune.policies.fitting import fitted_together, fitted_values, mass_weights, pursued
from kvtune.policies.methods.attention_matching import AttentionMatching
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.testing.cases import Case, PlainRope, make_signals, uniform

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, ROWS, TOKENS, SIZE = 2, 40, 24, 6
RIDGE = 1e-3


def attention_of(seed: int) -> Tensor:
    return uniform(seed, HEADS, ROWS, TOKENS).mul(3).softmax(-1)


def test_pursuit_takes_the_column_that_leaves_least() -> None:
    attention, values = attention_of(0), uniform(1, HEADS, TOKENS, SIZE)
    found = pursued(attention, values, 8)
    for head in range(HEADS):
        a = attention[head].double().numpy()
        outputs = a @ values[head].double().numpy()
        loudness = np.sqrt((outputs**2).sum(1).mean())
        target = np.c_[outputs, np.full(ROWS, loudness)]
        chosen: list[int] = []
        for taken in found[head].tolist():
            left = {}
            for column in set(range(TOKENS)) - set(chosen):
                some = a[:, [*chosen, column]]
                fit = some @ np.linalg.lstsq(some, target, rcond=None)[0]
                left[column] = ((target - fit) ** 2).sum()
            assert taken == min(left, key=left.__getitem__)
            chosen.append(taken)


def test_a_longer_pursuit_begins_with_the_shorter_one() -> None:
    attention, values = attention_of(2), uniform(3, HEADS, TOKENS, SIZE)
    assert torch.equal(pursued(attention, values, 12)[:, :5], pursued(attention, values, 5))


def test_pursuit_never_takes_a_column_twice_where_none_is_left_to_explain() -> None:
    attention = attention_of(4)[:, :3]  # three queries: three columns explain everything
    found = pursued(attention, uniform(5, HEADS, TOKENS, SIZE), TOKENS)
    for row in found.tolist():
        assert sorted(row) == list(range(TOKENS))
    mass = attention.sum(1)
    for head, row in enumerate(found.tolist()):
        rest = mass[head, row[3:]]
        assert (rest.diff() <= 1e-6).all(), "what explains nothing more follows by its attention"


def test_weights_are_those_of_non_negative_least_squares() -> None:
    columns = attention_of(6)[..., :7].double() * 4
    found = mass_weights(columns)
    for head in range(HEADS):
        a = columns[head].numpy()
        ridge = RIDGE * (a**2).sum(0).mean()
        padded = np.r_[a, np.sqrt(ridge) * np.eye(7)]
        expected, _ = nnls(padded, np.r_[np.ones(ROWS), np.full(7, np.sqrt(ridge))])
        np.testing.assert_allclose(found[head].numpy(), expected.clip(1e-4), atol=2e-3)


def test_values_are_those_of_least_squares() -> None:
    columns, own = attention_of(7)[..., :7].double(), uniform(8, HEADS, 7, SIZE)
    weights = uniform(9, HEADS, 7).exp().double()
    outputs = uniform(10, HEADS, ROWS, SIZE)
    found = fitted_values(columns, weights, outputs, own)
    for head in range(HEADS):
        x = columns[head].numpy() * weights[head].numpy()
        x /= x.sum(1, keepdims=True)
        ridge = np.sqrt(RIDGE * (x**2).sum(0).mean())
        padded = np.r_[x, ridge * np.eye(7)]
        target = np.r_[outputs[head].numpy(), ridge * own[head].numpy()]
        expected = np.linalg.lstsq(padded, target, rcond=None)[0]
        np.testing.assert_allclose(found[head].numpy(), expected, atol=1e-9)


def test_later_queries_are_the_prompts_own_behind_the_prompt() -> None:
    rope = PlainRope(tuple(100.0 ** (-pair / 4) for pair in range(4)))
    plain = uniform(11, 3, 1300, 8)
    found = later_queries(turn(plain, torch.arange(1300), rope), rope)
    assert found.shape == (3, 432, 8)  # every third of 1296
    at = torch.arange(1299, 3, -3).flip(0)
    expected = turn(plain[:, at], 1300 + torch.arange(432) % 128, rope)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert torch.equal(later_queries(plain, None), plain[:, at])
    assert later_queries(plain[:, :1], rope).shape == (3, 1, 8)


def error(option: Option, case: Case) -> float:
    """Mean square of what later queries get, held against the whole prompt."""
    signals = make_signals(case)
    queries = signals.later_queries()
    keys, values = signals.keys[:, None], signals.values[:, None]
    whole, mass = attend(queries, keys, values, None, signals.scale)
    part = apply_options([option], option.budget.resolve(case.prompt_tokens), signals).of_policy(0)
    ours = attend(
        queries, part.keys[:, None], part.values[:, None], None, signals.scale, part.weights
    )
    return float((whole - ours[0]).square().mean() + (mass - ours[1]).square().mean())


@pytest.mark.parametrize("select", ["pursuit", "snapkv"])
def test_fitting_loses_less_than_the_same_budget_of_tokens(
    select: Literal["pursuit", "snapkv"],
) -> None:
    case, budget = Case(101, 0, group=3), Budget(tokens=12)
    fitted = AttentionMatching(select)
    assert error(Option(fitted, budget), case) < 0.5 * error(Option(SnapKV(), budget), case)


def test_a_whole_prompt_is_kept_as_it_is() -> None:
    assert error(Option(AttentionMatching(), Budget(tokens=61)), Case(61, 0)) < 1e-9


def matched(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, outputs and own values of six pursued tokens."""
    attention, values = attention_of(seed), uniform(seed + 1, HEADS, TOKENS, SIZE)
    kept = pursued(attention, values, 6)
    columns = attention.gather(2, kept[:, None].expand(-1, ROWS, -1)).double()
    own = values.gather(1, kept[..., None].expand(-1, -1, SIZE))
    return columns, attention @ values, own


def test_a_step_of_the_weights_is_gauss_and_newtons_of_the_whole_residual() -> None:
    columns, outputs, own = matched(11)
    weights = mass_weights(columns)
    values = fitted_values(columns, weights, outputs, own)
    damping = torch.tensor([0.1, 3.0], dtype=torch.float64)
    found = fitting._weight_step(columns, weights, values, outputs.double(), damping)
    for head in range(HEADS):
        loudness = outputs[head].double().square().sum(-1).mean().sqrt()

        def residual(logs: Tensor, head: int = head, loudness: Tensor = loudness) -> Tensor:
            weighted = columns[head] * logs.exp()
            mass = weighted.sum(-1, keepdim=True)
            read = weighted / mass @ values[head]
            both = torch.cat([read - outputs[head].double(), loudness * mass.log()], 1)
            return both.flatten()

        logs = weights[head].log()
        slopes = torch.autograd.functional.jacobian(residual, logs)
        gram = slopes.T @ slopes
        gram = gram + damping[head] * gram.diagonal().diag()
        expected = torch.linalg.solve(gram, -slopes.T @ residual(logs))
        torch.testing.assert_close(found[head], expected, rtol=1e-6, atol=1e-9)


def test_fitting_together_never_loses_more_on_the_references() -> None:
    for seed in range(5):
        columns, outputs, own = matched(20 + 2 * seed)
        weights = mass_weights(columns)
        apart = weights, fitted_values(columns, weights, outputs, own)
        together = fitted_together(columns, outputs, own)
        errors = [fitting.match_error(columns, *fit, outputs) for fit in (together, apart)]
        assert (errors[0] <= errors[1]).all()
        assert (errors[0] < 0.95 * errors[1]).any(), "some step is taken"


def test_a_method_may_fit_weights_and_values_together() -> None:
    signals = make_signals(Case(60, 60, group=2))
    for method in (AttentionMatching(fit="apart"), AttentionMatching(fit="together")):
        part = method.parts(signals, 9)[0]
        assert part.plan == method.plan(9, 60)[0]
        assert part.values is not None
        assert part.log_weight is not None
        assert part.values.isfinite().all()
        assert part.log_weight.isfinite().all()
