"""Processes that do this one's work beside it, begun early so that their imports take no time.

    python -m kvtune.common.helpers

``concurrent.futures`` has processes too, which import the caller's main module: a script that
searches without a guard around it would search again in each of them. These import kvtune alone,
and are given functions and arguments over their standard input. What goes through these pipes is
``pickle``, which is safe there and nowhere else: only this process and those that it began itself
write into them, nothing is stored, and nothing comes from outside.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Timer
from typing import IO, Any, TypeVar

T = TypeVar("T")

_FROM_PARENT = "KVTUNE_HELPER"
_ENDING_S = 5.0
"""How long a process whose pipe has closed may take to end, before it is killed."""
_SAID_BYTES = 400
"""Of what a lost process wrote last to its standard error, what is repeated."""


class HelperLostError(RuntimeError):
    """A process has ended before its work was done."""


@dataclass(frozen=True)
class _Helper:
    """One process.

    Args:
        process: which serves.
        said: a file of what it writes to its standard error.
    """

    process: subprocess.Popen[bytes]
    said: IO[bytes]

    @staticmethod
    def begun() -> _Helper:
        """A new one.

        Raises:
            OSError: no process can be started, or no file made.
        """
        said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``close``
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvtune.common.helpers"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                env=os.environ | {_FROM_PARENT: "1"},
            )  # fmt: skip
        except OSError:
            said.close()
            raise
        return _Helper(process, said)

    def asked(self, work: bytes) -> tuple[bool, Any]:
        """Whether it went well, and what came of it.

        Raises:
            HelperLostError: the process has ended, or what it answers cannot be read.
        """
        given, answers = self.process.stdin, self.process.stdout
        if given is None or answers is None:
            raise HelperLostError("a helper has no pipes")
        try:
            given.write(work)
            given.flush()
            found: tuple[bool, Any] = pickle.load(answers)  # noqa: S301 - of our own process
        except Exception as error:  # unpickling raises whatever it meets
            raise HelperLostError(self._why_lost(error)) from error
        return found

    def kill(self) -> None:
        """End it, in the midst of its work."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it, and close all that was open to it."""
        self.kill()
        for file in (self.process.stdin, self.process.stdout, self.said):
            if file is not None:
                with suppress(OSError):  # what was not yet sent has nobody to read it
                    file.close()

    def _why_lost(self, error: Exception) -> str:
        try:
            how = _ended(self.process.wait(_ENDING_S))
        except subprocess.TimeoutExpired:  # it runs on, but its next answer could be to anything
            self.kill()
            how = f"answered what cannot be read: {error!r}"
        return f"a helper process {how}{self._last_said()}"

    def _last_said(self) -> str:
        with suppress(OSError, ValueError):  # closed meanwhile
            size = self.said.seek(0, os.SEEK_END)
            self.said.seek(max(0, size - _SAID_BYTES))
            if said := " ".join(self.said.read().decode(errors="replace").split()):
                return f"; it wrote last: {said}"
        return ""


class Helpers(Executor):
    """An executor of processes that import nothing of the caller's.

    Functions are sent by name, so that they lie in modules of kvtune; arguments and results as
    ``pickle`` has them.

    Args:
        count: processes.
        longest_s: after which a function that has not returned is ended with its process.

    Raises:
        OSError: a process cannot be started; those that were are ended.
    """

    def __init__(self, count: int, longest_s: float) -> None:
        self._longest_s = longest_s
        self._helpers: list[_Helper] = []
        self._idle: SimpleQueue[_Helper] = SimpleQueue()
        try:
            for _ in range(count):
                self._helpers.append(_Helper.begun())
        except BaseException:
            self._close()
            raise
        for helper in self._helpers:
            self._idle.put(helper)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have the next idle process call a function.

        The future raises what the function raises; ``HelperLostError`` where its process has ended.
        """
        return self._threads.submit(self._called, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, in the midst of their work where it is not waited for."""
        if not wait or cancel_futures:
            for helper in self._helpers:
                helper.kill()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        self._close()

    def _called(
        self, fn: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> T:
        work = pickle.dumps((fn, args, kwargs))  # as a whole: half of it would garble the next
        helper = self._idle.get()
        try:
            done, found = self._answer(helper, work)
        finally:
            self._idle.put(helper)
        if not done:
            raise found
        return found  # type: ignore[no-any-return]

    def _answer(self, helper: _Helper, work: bytes) -> tuple[bool, Any]:
        """What a helper answers in time."""
        late = Event()

        def end() -> None:
            late.set()
            helper.process.kill()

        timer = Timer(self._longest_s, end)
        timer.daemon = True
        timer.start()
        try:
            return helper.asked(work)
        except HelperLostError as error:
            if not late.is_set():
                raise
            raise HelperLostError(
                f"a helper process had not answered after {self._longest_s:g} s and was ended"
            ) from error
        finally:
            timer.cancel()

    def _close(self) -> None:
        for helper in self._helpers:
            helper.close()


def is_helper() -> bool:
    """Whether this process was begun by ``Helpers``."""
    return _FROM_PARENT in os.environ


def _ended(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"has ended with exit code {code}"


def serve(given: IO[bytes], answers: IO[bytes]) -> None:
    """Call what is given, one function after another, until there is no more."""
    while True:
        try:
            fn, args, kwargs = pickle.load(given)  # noqa: S301 - of the process that began this one
        except EOFError:
            return
        try:
            found = True, fn(*args, **kwargs)
        except Exception as error:  # raised in the process that asked
            found = False, error
        answers.write(_pickled(found))
        answers.flush()


def _pickled(found: tuple[bool, Any]) -> bytes:
    """An error that cannot be sent, or not be read where it arrives, is sent by its words."""
    try:
        sent = pickle.dumps(found)
        if not found[0]:
            pickle.loads(sent)  # noqa: S301 - our own bytes
    except Exception as error:
        return pickle.dumps((False, RuntimeError(f"{found[1]!r} cannot be sent: {error!r}")))
    return sent


def main() -> None:
    """Answer over the standard output, to which nothing else is then written."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
