"""A model of the Hub says its size and revision before it is fetched, without any network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Silent
from kvtune.traces.hub import hub_folder, parts_of

SHA = "c0ffee"
FILES = {"config.json": 700, "model.safetensors": 3 * 2**30, "pytorch_model.bin": 5 * 2**30}


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A Hub with one model; what it was asked, and what of it is at hand."""
    seen: dict[str, Any] = {"at hand": set(), "reached": True}

    def model_info(_: Any, repository: str, **asked: Any) -> Any:
        if not seen["reached"]:
            raise OSError("no route")
        seen["asked"] = repository, asked["revision"]
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
        return SimpleNamespace(sha=SHA, siblings=files)

    def fetched(repository: str, revision: str | None, **how: Any) -> str:
        seen["fetched"] = repository, revision, how.get("allow_patterns")
        if how.get("local_files_only") and not seen["at hand"]:
            raise OSError("not in the cache")
        return str(tmp_path)

    def cached(_: str, file: str, revision: str) -> str | None:
        return str(tmp_path / file) if file in seen["at hand"] else None

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    return seen


def test_size_and_revision_are_said_and_no_pickle_is_fetched(
    hub: dict[str, Any], tmp_path: Path
) -> None:
    told = Told()
    assert hub_folder("owner/name", told) == str(tmp_path)
    (note,) = told.notes
    assert "fetching 3.00 GiB of owner/name@c0ffee" in note
    repository, revision, wanted = hub["fetched"]
    assert (repository, revision) == ("owner/name", SHA)
    assert not any(pattern.endswith(("bin", "*")) for pattern in wanted)


def test_a_pinned_revision_is_asked_for_and_what_is_at_hand_is_not_fetched_again(
    hub: dict[str, Any],
) -> None:
    hub["at hand"] = {"config.json", "model.safetensors"}
    told = Told()
    hub_folder("owner/name@v1", told)
    assert hub["asked"] == ("owner/name", "v1")
    assert told.notes == []


def test_without_the_hub_its_cache_serves_and_else_the_reason_is_told(
    hub: dict[str, Any], tmp_path: Path
) -> None:
    hub["reached"] = False
    with pytest.raises(KvtuneError, match="no route") as caught:
        hub_folder("owner/name@v1", Silent())
    assert "owner/name@v1" in str(caught.value)
    hub["at hand"] = {"config.json"}
    assert hub_folder("owner/name@v1", Silent()) == str(tmp_path)
    assert hub["fetched"][1] == "v1"


@pytest.mark.parametrize(
    ("name", "parts"), [("a/b", ("a/b", None)), ("a/b@", ("a/b", None)), ("a/b@r", ("a/b", "r"))]
)
def test_a_revision_stands_behind_the_name(name: str, parts: tuple[str, str | None]) -> None:
    assert parts_of(name) == parts
