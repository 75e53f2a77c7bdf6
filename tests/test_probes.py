"""Probes of the logits: their second moment is the curvature of the divergence they stand for."""

from __future__ import annotations

import pytest
import torch

from kvtune.traces.output_head import OutputHead
from kvtune.traces.probes import Probes


def second_moment(log_p: torch.Tensor, probes: Probes) -> torch.Tensor:
    """Mean of the outer products of one position's probes, ``[vocabulary, vocabulary]``."""
    drawn = probes.draw(log_p, "a")
    slopes = drawn.slopes(0, probes.count)[:, 0].double()
    return slopes.T @ slopes / probes.count


def fisher(log_p: torch.Tensor) -> torch.Tensor:
    p = log_p[0].double().exp()
    return torch.diag(p) - torch.outer(p, p)


@pytest.mark.parametrize("logits", [[1.0, 0.4, 0.0, -1.0], [6.0, 1.0, 0.5, -2.0]])
def test_the_second_moment_is_fishers_also_where_the_model_is_sure(
    logits: list[float],
) -> None:
    log_p = torch.tensor([logits]).log_softmax(-1)
    found, true = second_moment(log_p, Probes(60_000)), fisher(log_p)
    torch.testing.assert_close(found, true, rtol=0, atol=0.015 * float(true.abs().max()))


def test_a_few_probes_of_a_sure_position_say_what_labels_almost_never_do() -> None:
    """Four labels of a token with p = 0.9975 are all that token, and see next to nothing."""
    log_p = torch.tensor([[6.0, 0.0, -9.0]]).log_softmax(-1)
    lost = torch.tensor([-3.0, 0.0, 0.0]).double()
    true = float(lost @ fisher(log_p) @ lost)
    found = float(lost @ second_moment(log_p, Probes(4)) @ lost)
    assert found == pytest.approx(true, rel=0.5)
    p = log_p[0].exp().double()
    label = torch.tensor([1.0, 0, 0]).double() - p
    assert float(label @ lost) ** 2 < 0.01 * true


def test_every_seed_and_sample_has_its_own_draws() -> None:
    log_p = torch.zeros(9, 50).log_softmax(-1)
    drawn = [Probes(4, seed).draw(log_p, name).slopes(0, 4) for seed in (0, 1) for name in "ab"]
    assert torch.equal(drawn[0], Probes(4, 0).draw(log_p, "a").slopes(0, 4))
    assert len({tuple(slopes.flatten().tolist()) for slopes in drawn}) == 4


def test_probes_ask_nothing_of_a_shift_of_all_logits() -> None:
    log_p = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).mul(4).log_softmax(-1)
    slopes = Probes(6).draw(log_p, "a").slopes(0, 6)
    torch.testing.assert_close(slopes.sum(-1), torch.zeros(6, 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "count"), [(0, 6), (2, 3), (4, 9)])
def test_directions_before_a_linear_head_are_those_of_the_logits_through_it(
    first: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = torch.randn(5, 30, generator=generator).mul(4).log_softmax(-1)
    weight = torch.randn(30, 7, generator=generator)
    drawn = Probes(6).draw(log_p, "a")
    found = drawn.before(weight, first, count)
    expected = drawn.slopes(first, count).double() @ weight.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_head_whose_output_is_changed_further_is_not_passed_over(scale: float | None) -> None:
    head, hidden = torch.nn.Linear(7, 30, bias=False), torch.ones(1, 5, 7)
    with OutputHead(head) as watched:
        output = head(hidden)
    logits = output if scale is None else output * scale
    drawn = Probes(2).draw(logits[0].detach().log_softmax(-1), "a")
    end, slopes = watched.directions(logits, drawn)
    assert end is (hidden if scale is None else logits)
    assert slopes(0, 2).shape == (2, 5, end.shape[-1])
