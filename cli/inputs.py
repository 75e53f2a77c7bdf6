"""Files and folders that options name, checked before anything is written or run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError, meant
from kvtune.common.stored import require_file

if TYPE_CHECKING:
    from kvtune.policies.policy_file.document import PolicyDocument

POLICY_FILE = "policy.yaml"
_NO_POLICY = "kvtune search writes a policy file; see also kvtune policies."
_NOT_ENDED = "this search has not ended: run the same command again, and it goes on."


def read_policy_path(path: Path) -> Path:
    """The policy file itself, also where its run directory was named."""
    return path / POLICY_FILE if path.is_dir() else path


def read_policy_input(named: Path) -> PolicyDocument:
    """The policy of a file, of a run directory, or of words such as ``snapkv+adakv 25%``.

    Raises:
        KvtuneError: no such file and no such words, or mistakes in them.

    Of a file that was edited since its search wrote it, nothing is said of its loss.
    """
    if not named.exists() and not named.suffix.startswith(".y"):
        from kvtune.policies.policy_file.named import is_named, known_words, read_named, words_of

        if is_named(str(named)):
            return read_named(str(named))
        if len(words_of(str(named))) == 1 and "/" not in str(named):
            near = meant(str(named), known_words(), likeness=0.7)
            raise KvtuneError(
                f"no file, run directory or policy is called {str(named)!r}. {near}".rstrip(),
                hint=_NO_POLICY,
            )
    path = read_policy_path(named)
    is_begun = named.is_dir() and (named / "config.json").is_file()
    require_file(path, _NOT_ENDED if is_begun else _NO_POLICY)
    from kvtune.policies.policy_file.document import read_policy  # takes a while to import
    from kvtune.tuner.config_file import check_run

    check_run(path.parent)
    document = read_policy(path)
    from kvtune.tuner.edited import as_edited, is_edited

    return as_edited(document) if is_edited(path) else document


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that could not be made or written, without making it.

    Raises:
        KvtuneError: it, or the folder it would be made in, cannot be written.
    """
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise KvtuneError(
            f"{place} is a file, not a folder", where=str(folder), hint=_other(option)
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise KvtuneError("cannot write here", where=str(place), hint=_other(option))


def read_shares(text: str) -> list[float]:
    """``5%,10%`` as shares.

    Raises:
        KvtuneError: one is no percentage between 0 and 100.
    """
    found = []
    for each in text.split(","):
        number = each.strip().removesuffix("%")
        try:
            share = float(number) / 100
        except ValueError:
            share = 0.0
        if not (each.strip().endswith("%") and 0 < share <= 1):
            hint = "write percentages: --shares 5%,10%"
            raise KvtuneError(f"{each.strip()!r} is no share", where="--shares", hint=hint)
        found.append(share)
    return found


def _other(option: str) -> str:
    return f"choose another folder with {option}."
