"""Takes a policy to a serving stack: the contract of an exporter.

An exporter says what its engine can take (``limits``) and renders what it is given, line by line
honest about what was lost. A file is true of what runs there, not of the plan that it comes from:
a method is dropped rather than stood in for, sequences are counted again for what the stack holds,
and the plan's loss is named only where all of the plan is kept. Searching again inside those limits
is the tuner's work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.files import inside, write_text
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.export.lines import Line, loses_no_more, quality_lines
from kvtune.policies.export.plan import Plan, Predict, nobody_predicts, plan_of
from kvtune.policies.export.stored_alike import loss_there
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.parts import ModelFacts, PolicyDocument
from kvtune.policies.registry import find, registered

PACKAGE = "kvtune.policies.export.exporters"
REPORT = "REPORT.txt"


Proof = Literal["ran", "parsed by the stack", "schema mirror"]


@dataclass(frozen=True)
class Export:
    """Files for a stack, and the report on them.

    Args:
        stack: its name and version.
        proof: how far such files were tried on the stack.
        files: text by file name.
        report: what became of each field.
        quality: what is known of the loss of what runs there, in words.
        notes: how to use the files, and traps of the stack.
        prompt_bytes: of one prompt there, scales included.
        sequences: that the stack is told to run at once; None where nothing tells it.
        sequence_bytes: that it holds of one of them at its full length; 0 where nothing tells it.
        keeps_loss: whether all of the plan that the loss depends on is kept.
        wider: whether all else is, and what is not is stored in more bits.
        loss: what the plan loses there where it is kept; None where it is not known.
        predicted: what is lost there where the plan is not kept; None where nobody knows.
        whole: whether whole prompts in 16 bits run there, whatever the plan.
    """

    stack: str
    proof: Proof
    files: dict[str, str]
    report: tuple[Line, ...]
    quality: str
    notes: tuple[str, ...] = ()
    prompt_bytes: int = 0
    sequences: int | None = None
    sequence_bytes: int = 0
    keeps_loss: bool = False
    wider: bool = False
    loss: Estimate | None = None
    predicted: Estimate | None = None
    whole: bool = False


@dataclass(frozen=True)
class Exporter(ABC):
    """Renders a policy for one stack."""

    name: ClassVar[str]
    stack: ClassVar[str]
    stack_version: ClassVar[str]
    source: ClassVar[str]
    proof: ClassVar[Proof]
    limits: ClassVar[EngineLimits]

    def export(
        self,
        document: PolicyDocument,
        *,
        model: str = "",
        facts: ModelFacts | None = None,
        context_tokens: int | None = None,
        batch: int | None = None,
        allow_stand_in: bool = False,
        strict: bool = False,
        predict: Predict = nobody_predicts,
    ) -> Export:
        """The files and the report; writes nothing.

        Args:
            document: the policy.
            model: path or name for the stack; the model's Hub id unless given.
            facts: what the document does not say of the model.
            context_tokens: the document's, else 4096.
            batch: at most the document's, and what fits, unless given.
            allow_stand_in: export a policy found on another model's trace, and say so in the files.
            strict: refuse an export that does not keep everything.
            predict: what is lost where the stack runs something else than the plan.

        Raises:
            KvtuneError: a shape is missing, a stand-in is not allowed, strict is not met, the
                prompt is longer than the model takes, or what was asked for does not fit.
        """
        self._check_stand_in(document, allow_stand_in)
        plan = plan_of(document, model, facts, context_tokens, batch)
        plan = replace(plan, predict=cache(predict))  # every file's header asks, and the report
        self._check_tiers(plan.policy)
        made = self.render(plan)
        if strict and (lost := [line for line in made.report if line.status != "kept"]):
            raise KvtuneError(
                f"{self.stack} cannot keep {lost[0].field}: {lost[0].detail}",
                hint=f"{len(lost)} fields are not kept; without --strict they are approximated.",
            )
        return made

    @abstractmethod
    def render(self, plan: Plan) -> Export:
        """Files and one line for each field of the policy."""

    def runs(self, plan: Plan) -> Policy | None:
        """What runs there, in formats that are the stack's own; None where none are known."""
        return None

    def done(
        self,
        plan: Plan,
        files: dict[str, str],
        losses: Sequence[Line],
        others: Sequence[Line] = (),
        notes: tuple[str, ...] = (),
        held: tuple[int, int | None, int] = (0, None, 0),
    ) -> Export:
        """An export of this stack, its report among the files.

        Args:
            plan: what was rendered.
            files: text by file name.
            losses: lines on what the loss depends on: tokens, formats, allocator.
            others: lines on what it does not depend on.
            notes: how to use the files.
            held: bytes of one prompt there, sequences at once, and bytes of each when it ends.
        """
        report = (*plan.assumed, *losses, *others)
        runs = self.runs(plan)
        top = "\n".join(line for line in self.header(plan, losses) if REPORT not in line)
        below = "".join(f"note: {note}\n" for note in notes)
        text = top + "\n\n" + "".join(f"{line}\n" for line in report) + ("\n" + below) * bool(notes)
        return Export(
            f"{self.stack} {self.stack_version}",
            self.proof,
            files | {REPORT: text},
            report,
            self._quality(plan, losses)[0],
            notes,
            *held,
            keeps_loss=all(line.status == "kept" for line in losses),
            wider=loses_no_more(losses),
            loss=self._loss(plan),
            predicted=self._predicted(plan, losses),
            whole=runs is not None and set(runs.options()) == {Option()},
        )

    def header(self, plan: Plan, losses: Sequence[Line]) -> list[str]:
        """The lines that stand at the top of every file; none can end a comment."""
        lines = [
            f"Written by kvtune {_kvtune_version()} for {self.stack} {self.stack_version}.",
            f"proof: {self.proof}; source: {self.source}",
            f"policy: {plan.policy.name}; model: {plan.facts.name}",
            *(f"quality: {line}" for line in self._quality(plan, losses)[:1]),
            *self._quality(plan, losses)[1:],
            f"What is kept, approximated and lost: {REPORT}",
        ]
        return ["".join(c if c.isprintable() else " " for c in line) for line in lines]

    def _quality(self, plan: Plan, losses: Sequence[Line]) -> list[str]:
        predicted = self._predicted(plan, losses)
        return quality_lines(plan.document, losses, self._loss(plan), predicted)

    def _predicted(self, plan: Plan, losses: Sequence[Line]) -> Estimate | None:
        """Of what runs there instead of the plan, where that is known."""
        runs = self.runs(plan) if any(line.status != "kept" for line in losses) else None
        return None if runs is None else plan.predict(self.name, runs, plan.facts)

    def _loss(self, plan: Plan) -> Estimate | None:
        """Of the plan, where the stack keeps all of it; None of one measured for another stack."""
        quality = plan.document.provenance.quality if plan.document.provenance else None
        loss = quality.kl_nats_per_token if quality else None
        if quality is None or loss is None or quality.stack == self.name:
            return loss
        return None if quality.stack else loss_there(loss, plan.policy, self.limits)

    def _check_tiers(self, policy: Policy) -> None:
        on_host = next((option for option in policy.options() if option.on_host), None)
        if on_host is not None:
            raise KvtuneError(
                f"{self.stack} keeps every head's cache on the device, and {on_host.label!r} lies "
                "on the host",
                hint="kvtune.load_cache serves it; leave out tier: host for another stack.",
            )

    def _check_stand_in(self, document: PolicyDocument, allowed: bool) -> None:
        if document.stand_in and not allowed:
            raise KvtuneError(
                f"this policy's quality was predicted on a stand-in ({document.stand_in})",
                hint="capture the model's own trace and search again, or pass --allow-stand-in.",
            )


