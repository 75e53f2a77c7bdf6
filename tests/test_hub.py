"""A model of the Hub says its size and revision before it is fetched, without any network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Silent
from kvtune.traces.hub import hub_folder, parts_of

SHA = "c0ffee"
MODEL = {"config.json": 700, "own.tiktoken": 300, "model.safetensors": 3 * 2**30}
CODE = {"modeling_own.py": 50_000}
LEFT_OUT = {
    "README.md": 9000,
    "pytorch_model.bin": 5 * 2**30,
    "consolidated.safetensors": 3 * 2**30,
    "consolidated-00001-of-00002.safetensors": 2**30,
    "onnx/config.json": 700,
    "original/model.safetensors": 3 * 2**30,
}
no_route = sys.modules[HTTPError.__module__].ConnectError
"""What the library below the Hub's own raises where there is no network."""


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A Hub with one model."""

    def model_info(*_: Any, **__: Any) -> Any:
        files = (MODEL | CODE | LEFT_OUT).items()
        return SimpleNamespace(
            sha=SHA, siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files]
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What was fetched, which leaves the cache as the library leaves it."""
    seen: list[tuple[str, str | None]] = []

    def download(repository: str, revision: str | None, **how: Any) -> str:
        seen.append((repository, revision))
        chosen = filter_repo_objects(MODEL | CODE | LEFT_OUT, **how)
        return str(leave_in_cache(Path(constants.HF_HUB_CACHE), revision or "main", [*chosen]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return seen


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def model_info(*_: Any, **__: Any) -> Any:
        raise no_route("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def leave_in_cache(cache: Path, revision: str, files: list[str]) -> Path:
    """What stands in the cache after a download: the files, and what the whole repository has."""
    folder = cache / "models--owner--name"
    snapshot = folder / "snapshots" / SHA
    for name in files:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).touch()
    for part in ("refs", "trees"):
        (folder / part).mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(SHA, "utf-8")
    every = {name: {"size": 1, "blob_id": "0"} for name in MODEL | CODE | LEFT_OUT}
    listing = {"format_version": 1, "files": every}
    (folder / "trees" / f"{SHA}.json").write_text(json.dumps(listing), "utf-8")
    return snapshot


@pytest.mark.usefixtures("hub")
def test_size_and_revision_are_said_and_weights_are_fetched_once_and_as_no_pickle(
    fetched: list[tuple[str, str | None]],
) -> None:
    told = Told()
    folder = Path(hub_folder("owner/name", told))
    assert {path.name for path in folder.iterdir()} == {*MODEL}
    (note,) = told.notes
    assert "fetching 3.00 GiB of owner/name@c0ffee" in note
    assert fetched == [("owner/name", None)]


@pytest.mark.usefixtures("hub", "fetched")
def test_the_models_own_code_is_fetched_where_it_is_trusted() -> None:
    folder = Path(hub_folder("owner/name", Silent(), trust_remote_code=True))
    assert {path.name for path in folder.iterdir()} == {*MODEL, *CODE}


@pytest.mark.usefixtures("hub")
def test_a_pinned_revision_is_asked_for_and_what_is_at_hand_is_not_fetched_again(
    fetched: list[tuple[str, str | None]],
) -> None:
    hub_folder("owner/name@v1", Silent())
    told = Told()
    hub_folder("owner/name@v1", told)
    assert fetched == [("owner/name", "v1")] * 2
    assert told.notes == []


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "revision"), [("owner/name", "main"), ("owner/name@v1", "v1")])
def test_without_a_network_the_cache_serves_what_was_fetched(
    cache: Path, name: str, revision: str
) -> None:
    """By the library itself, which holds the cache against all files of the repository."""
    folder = leave_in_cache(cache, revision, [*MODEL])
    assert hub_folder(name, Silent()) == str(folder)


@pytest.mark.usefixtures("no_network")
def test_without_a_network_and_the_model_the_reason_is_told(cache: Path) -> None:
    with pytest.raises(KvtuneError, match="no route") as caught:
        hub_folder("owner/name@v1", Silent())
    assert "owner/name@v1" in str(caught.value)
    leave_in_cache(cache, "v1", ["config.json"])
    with pytest.raises(KvtuneError, match="no route"):
        hub_folder("owner/name@v1", Silent())


@pytest.mark.parametrize(
    ("name", "parts"), [("a/b", ("a/b", None)), ("a/b@", ("a/b", None)), ("a/b@r", ("a/b", "r"))]
)
def test_a_revision_stands_behind_the_name(name: str, parts: tuple[str, str | None]) -> None:
    assert parts_of(name) == parts
