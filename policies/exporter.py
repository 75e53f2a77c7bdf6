"""Takes a policy to a serving stack: the contract of an exporter.

An exporter says what its engine can take (``limits``) and renders what it is given, line by line
honest about what was lost. Searching again inside those limits is the tuner's work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

from kvtune.common.errors import KvtuneError
from kvtune.common.files import inside, write_text
from kvtune.common.units import format_bytes
from kvtune.policies.document_parts import ModelFacts, Pattern, PolicyDocument, Serving
from kvtune.policies.policy import Policy
from kvtune.policies.registry import find, registered

PACKAGE = "kvtune.policies.exporters"
Status = Literal["kept", "approximated", "not expressible"]
Proof = Literal["ran", "parsed by the stack", "schema mirror"]
Scope = Literal["engine", "layer", "head"]
_ASSUMED_CONTEXT_TOKENS = 4096


@dataclass(frozen=True)
class EngineLimits:
    """What an engine can take, for a search inside it.

    Args:
        methods: that it can run at all.
        key_formats: that it can store, nearly as kvtune does.
        value_formats: likewise.
        budgets: what may have a budget of its own.
        formats: what may have a format of its own.
        distinct_budgets: how many budgets below the full context; None for any number.
        distinct_formats: how many formats beside 16 bits; None for any number.
        keys_differ_from_values: whether keys and values may have different formats.
    """

    methods: frozenset[str]
    key_formats: frozenset[str]
    value_formats: frozenset[str]
    budgets: Scope
    formats: Scope
    distinct_budgets: int | None = None
    distinct_formats: int | None = None
    keys_differ_from_values: bool = True


@dataclass(frozen=True)
class Line:
    """What became of one field of the policy."""

    field: str
    status: Status
    detail: str

    def __str__(self) -> str:
        """For reports."""
        return f"{self.status + ':':<17}{self.field} - {self.detail}"


@dataclass(frozen=True)
class Export:
    """Files for a stack, and the report on them.

    Args:
        stack: its name and version.
        proof: how far such files were tried on the stack.
        files: text by file name.
        report: what became of each field.
        notes: how to use the files, and traps of the stack.
    """

    stack: str
    proof: Proof
    files: dict[str, str]
    report: tuple[Line, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What an exporter renders.

    Args:
        document: where the policy comes from.
        policy: bound to the model.
        facts: the model's shape.
        model: path or name, as the stack is to load it.
        context_tokens: of each prompt.
        generated_tokens: of each answer; 0 where the document does not say.
        batch: sequences at once.
    """

    document: PolicyDocument
    policy: Policy
    facts: ModelFacts
    model: str
    context_tokens: int
    generated_tokens: int
    batch: int

    @property
    def sequence_tokens(self) -> int:
        """Prompt and answer together: what a stack has to make room for."""
        return self.context_tokens + self.generated_tokens


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
    ) -> Export:
        """The files and the report; writes nothing.

        Args:
            document: the policy.
            model: path or name for the stack; the document's model unless given.
            facts: the model's shape where the document does not say it.
            context_tokens: the document's, else 4096.
            batch: the document's, else 1.
            allow_stand_in: export a policy found on another model's trace, and say so in the files.
            strict: refuse an export that does not keep everything.

        Raises:
            KvtuneError: a shape is missing, a stand-in is not allowed, or strict is not met.
        """
        self._check_stand_in(document, allow_stand_in)
        plan, assumed = _plan(document, model, facts, context_tokens, batch)
        rendered = self.render(plan)
        report = (*assumed, *rendered.report)
        if strict and (lost := [line for line in report if line.status != "kept"]):
            raise KvtuneError(
                f"{self.stack} cannot keep {lost[0].field}: {lost[0].detail}",
                hint=f"{len(lost)} fields are not kept; without --strict they are approximated.",
            )
        text = self._report_text(plan, report, rendered.notes)
        files = rendered.files | {"REPORT.txt": text}
        return Export(rendered.stack, rendered.proof, files, report, rendered.notes)

    @abstractmethod
    def render(self, plan: Plan) -> Export:
        """Files without the report's own, one line for each field of the policy."""

    def done(
        self, files: dict[str, str], report: list[Line], notes: tuple[str, ...] = ()
    ) -> Export:
        """An export of this stack."""
        return Export(f"{self.stack} {self.stack_version}", self.proof, files, tuple(report), notes)

    def header(self, plan: Plan) -> list[str]:
        """The lines that stand at the top of every file; none can end a comment."""
        lines = [
            f"Written by kvtune {_kvtune_version()} for {self.stack} {self.stack_version}.",
            f"proof: {self.proof}; source: {self.source}",
            f"policy: {plan.policy.name}; model: {plan.facts.name}",
            *_quality_lines(plan.document),
            "What is kept, approximated and lost: REPORT.txt",
        ]
        return ["".join(c if c.isprintable() else " " for c in line) for line in lines]

    def _check_stand_in(self, document: PolicyDocument, allowed: bool) -> None:
        if document.stand_in and not allowed:
            raise KvtuneError(
                f"this policy's quality was predicted on a stand-in ({document.stand_in})",
                hint="capture the model's own trace and search again, or pass --allow-stand-in.",
            )

    def _report_text(self, plan: Plan, report: tuple[Line, ...], notes: tuple[str, ...]) -> str:
        top = "\n".join(line for line in self.header(plan) if "REPORT.txt" not in line)
        below = "".join(f"note: {note}\n" for note in notes)
        return top + "\n\n" + "".join(f"{line}\n" for line in report) + ("\n" + below) * bool(notes)


