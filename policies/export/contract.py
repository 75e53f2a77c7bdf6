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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

from kvtune.common.errors import KvtuneError
from kvtune.common.files import inside, write_text
from kvtune.common.units import format_bytes
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.parts import ModelFacts, Pattern, PolicyDocument, Serving
from kvtune.policies.registry import find, registered

PACKAGE = "kvtune.policies.export.exporters"
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
        quality: what is known of the loss of what runs there, in words.
        notes: how to use the files, and traps of the stack.
        prompt_bytes: of one prompt there, scales included.
        sequences: that the stack is told to run at once; None where nothing tells it.
        keeps_loss: whether all that the loss depends on is kept, so that the plan's stands.
    """

    stack: str
    proof: Proof
    files: dict[str, str]
    report: tuple[Line, ...]
    quality: str
    notes: tuple[str, ...] = ()
    prompt_bytes: int = 0
    sequences: int | None = None
    keeps_loss: bool = False


@dataclass(frozen=True)
class Plan:
    """What an exporter renders.

    Args:
        document: where the policy comes from.
        policy: bound to the model.
        facts: the model's shape.
        model: path or name that the user gave; else the model's Hub id; "" where neither is known.
        context_tokens: of each prompt.
        sequence_tokens: prompt and answer together, never more than the model takes.
        batch: sequences at once that were asked for; None for as many as fit.
        room_bytes: that all sequences' caches may take together; None where nobody said.
        assumed: lines on what was left open.
    """

    document: PolicyDocument
    policy: Policy
    facts: ModelFacts
    model: str
    context_tokens: int
    sequence_tokens: int
    batch: int | None
    room_bytes: int | None
    assumed: tuple[Line, ...]

    @property
    def given_model(self) -> str:
        """The user's own path or name; "" where it is the Hub id that is known."""
        return "" if self.model == self.facts.hub else self.model

    @property
    def planned_batch(self) -> int | None:
        """Sequences at once that the plan was made for, where it says so."""
        return self.document.serving.batch if self.document.serving else None

    @property
    def weights(self) -> str:
        """Format of the weights that the plan assumed; "" where it does not say."""
        return self.document.serving.weights if self.document.serving else ""


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
            model: path or name for the stack; the model's Hub id unless given.
            facts: what the document does not say of the model.
            context_tokens: the document's, else 4096.
            batch: at most the document's, and what fits, unless given.
            allow_stand_in: export a policy found on another model's trace, and say so in the files.
            strict: refuse an export that does not keep everything.

        Raises:
            KvtuneError: a shape is missing, a stand-in is not allowed, strict is not met, the
                prompt is longer than the model takes, or what was asked for does not fit.
        """
        self._check_stand_in(document, allow_stand_in)
        plan = plan_of(document, model, facts, context_tokens, batch)
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

    def done(
        self,
        plan: Plan,
        files: dict[str, str],
        losses: Sequence[Line],
        others: Sequence[Line] = (),
        notes: tuple[str, ...] = (),
        held: tuple[int, int | None] = (0, None),
    ) -> Export:
        """An export of this stack, its report among the files.

        Args:
            plan: what was rendered.
            files: text by file name.
            losses: lines on what the loss depends on: tokens, formats, allocator.
            others: lines on what it does not depend on.
            notes: how to use the files.
            held: bytes of one prompt there, and sequences at once.
        """
        report = (*plan.assumed, *losses, *others)
        top = "\n".join(line for line in self.header(plan, losses) if "REPORT.txt" not in line)
        below = "".join(f"note: {note}\n" for note in notes)
        text = top + "\n\n" + "".join(f"{line}\n" for line in report) + ("\n" + below) * bool(notes)
        return Export(
            f"{self.stack} {self.stack_version}",
            self.proof,
            files | {"REPORT.txt": text},
            report,
            quality_lines(plan.document, losses)[0],
            notes,
            *held,
            keeps_loss=all(line.status == "kept" for line in losses),
        )

    def header(self, plan: Plan, losses: Sequence[Line]) -> list[str]:
        """The lines that stand at the top of every file; none can end a comment."""
        lines = [
            f"Written by kvtune {_kvtune_version()} for {self.stack} {self.stack_version}.",
            f"proof: {self.proof}; source: {self.source}",
            f"policy: {plan.policy.name}; model: {plan.facts.name}",
            *(f"quality: {line}" for line in quality_lines(plan.document, losses)[:1]),
            *quality_lines(plan.document, losses)[1:],
            "What is kept, approximated and lost: REPORT.txt",
        ]
        return ["".join(c if c.isprintable() else " " for c in line) for line in lines]

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


def sequences_that_fit(plan: Plan, stack: str, sequence_bytes: int) -> tuple[int, Line]:
    """How many sequences at once the stack is told to run, never more than fit.

    Where the policy file does not say how much memory is left for the cache, what its own sequences
    take is known to be there, and no more.

    Args:
        plan: says what was asked for and how much room there is.
        stack: its name, for errors.
        sequence_bytes: that the stack holds of one sequence of the full length.

    Raises:
        KvtuneError: not one fits, or not as many as were asked for.
    """
    each = f"one takes {format_bytes(sequence_bytes)} there"
    if plan.room_bytes is None:
        return _within_own_bytes(plan, sequence_bytes, each)
    fit = plan.room_bytes // sequence_bytes
    there = f"{each}, and {format_bytes(plan.room_bytes)} are left for caches"
    if fit == 0:
        hint = "a shorter --context fits, or more memory."
        raise KvtuneError(f"not one sequence fits under {stack}: {there}", hint=hint)
    if plan.batch and plan.batch > fit:
        hint = f"--batch {fit} is the most."
        raise KvtuneError(f"{plan.batch} sequences do not fit under {stack}: {there}", hint=hint)
    count = plan.batch or min(plan.planned_batch or fit, fit)
    if count >= (plan.planned_batch or 1):
        return count, Line("sequences", "kept", f"{count} at once: {there}")
    detail = f"{count} at once instead of {plan.planned_batch}: {there}"
    return count, Line("sequences", "approximated", detail)


def _within_own_bytes(plan: Plan, sequence_bytes: int, each: str) -> tuple[int, Line]:
    """As many as take no more than the plan's own sequences, or as many as the user says."""
    sure, planned = _bytes_of_own_sequences(plan) // sequence_bytes, plan.planned_batch or 1
    count = plan.batch or max(min(planned, sure), 1)
    if count > sure:
        detail = f"{count} at once: {each}; check that they fit, the memory for caches is not known"
        return count, Line("sequences", "approximated", detail)
    if count < planned:
        detail = f"{count} at once instead of {planned}, which take no more memory: {each}"
        return count, Line("sequences", "approximated", detail)
    return count, Line("sequences", "kept", f"{count} at once: {each}")


