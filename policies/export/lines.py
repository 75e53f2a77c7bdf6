"""What became of a policy's fields on the way to a serving stack, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvtune.common.estimate import Estimate
from kvtune.common.words import figure
from kvtune.policies.policy_file.parts import PolicyDocument

Status = Literal["kept", "approximated", "not expressible"]


@dataclass(frozen=True)
class Line:
    """What became of one field of the policy.

    Args:
        field: of the policy.
        status: whether the stack keeps it.
        detail: what became of it.
        wider: whether it is not kept because it is stored in more bits, which loses no more.
    """

    field: str
    status: Status
    detail: str
    wider: bool = False

    def __str__(self) -> str:
        """The line as a report prints it."""
        return f"{self.status + ':':<17}{self.field} - {self.detail}"


def comment(lines: list[str], mark: str = "#") -> str:
    """Lines as comments of a file."""
    return "".join(f"{mark} {line}\n" for line in lines)


def loses_no_more(losses: Sequence[Line]) -> bool:
    """Whether what is not kept is stored in more bits, and something is."""
    lost = [line for line in losses if line.status != "kept"]
    return bool(lost) and all(line.wider for line in lost)


def quality_lines(
    document: PolicyDocument,
    losses: Sequence[Line],
    there: Estimate | None,
    predicted: Estimate | None = None,
) -> list[str]:
    """What is known of the loss there: the plan's where it is kept, else what was predicted.

    The first line is short; others warn.

    Args:
        document: the plan and where its quality comes from.
        losses: what became of that on which the loss depends.
        there: the plan's loss on the stack.
        predicted: the loss of what runs there instead.
    """
    quality = document.provenance.quality if document.provenance else None
    changed = any(line.status != "kept" for line in losses)
    if changed and predicted is not None and not loses_no_more(losses):
        whose = f"{quality}; " if quality else ""
        return [f"{whose}what runs here is not the plan, and loses {figure(predicted)}, nats/token"]
    if quality is None:
        return ["not known"]
    if loses_no_more(losses) and there is not None:
        return [f"{quality}; loses no more than {figure(there)}, nats/token, with fewer bits"]
    if changed:
        return [f"{quality}; what runs here is not the plan, and its loss was not predicted"]
    lines = [str(quality)]
    if there is not None:
        lines[0] += f"; loses {figure(there)}, nats/token"
    loss = quality.kl_nats_per_token
    if quality.stack and there is None:
        lines[0] += f"; its loss was measured for {quality.stack}, and is not known here"
    elif loss not in (None, there):
        lines.append(
            f"{figure(loss)} is what the plan loses by its prompt; this stack also reads prompts "
            "through what it stores, and stores answers likewise."
        )
    if quality.source == "stand-in" and not quality.edited:
        lines.append("The quality was predicted on another model: validate before you rely on it.")
    return lines
