"""Gates that are learned from checked answers: what they mix, and what moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.runtime.duo_gates import Distillation
from kvtune.runtime.duo_gates import train_gates as distilled
from kvtune.runtime.head_gates import gated, near_attention
from kvtune.runtime.rlkv_gates import (
    GateTraining,
    Question,
    questions_of,
    share_right,
    train_gates,
)
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.seam import attending, causal_attention

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, ANSWER = 24, 3
SMALL = GateTraining(steps=3, questions=2, answers=4, sinks=2, window=4, rate=0.05)


@pytest.fixture
def loaded(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], tokenizer: Any, tmp_path: Any
) -> LoadedModel:
    from transformers import LlamaConfig

    network = make_network(LlamaConfig(**tiny_fields))
    network.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return load_model(str(tmp_path / "tiny"), device="cpu")


def questions(count: int = 3) -> list[Question]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, 60, (count, PROMPT + ANSWER), generator=generator)
    return [Question(row[:PROMPT], row[PROMPT:]) for row in drawn]


def test_near_attention_is_that_over_the_first_and_newest_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 9, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    found = near_attention(q, k, v, 0.3, sinks=2, window=3)
    for head in range(4):
        for row in range(9):
            seen = [t for t in range(row + 1) if t < 2 or t > row - 3]
            weights = (q[0, head, row] @ k[0, head // 2, seen].T * 0.3).softmax(-1)
            expected = weights @ v[0, head // 2, seen]
            torch.testing.assert_close(found[0, head, row], expected)


def test_open_gates_are_plain_attention_and_shut_ones_near_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 9, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 9, 8, generator=generator)
    whole, near = causal_attention(q, k, v, 0.3, None), near_attention(q, k, v, 0.3, 2, 3)
    gates = torch.tensor([[1.0, 0.0]])
    found = gated(gates, 2, 3)(0, q, k, v, 0.3, None)
    torch.testing.assert_close(found[:, :2], whole[:, :2])
    torch.testing.assert_close(found[:, 2:], near[:, 2:])
    half = gated(torch.full((1, 2), 0.5), 2, 3)(0, q, k, v, 0.3, None)
    torch.testing.assert_close(half, (whole + near) / 2)


def constant(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda answers, _: torch.full((len(answers),), value)


def test_the_price_alone_closes_all_gates_alike_while_answers_are_good(loaded: LoadedModel) -> None:
    gates = train_gates(loaded, questions(), SMALL, reward=constant(1.0))
    assert float(gates.max()) == float(gates.min())
    assert float(gates.max()) == pytest.approx(1 - 3 * SMALL.rate, abs=1e-3)  # Adam's three steps


def test_nothing_moves_where_answers_are_bad_and_alike(loaded: LoadedModel) -> None:
    gates = train_gates(loaded, questions(), SMALL, reward=constant(0.0))
    assert gates.tolist() == torch.ones_like(gates).tolist()


def test_a_rewarded_token_becomes_likelier(loaded: LoadedModel) -> None:
    """One question whose first token is rewarded if it is even: its chance must grow."""

    def even(answers: Tensor, _: Tensor) -> Tensor:
        return (answers[:, 0] % 2 == 0).float()

    asked = [Question(questions()[0].prompt, questions()[0].answer[:1])]
    training = GateTraining(
        steps=12, questions=1, answers=32, sinks=1, window=2, rate=0.05, price=0.0
    )
    gates = train_gates(loaded, asked, training, reward=even)
    chances = []
    for each in (torch.ones_like(gates), gates):
        with attending(gated(each, 1, 2)), torch.no_grad():
            logits = loaded.model(input_ids=asked[0].prompt[None], use_cache=False).logits[0, -1]
        chances.append(float(logits.softmax(-1)[::2].sum()))
    assert chances[1] > chances[0]
    assert bool((gates < 1).any())


def test_the_same_seed_learns_the_same_gates_and_leaves_the_model_alone(
    loaded: LoadedModel,
) -> None:
    def some(answers: Tensor, _: Tensor) -> Tensor:
        return (answers.sum(-1) % 5).float() / 4

    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    wanted = [p.requires_grad for p in loaded.model.parameters()]
    runs = [train_gates(loaded, questions(), SMALL, reward=some) for _ in range(2)]
    assert torch.equal(*runs)
    assert 0 <= float(runs[0].min()) <= float(runs[0].max()) <= 1
    assert [p.requires_grad for p in loaded.model.parameters()] == wanted
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())


def test_questions_end_where_their_answers_begin() -> None:
    needle = (-1, 0, 0, -1, 1, 1)
    sample = Sample("s", "search", "retrieval", tuple(range(10, 20)), 20, 6, needle)
    found = questions_of([sample], "cpu")
    assert [each.answer.tolist() for each in found] == [[16, 17], [19, 20]]
    assert [each.prompt.tolist()[-1] for each in found] == [15, 18]


def test_a_share_of_right_tokens_is_the_reward() -> None:
    right = torch.tensor([4, 5, 6, 7])
    answers = torch.stack([right, torch.tensor([4, 0, 6, 0]), right + 1])
    np.testing.assert_allclose(share_right(answers, right), [1, 0.5, 0])


def test_without_questions_there_is_nothing_to_learn(loaded: LoadedModel) -> None:
    with pytest.raises(KvtuneError, match="nothing to learn"):
        train_gates(loaded, [], SMALL)


def sample(numbers: bool = True) -> Sample:
    """A prompt of 24 tokens, then six rows of which four foretell a hidden number."""
    ids = tuple(torch.randint(3, 60, (30,), generator=torch.Generator().manual_seed(2)).tolist())
    rows = (-1, 0, 0, 0, 0, -1) if numbers else (-1,) * 6
    return Sample("s", "search", "retrieval", ids, 5, 6, rows)


def states(loaded: LoadedModel, handler: Any = None) -> Tensor:
    """Last states of the rows that foretell the number, by the model's own interface."""
    ids = torch.tensor([sample().token_ids])
    with torch.no_grad(), attending(handler or causal_attention_of_all):
        found = loaded.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    last: Tensor = found.hidden_states[-1][0, 25:29]
    return last


