"""RLKV's gates: how much of each KV head's far attention answers need, learned from answers.

A gate mixes a head's attention over everything with that over sinks and a recent window. The model
answers questions whose answers can be checked, with drawn tokens; tokens of answers that did better
than others to the same question are made likelier by moving the gates, and as long as answers are
good enough a price draws all gates down. Weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress, Silent
from kvtune.policies.head_scores import HeadScores
from kvtune.runtime.head_gates import gate_scores, gated, open_gates, weights_fixed
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.traces.seam import attending

Reward = Callable[[Tensor, Tensor], Tensor]
"""Of answers ``[G, T]`` and the right one ``[T]``, each from 0 to 1, ``[G]``."""


@dataclass(frozen=True)
class GateTraining:
    """How gates are learned; as RLKV's authors do it but for lengths and the number of answers.

    Args:
        steps: of the optimiser; 185 in the paper.
        questions: asked at each step; 32 in the paper.
        answers: drawn to each; 4 in the paper.
        sinks: first tokens that a gated head always sees.
        window: newest tokens that it always sees.
        rate: of Adam.
        price: of the mean gate, beta.
        good: mean reward from which the price is asked, tau.
        temperature: at which answers are drawn.
        seed: of what is drawn.
    """

    steps: int = 60
    questions: int = 4
    answers: int = 4
    sinks: int = 16
    window: int = 64
    rate: float = 1e-2
    price: float = 1e-3
    good: float = 0.5
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that can be checked.

    Args:
        prompt: ``[N]`` token ids, up to where the answer begins.
        answer: ``[T]`` token ids.
    """

    prompt: Tensor
    answer: Tensor


def questions_of(samples: Sequence[Sample], device: str) -> list[Question]:
    """Every needle that the samples ask for, with all that stands before its answer."""
    found = []
    for sample in samples:
        rows = np.array(sample.needle_of_row)
        ids = torch.tensor([*sample.token_ids, sample.next_token], device=device)
        for needle in sorted(set(rows[rows >= 0].tolist())):
            at = sample.prompt + 1 + np.flatnonzero(rows == needle)
            found.append(Question(ids[: at[0]], ids[at[0] : at[-1] + 1]))
    return found


def share_right(answers: Tensor, right: Tensor) -> Tensor:
    """The share of an answer's tokens that are right, ``[G]``."""
    return (answers == right).float().mean(-1)


def train_gates(
    loaded: LoadedModel,
    questions: Sequence[Question],
    training: GateTraining,
    *,
    reward: Reward = share_right,
    progress: Progress | None = None,
    seen: Callable[[int, float, float], None] | None = None,
) -> Tensor:
    """Gates of all KV heads, ``[L, H]`` float32 from 0 to 1; every head begins at 1.

    loss = - mean over answers and tokens of advantage * log p(token)
           + [r > good] * price * (exp(r) - 1) * mean gate,    r = mean reward of the step

    An answer's advantage is its reward less the mean of its question's, over their deviation.

    Source: "RLKV" (reinforcement-learned KV heads) as in its code, rlkv-areal at 6f9933d. Differs:
    answers are numbers hidden in the prompt, not mathematics; each step is taken on answers that
    were just drawn, so that nothing is clipped.

    Args:
        loaded: the model.
        questions: that it can answer.
        training: how.
        reward: checks answers.
        progress: told of every step.
        seen: given each step's number, mean reward and mean gate.

    Raises:
        KvtuneError: there are no questions.
    """
    if not questions:
        raise KvtuneError("there is nothing to learn from: no question was asked")
    gates = open_gates(loaded)
    optimiser = torch.optim.Adam([gates], lr=training.rate)
    generator = torch.Generator(device=loaded.device).manual_seed(training.seed)
    order = np.random.default_rng(training.seed)
    steps = range(training.steps)
    with weights_fixed(loaded.model):
        for step in (progress or Silent()).track(steps, "learning gates", training.steps):
            asked = order.choice(len(questions), min(training.questions, len(questions)), False)
            optimiser.zero_grad()
            rewards = [
                _learn(loaded, questions[at], gates, training, reward, generator, len(asked))
                for at in asked
            ]
            mean = float(torch.stack(rewards).mean())
            if mean > training.good:
                (training.price * float(np.expm1(mean)) * gates.mean()).backward()
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            if seen is not None:
                seen(step, mean, float(gates.mean()))
    return gates.detach()


def rlkv_scores(loaded: LoadedModel, gates: Tensor, training: GateTraining) -> HeadScores:
    """The gates as head scores, called ``rlkv``."""
    drawn = f"{training.steps} steps of {training.questions} x {training.answers} answers"
    return gate_scores(loaded, "rlkv", gates, "RLKV, policy gradient", drawn, training.seed)


def _learn(
    loaded: LoadedModel,
    question: Question,
    gates: Tensor,
    training: GateTraining,
    reward: Reward,
    generator: torch.Generator,
    of: int,
) -> Tensor:
    """Draw answers to one question and add its share to the gates' gradient; the mean reward."""
    handler = gated(gates, training.sinks, training.window)
    with attending(handler):
        with torch.no_grad():
            answers = _drawn(loaded, question, training, generator)
        rewards = reward(answers, question.answer)
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        if bool((rewards != rewards[0]).any()):
            likely = _log_likelihood(loaded, question, answers, training.temperature)
            (-(advantage[:, None] * likely).mean() / of).backward()
    return rewards.mean()


def _drawn(
    loaded: LoadedModel, question: Question, training: GateTraining, generator: torch.Generator
) -> Tensor:
    """Answers ``[G, T]``, token by token; everything is read anew, as prompts are short."""
    ids = question.prompt.expand(training.answers, -1)
    for _ in question.answer:
        logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        chances = (logits.float() / training.temperature).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids[:, len(question.prompt) :]


def _log_likelihood(
    loaded: LoadedModel, question: Question, answers: Tensor, temperature: float
) -> Tensor:
    """Of every token of the answers, ``[G, T]``, with its gradient by the gates."""
    count = answers.shape[1]
    ids = torch.cat([question.prompt.expand(len(answers), -1), answers], 1)
    logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits
    likely = (logits[:, :-1].float() / temperature).log_softmax(-1)
    picked: Tensor = likely.gather(-1, answers[..., None])[..., 0]
    return picked
