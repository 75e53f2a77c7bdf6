"""Processes that do this one's work beside it, begun early so that their imports take no time.

    python -m kvtune.common.helpers

``concurrent.futures`` has processes too, which import the caller's main module: a script that
searches without a guard around it would search again in each of them. These import kvtune alone,
and are given functions and arguments over their standard input.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import IO, Any, TypeVar

T = TypeVar("T")

_FROM_PARENT = "KVTUNE_HELPER"


class HelperLostError(RuntimeError):
    """A process has ended before its work was done."""


class Helpers(Executor):
    """An executor of processes that import nothing of the caller's.

    Functions are sent by name, so that they lie in modules of kvtune; arguments and results as
    ``pickle`` has them.

    Args:
        count: processes.
    """

    def __init__(self, count: int) -> None:
        self._processes = [_begun() for _ in range(count)]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have the next idle process call a function.

        The future raises what the function raises; ``HelperLostError`` where its process has ended.
        """
        return self._threads.submit(self._called, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, in the midst of their work where it is not waited for."""
        if not wait or cancel_futures:
            self._end()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        self._end()

    def _called(
        self, fn: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> T:
        process = self._idle.get()
        try:
            done, found = _asked(process, (fn, args, kwargs))
        finally:
            self._idle.put(process)
        if not done:
            raise found
        return found  # type: ignore[no-any-return]

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def is_helper() -> bool:
    """Whether this process was begun by ``Helpers``."""
    return _FROM_PARENT in os.environ


def _begun() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvtune.common.helpers"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {_FROM_PARENT: "1"},
    )  # fmt: skip


def _asked(process: subprocess.Popen[bytes], work: object) -> tuple[bool, Any]:
    """Whether it went well, and what came of it."""
    if process.stdin is None or process.stdout is None:
        raise HelperLostError("a helper has no pipes")
    try:
        pickle.dump(work, process.stdin)
        process.stdin.flush()
        found: tuple[bool, Any] = pickle.load(process.stdout)  # noqa: S301 - of our own process
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise HelperLostError(f"a helper process has ended: {error!r}") from error
    return found


def serve(given: IO[bytes], answers: IO[bytes]) -> None:
    """Call what is given, one function after another, until there is no more."""
    while True:
        try:
            fn, args, kwargs = pickle.load(given)  # noqa: S301 - of the process that began this one
        except EOFError:
            return
        try:
            found = True, fn(*args, **kwargs)
        except Exception as error:  # for whoever asked
            found = False, error
        answers.write(_pickled(found))
        answers.flush()


def _pickled(found: tuple[bool, Any]) -> bytes:
    """An error that cannot be sent is sent by its words."""
    try:
        return pickle.dumps(found)
    except Exception as error:
        return pickle.dumps((False, RuntimeError(f"{found[1]!r} cannot be sent: {error!r}")))


def main() -> None:
    """Answer over the standard output, to which nothing else is then written."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