def whole_prompts(facts: ModelFacts) -> Policy:
    """What runs on a stack that evicts nothing and stores all in 16 bits."""
    return Policy.uniform(Option(), facts.layers, facts.kv_heads)


def write_export(export: Export, folder: Path) -> list[Path]:
    """Write the files, each whole or not at all; existing ones of the same name are replaced.

    Raises:
        KvtuneError: the folder cannot be written, or holds another stack's report.
    """
    _refuse_another(export, folder)
    paths = [inside(folder, name) for name in export.files]
    for path, text in zip(paths, export.files.values(), strict=True):
        write_text(path, text)
    return paths


def _refuse_another(export: Export, folder: Path) -> None:
    """Each stack has a report of the same name: two in one folder would leave one without."""
    path = folder / REPORT
    if not path.is_file():
        return
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    stack = _stack_of(first.partition(" for ")[2])
    if stack and stack != _stack_of(export.stack):
        raise KvtuneError(
            f"this is the report of an export to {stack}, which this one would replace",
            where=str(path),
            hint="choose a folder of its own for each stack.",
        )


def _stack_of(words: str) -> str:
    """The stack that a name with its version begins with; empty where it is no known one."""
    known = [kind.stack for kind in exporters().values()]
    return next((stack for stack in known if words.startswith(f"{stack} ")), "")


def find_exporter(name: str) -> type[Exporter]:
    """The exporter called ``name``."""
    return find(PACKAGE, Exporter, name)  # type: ignore[type-abstract]


def exporters() -> dict[str, type[Exporter]]:
    """Every exporter, by name."""
    return dict(registered(PACKAGE, Exporter))


def _kvtune_version() -> str:
    try:
        return version("kvtune")
    except PackageNotFoundError:
        return "(not installed)"