def _bytes_of_own_sequences(plan: Plan) -> int:
    """Bytes of pages that the plan's own sequences are given, generated tokens in 16 bits."""
    serving, facts = plan.document.serving, plan.facts
    if serving is None or serving.batch is None or serving.context_tokens is None:
        return 0
    growth = Growth(serving.generated_tokens or 0)
    each = sequence_bytes(plan.policy, serving.context_tokens, facts.head_dim, growth)
    return serving.batch * each


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


def plan_of(
    document: PolicyDocument,
    model: str,
    facts: ModelFacts | None,
    context_tokens: int | None,
    batch: int | None,
) -> Plan:
    """The document with all that was left open filled in, and lines on what was assumed."""
    facts = _facts(document, facts)
    if not model.isprintable():
        raise KvtuneError("the model's name holds characters that cannot be written in a file")
    policy = document.bind(facts.layers, facts.kv_heads)
    serving = document.serving or Serving()
    context, assumed = context_tokens or serving.context_tokens, []
    if context is None:
        context = _ASSUMED_CONTEXT_TOKENS
        assumed.append(Line("context", "approximated", f"not given: {context} tokens are assumed"))
    longest, lines = _longest(facts, context, serving.generated_tokens or 0)
    return Plan(
        document,
        policy,
        facts,
        model or facts.hub,
        context,
        longest,
        batch,
        serving.cache_bytes,
        (*assumed, *lines),
    )


def _facts(document: PolicyDocument, more: ModelFacts | None) -> ModelFacts:
    """What the document says of the model, and what it leaves open."""
    facts = document.model or more
    if facts is None:
        what = "a uniform policy" if isinstance(document.policy, Pattern) else "this policy"
        raise KvtuneError(
            f"{what} does not say which model it is for",
            hint="name it (--model), or add to the file "
            "model: {name: ..., layers: ..., kv_heads: ..., head_dim: ...}.",
        )
    if more is None:
        return facts
    longest = facts.max_context or more.max_context
    return replace(facts, max_context=longest, hub=facts.hub or more.hub)


def _longest(facts: ModelFacts, context: int, generated: int) -> tuple[int, list[Line]]:
    """Tokens of a sequence: prompt and answer, never more than the model takes."""
    most, wanted = facts.max_context, context + generated
    if most is None or wanted <= most:
        return wanted, []
    if context > most:
        raise KvtuneError(
            f"{facts.name} takes {most} tokens, a prompt of {context} is longer",
            hint=f"--context {most - generated if generated < most else most} leaves room for "
            "prompt and answer.",
        )
    detail = f"{most - context} tokens instead of {generated}: {facts.name} takes {most} in all"
    return most, [Line("generated tokens", "approximated", detail)]


def quality_lines(document: PolicyDocument, losses: Sequence[Line]) -> list[str]:
    """What is known of the loss: the plan's own where all of it is kept, else nothing.

    The first line is short; others warn.
    """
    quality = document.provenance.quality if document.provenance else None
    if quality is None:
        return ["not known"]
    if any(line.status != "kept" for line in losses):
        return [f"{quality}; what runs here is not the plan, and its loss was not predicted"]
    lines = [str(quality)]
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
