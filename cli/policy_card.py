"""The policy card of a study: what its policy takes and loses, on one page that travels with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.stored import read_json
from kvtune.common.units import GB, GIB
from kvtune.tuner.explore.study import Study

if TYPE_CHECKING:
    from kvtune.tuner.explore.view import View

_ROWS = 8  # budgets on one page


@dataclass(frozen=True)
class Budget:
    """One plan of the front: what a prompt's cache takes, and what that loses.

    Args:
        share: of the bf16 bytes of the same prompt.
        prompt_bytes: of one compressed prompt.
        context_tokens: of a prompt.
        sequences: prompts that fit at once.
        kl: on the selection samples, nats/token.
        chosen: whether this is the card's policy.
    """

    share: float
    prompt_bytes: int
    context_tokens: int
    sequences: int
    kl: Estimate
    chosen: bool


@dataclass(frozen=True)
class Other:
    """A policy that the plan is compared with at equal bytes.

    Args:
        name: what it is called.
        prompt_bytes: of one compressed prompt.
        predicted: loss before anything ran live, nats/token.
        live: loss measured live, or None.
        retrieval: share of needle digits right, live, or None.
    """

    name: str
    prompt_bytes: int
    predicted: Estimate
    live: Estimate | None
    retrieval: Estimate | None


@dataclass(frozen=True)
class Task:
    """The policy's loss on one kind of held-out text.

    Args:
        name: of the kind.
        about: what such a sample asks of the model.
        predicted: mean loss before anything ran live, nats/token, with its interval.
        live: loss measured live, or None.
    """

    name: str
    about: str
    predicted: Estimate
    live: Estimate | None


@dataclass(frozen=True)
class Card:
    """Everything on a policy card.

    Args:
        kvtune_card: version of this format.
        kvtune: version that searched.
        model: name of the model.
        model_source: where its shape is from.
        trace_hash: of the trace that losses were read from, or of the weights of the model that
            stood in; "" where not known.
        gpu: the card's name.
        memory_limit_bytes: that everything together may take.
        verdict: the answer in one sentence.
        comparison: whether the plan loses less than the policies beside it.
        quality_source: the model's own trace, or a stand-in's.
        stand_in: the model whose trace stood in, or "".
        kl: loss of the policy on held-out samples, nats/token.
        held_out_samples: behind that figure.
        measured_tokens: prompt tokens of those samples.
        retrieval: share of needle digits right, live, or None.
        full_cache_retrieval: the same of the uncompressed cache, or None.
        context_tokens: of a prompt.
        sequences: prompts that fit at once.
        at_once: the same, between those that fit at both ends of what is left for caches.
        full_cache_sequences: prompts that fit uncompressed.
        prompt_bytes: of one compressed prompt.
        share: of the bf16 bytes of the same prompt.
        memory: peak of everything together, B.
        time_per_token: of a decode step of all sequences, s.
        tokens_per_second: of all sequences together.
        budgets: plans of the front, least bytes first.
        policies: the plan first, then what it is compared with.
        command: that repeats the search.
        tasks: the policy's loss by kind of held-out text.
        layout: whose pages the other budgets are counted in, where the policy is a stack's; or "".
    """

    kvtune_card: Literal[1]
    kvtune: str
    model: str
    model_source: str
    trace_hash: str
    gpu: str
    memory_limit_bytes: int
    verdict: str
    comparison: str
    quality_source: Literal["own trace", "stand-in"]
    stand_in: str
    kl: Estimate
    held_out_samples: int
    measured_tokens: int
    retrieval: Estimate | None
    full_cache_retrieval: Estimate | None
    context_tokens: int
    sequences: int
    at_once: Estimate
    full_cache_sequences: int
    prompt_bytes: int
    share: float
    memory: Estimate
    time_per_token: Estimate
    tokens_per_second: Estimate
    budgets: tuple[Budget, ...]
    policies: tuple[Other, ...]
    command: str
    tasks: tuple[Task, ...] = ()
    layout: str = ""

    @property
    def quality(self) -> str:
        """``stand-in (smollm2-135m)`` or ``own trace``."""
        return f"stand-in ({self.stand_in})" if self.stand_in else self.quality_source


def card_of(study: Study) -> Card:
    """The card of a finished study's plan.

    Raises:
        KvtuneError: the search has not finished.
    """
    from kvtune.simulator.memory.at_once import prompts_at_once
    from kvtune.tuner.explore.view import View
    from kvtune.tuner.explore.what_if import Setting, figures_of
    from kvtune.tuner.verdict import verdict_of

    verdict, outcome, row, facts = verdict_of(study), study.outcome, study.chosen, study.facts
    if verdict is None or outcome is None or row is None:
        raise KvtuneError(
            f"this search is {study.state}, and a card is of a finished one",
            where=str(study.folder),
            hint="run the same search again to go on, then ask for its card.",
        )
    setting = Setting.asked(facts)
    view = View(study, figures_of(study, setting), setting)
    figures, ours = view.figures, outcome.baselines[0]
    return Card(
        kvtune_card=1,
        kvtune=facts.kvtune,
        model=facts.shape.name,
        model_source=facts.shape.source,
        trace_hash=_hash(outcome.provenance),
        gpu=facts.card.name,
        memory_limit_bytes=facts.memory_bytes,
        verdict=verdict.sentence,
        comparison=verdict.comparison,
        quality_source=facts.source,
        stand_in=facts.stand_in,
        kl=outcome.quality.kl,
        held_out_samples=facts.held_out_samples,
        measured_tokens=facts.measured_tokens,
        retrieval=ours.retrieval_accuracy,
        full_cache_retrieval=outcome.full_cache_accuracy,
        context_tokens=verdict.context_tokens,
        sequences=verdict.sequences,
        at_once=prompts_at_once(
            verdict.sequences,
            figures.budget(row).most_of(outcome.sequence_bytes, int(figures.waiting[row])),
        ),
        full_cache_sequences=verdict.full_cache_sequences,
        prompt_bytes=int(figures.prompt_bytes[row]),
        share=float(figures.share[row]),
        memory=outcome.memory,
        time_per_token=figures.estimate("step_s", row),
        tokens_per_second=figures.estimate("tokens_per_s", row),
        budgets=tuple(_budgets(view)),
        policies=tuple(
            Other(b.name, b.prompt_bytes, b.predicted, b.live, b.retrieval_accuracy)
            for b in outcome.baselines
        ),
        command=command_of(study),
        tasks=tuple(_tasks(study, row)),
        layout=facts.layout,
    )


_ABOUT = {
    "prose": "going on with prose",
    "code": "going on with source code",
    "retrieval": "8 numbers hidden in text: RULER's multi-key needles",
    "recall": "values of keys in a long list (Liu et al., 2023)",
    "chat": "answers about a manual, turn by turn",
    "copy": "a long text, word for word",
    "json": "orders of a few customers as JSON, made up",
    "logs": "lines that services write while they answer requests, made up",
    "dialogue": "two people settling who brings what, made up",
    "language": "stories in German, French and Spanish, made up",
    "user": "the searcher's own text",
}


def _tasks(study: Study, row: int) -> Iterator[Task]:
    live = study.live(study.plans[row])
    measured = live.by_kind if live else {}
    predicted = study.outcome.baselines[0].by_kind if study.outcome else {}
    for kind, loss in predicted.items():
        yield Task(kind, _ABOUT.get(kind, ""), loss, measured.get(kind))


def _hash(provenance: dict[str, Any]) -> str:
    """Of the trace, else of the stand-in's weights, as far as the result says."""
    stand_in = provenance.get("stand_in")
    weights = stand_in.get("model_fingerprint", "") if isinstance(stand_in, dict) else ""
    return str(provenance.get("trace") or weights)


