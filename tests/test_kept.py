"""Arrays that are kept: found again by their key, and only whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvtune
from kvtune.common import kept as module
from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic
from kvtune.common.kept import NOTHING_KEPT, Kept

ARRAYS = {
    "losses": np.arange(6, dtype=np.float32).reshape(2, 3),
    "correct": np.array([True, False]),
}


def test_what_was_kept_is_found_by_its_key_and_what_it_follows_from(tmp_path: Path) -> None:
    kept = Kept(tmp_path, ("trace",))
    kept.put(ARRAYS, "live", "sample", 3)
    found = Kept(tmp_path, ("trace",)).get("live", "sample", 3)
    assert found is not None
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert kept.get("live", "sample", 4) is None
    assert kept.get("live", "sample", "3") is None
    assert Kept(tmp_path, ("another trace",)).get("live", "sample", 3) is None


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: data[:-1] + b"x", lambda _: b""]
)
def test_a_damaged_file_is_as_none_and_can_be_written_anew(tmp_path: Path, damage: object) -> None:
    kept = Kept(tmp_path)
    kept.put(ARRAYS, "key")
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert kept.get("key") is None
    kept.put(ARRAYS, "key")
    assert kept.get("key") is not None


def test_nothing_is_kept_without_a_folder_and_after_clearing(tmp_path: Path) -> None:
    NOTHING_KEPT.put(ARRAYS, "key")
    assert NOTHING_KEPT.get("key") is None
    kept = Kept(tmp_path / "parts")
    kept.clear()  # of a folder that was never made
    kept.put(ARRAYS, "key")
    kept.clear()
    assert not (tmp_path / "parts").exists()


def test_another_version_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kept(tmp_path).put(ARRAYS, "key")
    monkeypatch.setattr(kvtune, "__version__", "0.0.0")
    assert Kept(tmp_path).get("key") is None


def test_two_processes_may_share_a_folder_that_one_clears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Kept(tmp_path / "parts"), Kept(tmp_path / "parts")
    theirs.put(ARRAYS, "theirs")
    with atomic(tmp_path / "parts" / "a.safetensors") as temporary:
        ours.clear()
        assert theirs.get("theirs") is None
        assert temporary.exists(), "what is being written stays"
    write, gone = module._write, [True]

    def cleared(path: Path, data: bytes) -> None:
        if gone.pop():
            gone.append(False)
            with atomic(path) as temporary:
                temporary.unlink()
                ours.clear()
        write(path, data)

    monkeypatch.setattr(module, "_write", cleared)
    theirs.put(ARRAYS, "theirs")
    assert theirs.get("theirs") is not None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KvtuneError, match="cannot write"):
        Kept(tmp_path / "file").put(ARRAYS, "key")
