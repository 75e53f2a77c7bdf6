"""Policies of a finished search that were edited since: what it found is not true of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.common.files import inside, sha256, unwritable
from kvtune.common.stored import read_json

if TYPE_CHECKING:
    from kvtune.policies.policy_file.document import PolicyDocument

FINISHED = "finished.json"
_LOG = logging.getLogger(__name__)


def edited_files(folder: Path) -> list[Path]:
    """Policies of a finished search that are there, but not as it has left them.

    Empty where ``finished.json`` is not there, or cannot be read.
    """
    try:
        left = read_json(folder / FINISHED)["files"]
        paths = {inside(folder, name): hash_ for name, hash_ in left.items()}
    except (KvtuneError, KeyError, TypeError, AttributeError):
        return []
    policies = {path: hash_ for path, hash_ in paths.items() if path.suffix == ".yaml"}
    return [path for path, hash_ in policies.items() if path.is_file() and sha256(path) != hash_]


def is_edited(policy: Path) -> bool:
    """Whether a policy file lies in the run directory of a search that has written another."""
    return policy.resolve() in edited_files(policy.parent)


def as_edited(document: PolicyDocument) -> PolicyDocument:
    """The document without what was found for the plan that the file held, and without its name."""
    from kvtune.policies.policy import label_of
    from kvtune.policies.policy_file.document import Pattern

    policy, made = document.policy, document.provenance
    name = "edited plan"
    if isinstance(policy, Pattern):
        others = ", other layers differ" if policy.layers else ""
        name = label_of(policy.option, policy.allocator) + others
    if made is not None:
        quality = made.quality and replace(
            made.quality, kl_nats_per_token=None, stack="", edited=True
        )
        made = replace(made, quality=quality, memory={}, latency={}, other_lengths={})
    return replace(document, policy=replace(policy, name=name), provenance=made)


def set_aside(folder: Path) -> bool:
    """Rename edited policies before a search writes its own; whether there were any.

    A warning on stderr names each: the files are the user's, and progress can be silenced.

    Raises:
        KvtuneError: one cannot be renamed.
    """
    found = edited_files(folder)
    for path in found:
        kept = _free(path)
        try:
            path.rename(kept)
        except OSError as error:
            raise unwritable(kept, error) from error
        _LOG.warning(
            "%s was edited since it was searched; it is kept as %s, and a new %s is written",
            path.name, kept, path.name,
        )  # fmt: skip
    return bool(found)


def _free(path: Path) -> Path:
    """``policy.edited.yaml``, with a number where there is one."""
    names = (f"{path.stem}.edited{n}{path.suffix}" for n in ("", *range(2, 10_000)))
    return next(free for name in names if not (free := path.with_name(name)).exists())
