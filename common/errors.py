"""The one exception that people see: what is wrong, where, and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class KvtuneError(Exception):
    """A mistake or a limit that the user can act on; the command line prints it and exits.

    Args:
        message: one line that says what is wrong.
        hint: one line that says what to do about it.
        where: file, or file:line, that the message is about.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class DoesNotFitError(KvtuneError):
    """What was asked for takes more memory than there is; scripts tell it by its exit code."""

    exit_code = 3


_LISTED = 80  # names that an error lists


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A "did you mean" sentence for an unknown name, or the list of what is known.

    A list that would fill the screen is counted instead; its callers say which command prints it.
    """
    names = sorted(known)
    if close := meant(name, names, count):
        return close
    if len(names) > _LISTED:
        return f"None of the {len(names)} known names is like it."
    return "Known: " + ", ".join(names) + "."


def meant(name: str, known: Iterable[str], count: int = 3, likeness: float = 0.5) -> str:
    """A "did you mean" sentence; empty where nothing known is as like the name as that."""
    close = difflib.get_close_matches(name.lower(), sorted(known), n=count, cutoff=likeness)
    return "Did you mean " + " or ".join(repr(c) for c in close) + "?" if close else ""


def check_alone(listed: str, option: str, alone: Sequence[str]) -> None:
    """Refuse a list in which a word that stands for several is not the only one.

    Args:
        listed: what was given, separated by commas.
        option: that it was given to.
        alone: the words that stand for several.

    Raises:
        KvtuneError: one of them stands beside another word.
    """
    words = [word.strip().lower() for word in listed.split(",")]
    for word in alone:
        if word in words and len(words) > 1:
            others = ",".join(each for each in words if each not in alone)
            other = f", or {option} {others}" if others else ""
            raise KvtuneError(
                f"{option} {listed}: {word} stands alone", hint=f"give {option} {word}{other}."
            )