def comment(lines: list[str], mark: str = "#") -> str:
    """Lines as comments of a file."""
    return "".join(f"{mark} {line}\n" for line in lines)


def bytes_line(plan: Plan, stack_bytes: int) -> Line:
    """The prompt's bytes under the plan beside those of the export, at the full context."""
    planned = plan.policy.footprint(plan.context_tokens, plan.facts.head_dim)
    detail = (
        f"planned {format_bytes(planned)} for a prompt of {plan.context_tokens} tokens, "
        f"this export {format_bytes(stack_bytes)}"
    )
    close = abs(stack_bytes - planned) <= 0.01 * planned
    return Line("cache bytes", "kept" if close else "approximated", detail)


def write_export(export: Export, folder: Path) -> list[Path]:
    """Write the files, each whole or not at all; existing ones of the same name are replaced.

    Raises:
        KvtuneError: the folder cannot be written.
    """
    paths = [inside(folder, name) for name in export.files]
    for path, text in zip(paths, export.files.values(), strict=True):
        write_text(path, text)
    return paths


def find_exporter(name: str) -> type[Exporter]:
    """The exporter called ``name``."""
    return find(PACKAGE, Exporter, name)  # type: ignore[type-abstract]


def exporters() -> dict[str, type[Exporter]]:
    """Every exporter, by name."""
    return dict(registered(PACKAGE, Exporter))


def _plan(
    document: PolicyDocument,
    model: str,
    facts: ModelFacts | None,
    context_tokens: int | None,
    batch: int | None,
) -> tuple[Plan, list[Line]]:
    """The document with all that was left open filled in, and lines on what was assumed."""
    facts = document.model or facts
    if facts is None:
        what = "a uniform policy" if isinstance(document.policy, Pattern) else "this policy"
        raise KvtuneError(
            f"{what} does not say which model it is for",
            hint="name it (--model), or add to the file "
            "model: {name: ..., layers: ..., kv_heads: ..., head_dim: ...}.",
        )
    policy = document.bind(facts.layers, facts.kv_heads)
    serving = document.serving or Serving()
    context = context_tokens or serving.context_tokens
    assumed = []
    if context is None:
        context = _ASSUMED_CONTEXT_TOKENS
        assumed.append(Line("context", "approximated", f"not given: {context} tokens are assumed"))
    if not model.isprintable():
        raise KvtuneError("the model's name holds characters that cannot be written in a file")
    plan = Plan(
        document,
        policy,
        facts,
        model or facts.name,
        context,
        serving.generated_tokens or 0,
        batch or serving.batch or 1,
    )
    return plan, assumed


def _quality_lines(document: PolicyDocument) -> list[str]:
    quality = document.provenance.quality if document.provenance else None
    if quality is None:
        return ["quality: not known"]
    lines = [f"quality: {quality}"]
    if (loss := quality.kl_nats_per_token) is not None:
        figures = f"{loss.value:.4g} nats/token [{loss.low:.4g}, {loss.high:.4g}], {loss.tier}"
        lines[0] += f"; {figures}"
    if quality.source == "stand-in":
        lines.append("The quality was predicted on another model: validate before you rely on it.")
    return lines


def _kvtune_version() -> str:
    try:
        return version("kvtune")
    except PackageNotFoundError:
        return "(not installed)"
