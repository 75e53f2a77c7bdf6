"""Kills, full disks, two processes at once, and hash seeds: nothing is lost and nothing changes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtune.cli.failures import exit_code
from kvtune.common.errors import KvtuneError
from kvtune.common.files import append_text, write_text
from kvtune.common.lock import locked
from kvtune.common.progress import Silent
from kvtune.tests.made_up import Notes
from kvtune.tuner.journal import Journal, Trial


def trial(number: int) -> Trial:
    return Trial(number, "complete", {"h2o": True, "shrinkage": 0.1 + number, "context": 8192})


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "study.journal"
    kept = Journal(path, Silent())
    for number in range(3):
        kept.add(trial(number))
    return path


def test_a_journal_holds_what_was_added(journal: Path) -> None:
    assert Journal(journal, Silent()).trials == [trial(n) for n in range(3)]


def test_a_journal_cut_anywhere_loses_no_whole_line(journal: Path) -> None:
    """Every length that a power cut may leave, and appending afterwards."""
    whole = journal.read_bytes()
    for length in range(len(whole) + 1):
        journal.write_bytes(whole[:length])
        notes = Notes()
        kept = Journal(journal, notes)
        lines = whole[:length].count(b"\n")
        assert kept.trials == [trial(n) for n in range(max(lines - 1, 0))]
        assert bool(notes.said) == (not whole[:length].endswith(b"\n") and length > 0)
        kept.add(trial(len(kept.trials)))
        assert Journal(journal, Silent()).trials[-1] == trial(len(kept.trials))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"trial": 1', b'"trial": 7'),
        (b'"complete"', b'"unknown"'),
        (b"1.1", b"NaN"),
        (b'"kvtune_journal": 2', b'"kvtune_journal": 1'),
        (b'{"trial": 1', b'{"trial": {'),
        (b'"h2o"', b'"\xff"'),
    ],
)
def test_a_damaged_journal_is_refused(journal: Path, old: bytes, new: bytes) -> None:
    journal.write_bytes(journal.read_bytes().replace(old, new, 1))
    with pytest.raises(KvtuneError) as caught:
        Journal(journal, Silent())
    assert "begins anew" in str(caught.value.hint)


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(KvtuneError, match="No space left") as caught:
        write_text(path, "new")
    assert "space" in str(caught.value.hint)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_append_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    """A real limit on file sizes, in a process of its own."""
    path = tmp_path / "lines"
    path.write_text("whole\n")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from kvtune.common.files import append_text\n"
        "from kvtune.common.errors import KvtuneError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: append_text(Path(sys.argv[1]), 'too long for it\\n')\n"
        "except KvtuneError as error: print(error)\n"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert path.read_text() == "whole\n"
    append_text(path, "next\n")
    assert path.read_text() == "whole\nnext\n"


def test_a_full_disk_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(_full) == 2
    assert "No space left" in capsys.readouterr().err


HOLD = """
import sys
from pathlib import Path
from kvtune.common.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Callable[[], None]]]:
    """Another process that holds the folder's lock, and how to let it go.

    It imports nothing of the tests, whose names are pytest's own.
    """
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process, process.stdin.close
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path, holder: Any) -> None:
    process, _ = holder
    with (
        pytest.raises(KvtuneError, match=f"process {process.pid} is writing here"),
        locked(tmp_path),
    ):
        pass


def test_a_second_writer_can_wait(tmp_path: Path, holder: Any) -> None:
    process, let_go = holder

    class Wakes(Notes):
        def note(self, message: str) -> None:
            super().note(message)
            let_go()

    notes = Wakes()
    with locked(tmp_path, wait=True, progress=notes):
        assert str(process.pid) in notes.said[0]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: Any) -> None:
    process, _ = holder
    process.kill()
    process.wait()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


COMPRESSION = """
from kvtune.policies.policy_file.document import read_policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.latency.compression import compression
from kvtune.common.estimate import exact
text = '''
kvtune_policy: 1
name: many
options:
  a: {method: kvzip, budget: 0.01%}
  b: {method: h2o, budget: 40%}
  c: {method: kvzip, budget: 99%, keys: int4}
  d: {method: snapkv, budget: 7%}
policy: a
layers: {0: [a, b, c, d, a, b, a, b], 1: [c, a, a, a, d, a, a, a], 2: [b, a, a, a, a, d, a, c]}
'''
shape = find_model("llama-8b")
policy = read_policy(text).bind(shape.layers, shape.kv_heads)
print(repr(compression(policy, shape, find_gpu("h100"), 8192, exact(0.1, "s"))))
"""


def test_the_compression_time_does_not_depend_on_the_hash_seed() -> None:
    found = set()
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", COMPRESSION],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1
    assert "Estimate(value=" in found.pop()