def _budgets(view: View) -> Iterator[Budget]:
    """The chosen plan, and plans of the front evenly between its ends."""
    study, figures = view.study, view.figures
    rows = sorted(map(int, view.front), key=lambda row: int(figures.prompt_bytes[row]))
    last = len(rows) - 1
    evenly = (
        {round(i * last / (_ROWS - 1)) for i in range(_ROWS)} if last >= _ROWS else range(_ROWS)
    )
    for place, row in enumerate(rows):
        if place in evenly or row == study.chosen:
            yield Budget(
                share=float(figures.share[row]),
                prompt_bytes=int(figures.prompt_bytes[row]),
                context_tokens=int(figures.context_tokens[row]),
                sequences=int(figures.tokens_that_fit[row] // figures.context_tokens[row]),
                kl=study.plans[row].kl,
                chosen=row == study.chosen,
            )


_OPTIONS = {
    "model": "--model", "gpu": "--gpu", "weights": "--weights", "generated_tokens": "--generated",
    "sequences": "--batch", "largest_kl": "--max-kl", "trials": "--trials", "seed": "--seed",
    "workload": "--workload", "menu": "--menu", "stack": "--for",
}  # fmt: skip


def command_of(study: Study) -> str:
    """The search that made a study, as far as its ``config.json`` says; paths are shortened."""
    path = study.folder / "config.json"
    asked: dict[str, Any] = read_json(path) if path.is_file() else {}
    facts = study.facts
    known: dict[str, Any] = {
        "model": facts.shape.name,
        "gpu": facts.gpu,
        "seed": facts.seed,
        "trials": facts.trials,
    }
    given = known | {name: value for name, value in asked.items() if value is not None}
    words = ["kvtune", "search"]
    for name, option in _OPTIONS.items():
        if name in given:
            words += [option, _portable(str(given[name]))]
    words += ["--mem", _size(facts.memory_bytes)]
    if most_read := given.get("read_bytes"):
        words += ["--read-bytes", _size(most_read)]
    if most_moved := given.get("moved_bytes"):
        words += ["--moved-bytes", _size(most_moved)]
    if heads := given.get("heads"):
        words += ["--heads", _portable(str(heads))]
    if context := given.get("context_tokens"):
        longest = given.get("longest_context")
        words += ["--context", f"{context}-{longest}" if longest else str(context)]
    for text in given.get("texts") or ():
        words += ["--text", _portable(str(text))]
    return shlex.join([*words, *(["--stand-in"] if given.get("stand_in") else [])])


def _portable(text: str) -> str:
    """Without the folders of this machine."""
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "~")) else text


def _size(size: int) -> str:
    for unit, name in ((GB, "GB"), (GIB, "GiB")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size}B"
