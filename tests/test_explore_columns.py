"""Columns beside ``plans.jsonl``: the same plans, not believed where the lines say otherwise."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save

from kvtune.common.errors import KvtuneError
from kvtune.tests.made_up import facts, plans, write_study
from kvtune.tuner.explore import COLUMNS_FILE, PLANS_FILE, columns_file
from kvtune.tuner.explore.plans import Plans, write_line
from kvtune.tuner.explore.reader import StudyReader


def _same(one: Plans, other: Plans) -> None:
    for column in fields(Plans):
        a, b = getattr(one, column.name), getattr(other, column.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, column.name


def _lines_only(folder: Path) -> Plans:
    found = folder / COLUMNS_FILE
    data = found.read_bytes()
    found.unlink()
    read = StudyReader(folder).read().plans
    found.write_bytes(data)
    return read


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = write_study(tmp_path / "run", 9)
    StudyReader(folder).keep_columns()
    return folder


def test_a_kept_study_is_read_without_its_lines(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = _lines_only(kept)

    def refuse(*_: Any) -> None:
        raise AssertionError("lines were parsed")

    monkeypatch.setattr("kvtune.tuner.explore.reader.read_lines", refuse)
    _same(StudyReader(kept).read().plans, parsed)


def test_an_edited_line_is_what_is_shown(kept: Path) -> None:
    path = kept / PLANS_FILE
    path.write_text(path.read_text().replace('"sequences": ', '"sequences": 1', 1))
    read = StudyReader(kept).read().plans
    _same(read, _lines_only(kept))
    assert str(read.sequences[0]).startswith("1")


def test_lines_that_come_later_are_added(kept: Path) -> None:
    reader = StudyReader(kept)
    assert len(reader.read().plans) == 9
    with (kept / PLANS_FILE).open("a") as file:
        file.write(write_line(plans(10, facts())[9]))
    _same(reader.read().plans, _lines_only(kept))


def _changed(folder: Path, change: Any, signed: bool) -> None:
    """Columns that were changed, with a hash that is right for them or with the old one."""
    path = folder / COLUMNS_FILE
    arrays = {name: array.copy() for name, array in load(path.read_bytes()).items()}
    with safe_open(path, framework="numpy") as file:
        about = dict(file.metadata())
    change(arrays)
    if signed:
        lines, _, _ = about[columns_file._DIGESTS].partition(" ")
        signature = f"{lines} {columns_file._digest_of_columns(arrays)}"
        about[columns_file._DIGESTS] = signature
    path.write_bytes(save(arrays, metadata=about))


def _refused(folder: Path, reason: str) -> None:
    """The damaged file is named with what to do, and doing it is enough."""
    expected = _lines_only(folder)
    with pytest.raises(KvtuneError, match=reason) as caught:
        StudyReader(folder).read()
    assert caught.value.where == str(folder / COLUMNS_FILE)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("remove it")
    (folder / COLUMNS_FILE).unlink()
    _same(StudyReader(folder).read().plans, expected)


def _set(name: str, value: Any) -> Any:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name].flat[0] = value

    return change


def _replace(name: str, value: Any) -> Any:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = value

    return change


def test_a_flipped_figure_is_noticed(kept: Path) -> None:
    _changed(kept, _set("sequences", 77), signed=False)
    _refused(kept, "whose hash it holds")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("kl", np.nan), "type, length or size"),
        (_set("kl", -1.0), "type, length or size"),
        (_set("held_out", 1e9), "type, length or size"),
        (_set("by_kind", np.inf), "type, length or size"),
        (_set("sequences", 0), "type, length or size"),
        (_set("trial", -1), "type, length or size"),
        (_set("prompt_bytes", 2**60), "type, length or size"),
        (_set("heads", 60_000), "type, length or size"),
        (_replace("heads", np.zeros((9, 3), np.uint16)), "type, length or size"),
        (_replace("kl", np.zeros((9, 3), np.float32)), "type, length or size"),
        (_replace("trial", np.zeros((9, 1), np.int64)), "type, length or size"),
        (_replace("parameters", np.frombuffer(b"[]", np.uint8)), "type, length or size"),
        (_replace("parameters", np.frombuffer(b'[{"a": [1]}]', np.uint8)), "cannot be read"),
        (_replace("more", np.zeros(9)), "other columns"),
        (lambda arrays: arrays.pop("kl"), "other columns"),
    ],
)
def test_columns_that_no_search_writes_are_refused(kept: Path, change: Any, reason: str) -> None:
    """Even where the hash is right: someone may have written it."""
    _changed(kept, change, signed=True)
    _refused(kept, reason)


@pytest.mark.parametrize("data", [b"", b"\x00" * 40, b"\xff" * 40])
def test_what_is_no_file_of_columns_is_refused(kept: Path, data: bytes) -> None:
    (kept / COLUMNS_FILE).write_bytes(data)
    _refused(kept, "no safetensors file")


def test_columns_of_another_version_are_passed_over(kept: Path) -> None:
    path = kept / COLUMNS_FILE
    path.write_bytes(save(load(path.read_bytes()), metadata={"kvtune_columns_1_sha256": "0" * 64}))
    _same(StudyReader(kept).read().plans, _lines_only(kept))


def test_damaged_columns_of_an_earlier_search_are_written_anew(kept: Path) -> None:
    good = (kept / COLUMNS_FILE).read_bytes()
    (kept / COLUMNS_FILE).write_bytes(b"damaged")
    StudyReader(kept).keep_columns()
    assert (kept / COLUMNS_FILE).read_bytes() == good


@pytest.mark.parametrize("content", ["", "[]", '{"trials": "many"}', '{"model": 4}'])
def test_a_study_with_a_damaged_configuration_is_refused(kept: Path, content: str) -> None:
    path = kept / "config.json"
    path.write_text(content)
    with pytest.raises(KvtuneError) as caught:
        StudyReader(kept).read()
    assert caught.value.where == str(path)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("run the same search again")
    path.write_text('{"model": "./mine", "of a later version": 1}')
    assert len(StudyReader(kept).read().plans) == 9
