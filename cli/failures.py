"""How a command ends when it does not end well: one line, a hint, an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

import typer

from kvtune.common.errors import KvtuneError
from kvtune.common.files import WRITTEN
from kvtune.common.words import printable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM = "free some space, and run the same command again to go on."
MISTAKE, CLOSED, INTERRUPTED = 2, 141, 130
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""Base of what typer raises for wrong options; newer and older releases keep it elsewhere."""


def exit_code(command: Callable[[], object]) -> int:
    """Run a command and turn what it raises into words on stderr and an exit code.

    Errors that are no user's mistake keep their traceback.
    """
    before = WRITTEN.files
    try:
        code = command()
        sys.stdout.flush()
        if code == INTERRUPTED:  # newer releases of typer catch it and only return the code
            raise KeyboardInterrupt
    except KvtuneError as error:
        return _say(str(error), error.hint, error.exit_code)
    except USAGE_ERROR as error:
        return _say(usage_message(error), _usage_hint(error))
    except (KeyboardInterrupt, typer.Abort):
        print(_interrupted(kept=WRITTEN.files > before), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return _closed_pipe()
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror}", _ROOM if error.errno in _FULL else None)
    return code if isinstance(code, int) else 0


def _interrupted(*, kept: bool) -> str:
    if kept:
        return "interrupted; run the same command again to go on"
    return "interrupted before anything was saved"


def _say(message: str, hint: str | None, code: int = MISTAKE) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"\nhint: {printable(hint)}", file=sys.stderr)
    return code


def usage_message(error: Exception) -> str:
    """Typer's message on one line, without the full stop that ours do not have either."""
    message = getattr(error, "format_message", error.__str__)()
    return " ".join(str(message).split()).replace("Value error, ", "").removesuffix(".")


def _usage_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kvtune"
    return f"{command} --help lists what it takes."


def _closed_pipe() -> int:
    """The reader has gone (``kvtune gpus | head -1``); nothing more may be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLOSED
