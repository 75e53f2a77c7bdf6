"""Helper processes do a search's work beside it, and change none of its results."""

from __future__ import annotations

import io
import math
import os
import pickle
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtune.common.helpers import HelperLostError, Helpers, is_helper, serve
from kvtune.common.progress import Silent
from kvtune.tests.made_up import little_workload, of_own_weights
from kvtune.tuner import answer, beside, search
from kvtune.tuner.beside import LONGEST_S, Beside, count_for
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.search import run_search

pytestmark = pytest.mark.usefixtures("one_thread")

GB = 10**9


class Notes(Silent):
    """Keeps what it is told, and counts the items of each bar."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Refuses(Executor):
    """Fails at whatever it is given."""

    def submit(self, *_: object, **__: object) -> object:  # type: ignore[override]
        raise HelperLostError("a helper process has ended")


@pytest.fixture
def asked(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], SearchRequest]:
    """The same search of a tiny model's own weights, each in a folder and a store of its own."""
    from kvtune.traces import workloads

    monkeypatch.setattr(workloads, "named_workload", lambda *_: little_workload())

    def request(name: str) -> SearchRequest:
        monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / f"{name} store"))
        return of_own_weights(saved_model, tmp_path / name)

    return request


def use_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches on a CPU have two of them."""
    monkeypatch.setattr(beside, "_count", lambda _: 2)
    monkeypatch.setattr(beside, "DEVICES", ("cpu",))


@pytest.fixture
def two() -> Iterator[Helpers]:
    helpers = Helpers(2, LONGEST_S)
    yield helpers
    helpers.shutdown()


def test_a_search_with_helpers_finds_what_one_without_finds(
    asked: Callable[[str], SearchRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_search(asked("alone"))
    use_helpers(monkeypatch)
    notes = Notes()
    shared = run_search(asked("shared"), notes)
    assert not [note for note in notes.notes if "given up" in note]
    assert shared.policy == alone.policy
    assert shared.quality == alone.quality
    assert shared.provenance["trace"] == alone.provenance["trace"]
    # Baselines' names, bytes, predicted and live losses, to the last digit.
    assert shared.baselines == alone.baselines


def test_helpers_do_the_work(
    asked: Callable[[str], SearchRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process would do itself is refused, and the search ends all the same."""
    from kvtune.simulator.quality import build, evaluate
    from kvtune.traces import capture
    from kvtune.tuner import validate

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this process was to do nothing itself")

    use_helpers(monkeypatch)
    monkeypatch.setattr(capture, "_run", refuse)
    monkeypatch.setattr(build, "layer_features", refuse)
    monkeypatch.setattr(evaluate, "_replay_sample", refuse)
    monkeypatch.setattr(validate, "_run", refuse)
    assert math.isfinite(run_search(asked("run")).quality.kl.value)


