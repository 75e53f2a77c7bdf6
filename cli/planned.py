"""What a policy's file says beside its options: what it was planned for, and for which model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.common.units import exact_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.shape import ModelShape

_FIELDS = {
    "context": "context_tokens",
    "generated": "generated_tokens",
    "batch": "batch",
    "weights": "weights",
}
"""Where the file says what an option would."""


def planned_options(
    document: PolicyDocument | None, **given: str | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Options as they are given, else as the policy was planned, with a note on the latter.

    Args:
        document: the policy, or None.
        given: options by name, None where one is left out.

    Returns:
        Those that are known, and the notes.
    """
    plan = document.serving if document else None
    taken = {
        name: str(value)
        for name, asked in given.items()
        if asked is None and (value := getattr(plan, _FIELDS[name], None))
    }
    known = {name: asked for name, asked in given.items() if asked is not None} | taken
    options = " ".join(f"--{name} {value}" for name, value in taken.items())
    return known, (f"planned for {options}, as the policy's file says",) if taken else ()


def searched_on(
    path: Path, document: PolicyDocument, gpu: str | None, mem: str | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The card and the memory limit of the search that found a policy, with a note on both.

    Args:
        path: of the policy file or of its run directory.
        document: what it holds.
        gpu: the card as it was typed; the limit of another card's search is not taken.
        mem: the limit as it was typed.

    Returns:
        ``gpu`` and ``mem`` as far as they were not typed and are known, and the notes.

    Raises:
        KvtuneError: the run directory is damaged.
    """
    from kvtune.cli.inputs import read_policy_path
    from kvtune.profiles.gpus import find_gpu
    from kvtune.tuner.config_file import config_beside

    asked = config_beside(read_policy_path(path))
    card = asked.gpu or (document.serving.gpu if document.serving else None)
    try:
        searched = find_gpu(card) if card else None
        is_other = gpu is not None and searched is not None and find_gpu(gpu) != searched
    except KvtuneError:  # described in a file that may be gone, or several cards
        return {}, ()
    if searched is None or is_other:
        return {}, ()
    taken = {} if gpu else {"gpu": searched.slug}
    limit = asked.memory_bytes
    if limit is not None and mem is None and limit != searched.visible_bytes:
        taken["mem"] = exact_bytes(limit)
    words = " ".join(f"--{name} {value}" for name, value in taken.items())
    return taken, (f"searched with {words}, as the policy's run says",) if taken else ()


def other_model(document: PolicyDocument | None, shape: ModelShape) -> str | None:
    """The model that a policy was planned for, where it is not this one."""
    if document is None or document.model is None:
        return None
    name = document.model.name
    return None if _canonical(name) == _canonical(shape.name) else name


def notes_on_model(document: PolicyDocument | None, shape: ModelShape) -> tuple[str, ...]:
    """That a policy was planned for another model, where it was."""
    other = other_model(document, shape)
    return (f"planned for {other}: what {shape.name} loses under it is not known",) if other else ()


def _canonical(name: str) -> str:
    """As the models that come with kvtune are called; of any other its own name."""
    from kvtune.profiles.models import find_model

    try:
        return find_model(name).name
    except KvtuneError:
        return name.lower()
