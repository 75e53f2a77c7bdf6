"""Flags of another engine's server inside ``--engine-args``, read with errors for people."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from kvtune.common.errors import KvtuneError, meant

T = TypeVar("T")

_GPUS = ("--tensor-parallel-size", "-tp")
_LIKE = 0.75  # flags of other purposes, such as --port and --block-size, are less alike


def split_flags(text: str, hint: str) -> list[str]:
    """The words of ``--engine-args``.

    Raises:
        KvtuneError: a quotation does not end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise KvtuneError(f"--engine-args cannot be read: {error}", hint=hint) from error


class FlagParser(argparse.ArgumentParser):
    """An argument parser that raises mistakes as ``KvtuneError``.

    Args:
        hint: an example that works.
    """

    def __init__(self, hint: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._hint = hint

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would have printed before exiting."""
        raise KvtuneError(f"--engine-args: {message}", hint=self._hint)

    def unread_notes(self, others: Sequence[str]) -> tuple[str, ...]:
        """A note on words that were not read, with the flags that may have been meant; or none."""
        if not others:
            return ()
        flags = [word.partition("=")[0] for word in others if word.startswith("-")]
        hints = dict.fromkeys(filter(None, map(self._hint_for, flags)))
        return (" ".join((f"engine: not read, {' '.join(others)}.", *hints)),)

    def _hint_for(self, flag: str) -> str:
        if flag in _GPUS:
            return f"For {flag} give --gpus of kvtune."
        return meant(flag, self._option_string_actions, count=1, likeness=_LIKE)


def with_flag_name(read: Callable[[str], T]) -> Callable[[str], T]:
    """A reader of values whose errors argparse passes on with the name of the flag."""

    def reader(text: str) -> T:
        try:
            return read(text)
        except (KvtuneError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return reader


def whole_number(text: str, most: int, what: str) -> int:
    """A whole number from 1 to ``most``.

    Raises:
        ValueError: the text is none.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 20) or not 1 <= int(text) <= most:
        raise ValueError(f"{text[:20]} is no {what} from 1 to {most:,}")
    return int(text)