def causal_attention_of_all(_: int, *given: Any) -> Tensor:
    return causal_attention(*given)


def test_distilled_gates_report_how_far_states_are_from_those_with_open_gates(
    loaded: LoadedModel,
) -> None:
    """The first step begins with open gates; the second's distance is that of the first's gates."""
    training = Distillation(steps=2, sinks=2, window=4, rate=0.3, ramp=0)
    told: list[tuple[int, float, float]] = []
    distilled(loaded, [sample()], training, seen=lambda *step: told.append(step))
    assert told[0][1] == pytest.approx(0, abs=1e-9)
    after = distilled(loaded, [sample()], Distillation(1, 2, 4, 0.3, ramp=0))
    moved = (states(loaded, gated(after, 2, 4)) - states(loaded)).square().mean()
    assert float(moved) > 0
    assert told[1][1] == pytest.approx(float(moved), rel=1e-4)


def test_without_a_price_open_gates_stay_open_and_a_price_alone_shuts_them(
    loaded: LoadedModel,
) -> None:
    free = distilled(loaded, [sample()], Distillation(5, 2, 4, price=0))
    assert free.tolist() == torch.ones_like(free).tolist()
    everything_near = Distillation(40, 2, 64, rate=0.1)  # a window over the whole prompt
    shut = distilled(loaded, [sample()], everything_near)
    assert shut.tolist() == torch.zeros_like(shut).tolist()


def test_the_head_that_moves_states_most_keeps_the_highest_gate(loaded: LoadedModel) -> None:
    """Beside what shutting each head alone does to the states."""
    gates = distilled(loaded, [sample()], Distillation(40, 1, 1, rate=0.05, price=0.5))
    harm = torch.zeros_like(gates)
    for at in np.ndindex(*gates.shape):
        one = torch.ones_like(gates)
        one[at] = 0
        harm[at] = (states(loaded, gated(one, 1, 1)) - states(loaded)).square().mean()
    assert int(gates.argmax()) == int(harm.argmax())
    assert int(gates.argmin()) == int(harm.argmin())
    assert 0 <= float(gates.min()) < float(gates.max()) <= 1


def test_the_rate_rises_stays_and_falls() -> None:
    training = Distillation(steps=10, rate=1.0, ramp=0.4, floor=0.3)
    found = [training.rate_at(step) for step in range(10)]
    assert found == pytest.approx([0.3, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.3])


def test_samples_that_ask_for_no_number_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(KvtuneError, match="hidden number"):
        distilled(loaded, [sample(numbers=False)], Distillation(1))