def test_a_search_whose_helpers_fail_goes_on_alone(
    asked: Callable[[str], SearchRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_helpers(monkeypatch)
    monkeypatch.setattr(beside, "Helpers", lambda *_: Fails())
    notes = Notes()
    assert math.isfinite(run_search(asked("run"), notes).quality.kl.value)
    assert len([note for note in notes.notes if "goes on alone" in note]) == 1


class Fails(Refuses):
    """As ``Refuses``, but lets itself be prepared."""

    def submit(self, fn: object, *_: object, **__: object) -> object:  # type: ignore[override]
        return None if fn is beside.prepare else super().submit()


def test_a_named_engine_needs_no_helpers(
    asked: Callable[[str], SearchRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_helpers(monkeypatch)
    with beside.helpers_of(replace(asked("run"), engine="processes:2"), Silent()) as found:
        assert found.executor is None


@pytest.mark.parametrize(
    ("processors", "card", "weights", "count"),
    [
        (16, 143 * GB, GB // 4, 4),  # an H200 and SmolLM2
        (16, 143 * GB, 16 * GB, 0),  # and eight billion parameters
        (8, 143 * GB, GB // 4, 2),
        (2, 143 * GB, GB // 4, 0),
        (16, 24 * GB, GB // 4, 0),
        (16, 80 * GB, 6 * GB, 0),
    ],
)
def test_helpers_are_as_many_as_fit(processors: int, card: int, weights: int, count: int) -> None:
    assert count_for(processors, card, weights) == count


@pytest.mark.parametrize(
    ("device", "card", "count"),
    [
        ("cuda", 143 * GB, True),
        (None, 143 * GB, True),
        ("cpu", 143 * GB, False),
        (None, None, False),
    ],
)
def test_helpers_begin_where_a_card_is_seen(
    device: str | None,
    card: int | None,
    count: bool,
    asked: Callable[[str], SearchRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(beside, "smallest_free_bytes", lambda: card)
    monkeypatch.setattr(beside, "processors", lambda: 16)
    assert bool(beside._count(replace(asked("run"), device=device))) == count


def test_helpers_end_where_the_model_runs_on_a_processor() -> None:
    class Ends(Executor):
        ended = False

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            self.ended = True

    executor = Ends()
    assert Beside(executor).used_on("cuda:0").executor is executor
    assert Beside(executor).used_on("cpu").executor is None
    assert executor.ended


def test_helpers_that_have_ended_are_not_asked() -> None:
    notes = Notes()
    some = Beside(Refuses())
    assert some.tried(lambda helpers: helpers.submit(print), notes) is None
    assert "goes on alone" in notes.notes[0]
    assert some.executor is None
    assert some.tried(lambda _: 1, notes) is None


def test_a_helper_returns_and_raises_what_its_function_does(two: Helpers) -> None:
    assert two.submit(math.gcd, 12, 18).result() == 6
    assert two.submit(is_helper).result()
    assert not is_helper()
    failed = two.submit(math.sqrt, -1.0)
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        failed.result()
    assert list(two.map(math.factorial, range(5))) == [1, 1, 2, 6, 24]


def test_a_helper_that_ends_is_lost(two: Helpers) -> None:
    with pytest.raises(HelperLostError, match=r"has ended with exit code 3$"):
        two.submit(os._exit, 3).result()


def test_a_lost_helper_is_named_with_what_it_wrote_last(two: Helpers) -> None:
    """``abort`` says so on standard error, as do drivers and allocators that end a process."""
    two.submit(os.write, 2, b"no more\nmemory\n").result()
    two.submit(os.write, 2, b"no more\nmemory\n").result()
    with pytest.raises(HelperLostError, match=r"signal 6; it wrote last: .*no more memory"):
        two.submit(os.abort).result()


def test_a_helper_that_hangs_is_ended() -> None:
    helpers = Helpers(1, longest_s=0.1)
    with pytest.raises(HelperLostError, match=r"had not answered after 0\.1 s"):
        helpers.submit(time.sleep, 3600).result()
    helpers.shutdown()


def test_helpers_close_all_that_was_open_to_them() -> None:
    """What stays open is closed by the collector, which warns of pipes that nobody reads."""
    helpers = Helpers(2, LONGEST_S)
    waiting = [helpers.submit(time.sleep, 3600) for _ in range(2)]
    helpers.shutdown(cancel_futures=True)
    for helper in helpers._helpers:
        pipes = helper.process.stdin, helper.process.stdout
        assert all(pipe is not None and pipe.closed for pipe in pipes)
        assert helper.said.closed
        assert helper.process.returncode is not None
    assert all(done.done() for done in waiting)


def test_what_cannot_be_sent_garbles_nothing(two: Helpers) -> None:
    unsent = [two.submit(lambda: None) for _ in range(4)]
    assert all(failed.exception() is not None for failed in unsent)
    assert [two.submit(math.gcd, 12, 18).result() for _ in range(2)] == [6, 6]


def test_a_search_whose_helpers_cannot_begin_goes_on_alone(
    asked: Callable[[str], SearchRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two processes fails; the first is ended."""
    began: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen

    def second_fails(*command: Any, **how: Any) -> subprocess.Popen[bytes]:
        if began:
            raise BlockingIOError("Resource temporarily unavailable")
        began.append(begin(*command, **how))
        return began[0]

    use_helpers(monkeypatch)
    notes = Notes()
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", second_fails)
        with beside.helpers_of(asked("run"), notes) as found:
            assert found.executor is None
    assert notes.notes == [
        "no helper processes could be begun, this one goes on alone: "
        "Resource temporarily unavailable"
    ]
    assert began[0].returncode is not None


def test_helpers_begin_before_a_menu_is_chosen(
    asked: Callable[[str], SearchRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choosing imports torch where no device is named, which helpers do at the same time."""
    order: list[str] = []

    class StoppedError(Exception):
        pass

    def chosen(_: SearchRequest) -> None:
        order.append("menu")
        raise StoppedError

    def counted(_: SearchRequest) -> int:
        order.append("helpers")
        return 0

    monkeypatch.setattr(search, "with_menu", chosen)
    monkeypatch.setattr(beside, "_count", counted)
    with pytest.raises(StoppedError):
        run_search(replace(asked("run"), menu="auto", device=None))
    assert order == ["helpers", "menu"]


def test_helpers_have_ended_before_other_lengths_are_run(
    asked: Callable[[str], SearchRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Executor | None] = []
    elsewhere = answer._elsewhere

    def watched(found: answer.Found, *rest: Any) -> Any:
        assert found.source.beside is not None
        seen.append(found.source.beside.executor)
        return elsewhere(found, *rest)

    use_helpers(monkeypatch)
    monkeypatch.setattr(answer, "_elsewhere", watched)
    run_search(asked("run"))
    assert seen == [None]


def test_kernels_that_cannot_be_begun_are_given_up_with_a_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvtune.runtime import compiled_ahead

    def fail(*_: object) -> None:
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(compiled_ahead.Compiling, "begin", fail)
    notes, some = Notes(), Beside(None)
    loaded: Any = SimpleNamespace(geometry=None, model=None)
    assert some.compiles_for("cuda:0")
    some.compile([], loaded, notes)
    assert notes.notes == ["kernels are not compiled ahead: Resource temporarily unavailable"]
    assert not some.compiles_for("cuda:0")
    some.finish(notes)


class UnreadableError(Exception):
    """Can be pickled, and not be made again: it is made of two words, and keeps one."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def raise_unreadable() -> None:
    raise UnreadableError("quite", "lost")


def test_an_error_that_cannot_be_read_is_said_in_words() -> None:
    given, answers = io.BytesIO(), io.BytesIO()
    pickle.dump((raise_unreadable, (), {}), given)
    given.seek(0)
    serve(given, answers)
    answers.seek(0)
    done, error = pickle.load(answers)  # noqa: S301 - our own bytes
    assert not done
    assert "quite lost" in str(error)


def test_what_cannot_be_sent_is_said_in_words() -> None:
    given, answers = io.BytesIO(), io.BytesIO()
    pickle.dump((iter, ([],), {}), given)
    pickle.dump((open, ("/dev/null",), {}), given)
    given.seek(0)
    serve(given, answers)
    answers.seek(0)
    assert pickle.load(answers)[0]  # noqa: S301 - our own bytes
    done, error = pickle.load(answers)  # noqa: S301
    assert not done
    assert "cannot be sent" in str(error)
