"""One writer at a time in a folder: a lock that the system releases when its process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kvtune.common.errors import KvtuneError
from kvtune.common.files import other_folder
from kvtune.common.progress import Progress, Silent

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, wait: bool = False, progress: Progress | None = None) -> Iterator[None]:
    """Hold the folder's lock while the block runs.

    The lock belongs to the open file and ends with the process, however it ends; the file itself
    stays, with the number of the process that held it last.

    Args:
        folder: made where it is not there.
        wait: wait for the other process to end instead of refusing.
        progress: is told of the wait.

    Raises:
        KvtuneError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise KvtuneError(
            f"the folder cannot be written: {error.strerror}",
            where=str(folder),
            hint=other_folder(folder),
        ) from error
    with file:
        if not _take(file, block=False):
            holder = _holder(file)
            if not wait:
                raise KvtuneError(
                    f"{holder} is writing here",
                    where=str(folder),
                    hint="wait until it ends, or choose another folder.",
                )
            (progress or Silent()).note(f"waiting for {holder}, which is writing {folder}")
            _take(file, block=True)
        file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the name is a courtesy
            file.write(str(os.getpid()))
            file.flush()
        yield


def _take(file: IO[str], *, block: bool) -> bool:
    """Take the lock; whether it was free. Where there is no fcntl, all is left to atomic writes."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    number = file.read(20).strip()
    return f"process {number}" if number.isdecimal() else "another process"
