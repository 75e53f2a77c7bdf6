"""What ``kvtune estimate`` answers: whether it fits, what it costs, as a table and for JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvtune.cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.cli.engine_report import Engine
    from kvtune.cli.engine_verdict import Verdict
    from kvtune.cli.llama_report import LlamaEngine
    from kvtune.common.errors import DoesNotFitError
    from kvtune.simulator.memory.engine_memory import EngineMemory
    from kvtune.simulator.memory.llama_memory import LlamaMemory
    from kvtune.tuner.cases import Case
    from kvtune.tuner.estimating import Asked


@dataclass(frozen=True)
class Answer:
    """All combinations that were asked for, judged.

    Args:
        asked: what was asked for.
        cases: of the full cache and the policy.
        memory: of a single one, where an engine was asked for: its memory, or why it is not known.
        verdict: what the engine says in kvtune's place; None where there is none.
    """

    asked: Asked
    cases: Sequence[Case]
    memory: EngineMemory | LlamaMemory | str | None = None
    verdict: Verdict | None = None

    @property
    def fits(self) -> bool:
        """Whether any combination fits."""
        return any(case.fits for case in self._decisive)

    @property
    def _decisive(self) -> list[Case]:
        """Those of the policy, where one was named; else of the full cache."""
        return [case for case in self.cases if case.policy == self.cases[-1].policy]

    @property
    def _would_fit(self) -> Sequence[str]:
        if self.verdict is not None:
            return self.verdict.would_fit
        from kvtune.tuner.would_fit import what_would_fit

        case = self._decisive[0]
        return what_would_fit(self.asked, case) if self.asked.is_one and not case.fits else []

    def _with_narrower_weights(self) -> list[str]:
        """The widest weights that fit, with the cards on which what was asked for does not."""
        from kvtune.tuner.would_fit import narrower_weights

        found: dict[str, list[str]] = {}
        for card in self.asked.cards:
            theirs = [case for case in self._decisive if case.card == card]
            easiest = min(theirs, key=lambda case: case.context_tokens * case.batch)
            if any(case.fits for case in theirs):
                continue
            if weights := narrower_weights(self.asked, easiest):
                found.setdefault(weights, []).append(card.gpu.slug)
        return [
            f"would fit with --weights {weights}: {', '.join(slugs)}"
            for weights, slugs in found.items()
        ]

    def show(self, output: Output, form: str) -> None:
        """For people: tables, or lines of figures on stdout with what is said beside on stderr."""
        if form in ("csv", "markdown"):
            self._show_lines(output, form)
        else:
            output.show(*self._shown())
            if notes := self.asked.notes:
                output.show("", *(f"note: {note}" for note in notes))

    def _show_lines(self, output: Output, form: str) -> None:
        from kvtune.cli.sweep_report import as_csv, as_markdown

        text = as_csv(self.cases) if form == "csv" else as_markdown(self.cases)
        print(text, file=output.stdout)
        said = [self.verdict.text] if self.verdict else []
        said += [f"note: {note}" for note in self.asked.notes]
        if said and not output.quiet:
            replace(output, stdout=sys.stderr).show(*said)

    def _shown(self) -> list[RenderableType]:
        from kvtune.cli.engine_report import engine_table
        from kvtune.cli.sweep_report import as_table
        from kvtune.cli.tables import budget_table

        asked, quality = self.asked, _quality(self.asked)
        if not asked.is_one:
            caption = "\n".join([f"quality: {quality}", *self._with_narrower_weights()])
            return [as_table(f"Costs of {asked.shape.name}", self.cases, caption)]
        said = self.verdict.text if self.verdict else _verdict(asked, self._decisive[0])
        budget = self.cases[0].budget
        shown: list[RenderableType] = [said]
        if self.verdict is None and budget is not None:
            shown += ["", budget_table(budget, quality)]
        if isinstance(self.memory, str):
            shown += ["", self.memory]
        elif self.memory is not None:
            shown += ["", engine_table(self.memory)]
        return [*shown, *(["", self._costs(quality)] if budget is not None else [])]

    def _costs(self, quality: str) -> RenderableType:
        from kvtune.cli.tables import cost_table
        from kvtune.common.words import figure

        budget = self.cases[0].budget
        assert budget is not None  # noqa: S101 - as the caller saw
        costs = {case.policy: case.cost for case in self.cases if case.cost}
        prices = [case.cost_per_million_tokens for case in self.cases]
        return cost_table(
            budget, costs, quality, [figure(p) for p in prices if p], first_tokens=True
        )

    def as_dict(self) -> dict[str, Any]:
        """The form that goes into JSON."""
        from kvtune.cli.engine_report import as_json
        from kvtune.cli.sweep_report import as_rows

        asked, cases, one = self.asked, self.cases, self.asked.is_one
        named = [{"name": case.policy, **vars(case.cost)} for case in cases if one and case.cost]
        return {
            "model": asked.shape.name,
            "gpu": asked.cards[0].gpu.slug if one else None,
            "gpus": asked.gpus,
            "total_gpus": asked.total_gpus,
            "stack": asked.stack,
            "generated_tokens": asked.generated_tokens,
            "budget": cases[0].budget if one and self.verdict is None else None,
            "quality": _quality(asked),
            "policies": named if one else None,
            "engine": as_json(self.memory),
            "fits": self.fits,
            "would_fit": self._would_fit,
            "rows": as_rows(cases),
            "notes": asked.notes,
        }


def judged(asked: Asked, engine: Engine | LlamaEngine | None) -> Answer:
    """All combinations, by the engine that was asked for where its memory is known.

    Raises:
        DoesNotFitError: a single one cannot fit, and no engine's memory is known.
    """
    from kvtune.cli.engine_report import engine_of
    from kvtune.cli.engine_verdict import by_engine, judged_each, verdict_of

    if not asked.is_one:
        return Answer(asked, judged_each(engine, asked, asked.cases()))
    cases, error = _one(asked)
    memory = engine_of(engine, asked, cases[0])
    verdict = verdict_of(engine, memory, asked, cases[0])
    if error is not None and verdict is None:
        raise error
    if verdict is not None:
        cases = [by_engine(engine, memory, asked, each, verdict.fits) for each in cases]
    return Answer(asked, cases, memory, verdict)


def _one(asked: Asked) -> tuple[list[Case], DoesNotFitError | None]:
    """The only combination, and why it has no costs."""
    from kvtune.common.errors import DoesNotFitError

    one = asked.cards[0], asked.contexts[0], asked.batches[0]
    try:
        return asked.of(*one), None
    except DoesNotFitError as error:
        return asked.refused(*one, asked.splits()[0], asked.weights[0], str(error)), error


def _verdict(asked: Asked, case: Case) -> str:
    """Whether it fits, and what would where it does not."""
    from kvtune.common.units import format_bytes, format_tokens
    from kvtune.common.words import count
    from kvtune.tuner.would_fit import what_would_fit

    assert case.cost is not None  # noqa: S101 - as above
    at_once = f"{count(case.batch)} x {format_tokens(case.context_tokens)} with the {case.policy}"
    most = case.cost.sequences_that_fit
    if case.fits:
        return f"fits: {at_once}; {count(most)} would fit at once"
    peak = f"{format_bytes(case.cost.memory.value)} of {format_bytes(case.card.memory_bytes)}"
    would = what_would_fit(asked, case)
    mend = f"; what would fit: {', or '.join(would)}" if would else "; no known card is enough"
    return f"does not fit: {at_once} take {peak} at their peak{mend}"


def _quality(asked: Asked) -> str:
    """An estimate runs nothing; what is known of the loss is what the file says of its model."""
    from kvtune.cli.planned import other_model

    document = asked.document
    known = document.provenance.quality if document and document.provenance else None
    if not known:
        return "not estimated here; see kvtune search"
    if known.edited:
        return str(known)
    other = other_model(document, asked.shape)
    return f"{known}, as its file says" + (f" of {other}" if other else "")
