"""Reading traces: everything comes back, and damage is one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.traces.capture import capture
from kvtune.traces.trace import open_trace


@pytest.fixture
def copied(tiny_trace: Any, tmp_path: Path) -> Path:
    """A copy of the tiny trace, to be damaged."""
    return Path(shutil.copytree(tiny_trace.root, tmp_path / "trace"))


def test_what_was_captured_is_read_back(
    tiny_trace: Any, make_samples: Any, tiny_model: Any
) -> None:
    trace = open_trace(tiny_trace.root)
    for record, sample in zip(
        trace.samples, make_samples(4, splits=("search", "evaluate")), strict=True
    ):
        for name in ("id", "split", "kind", "token_ids", "next_token", "needle_of_row"):
            assert getattr(record, name) == getattr(sample, name)
    assert trace.geometry == tiny_model.geometry
    assert trace.fingerprint == tiny_model.fingerprint
    assert trace.probes == 3
    assert [s.id for s in trace.of_split("evaluate")] == ["random-1", "random-3"]
    assert trace.manifest["versions"].keys() >= {"kvtune", "torch", "transformers"}


def test_targets_are_the_following_tokens(tiny_trace: Any) -> None:
    sample = tiny_trace.samples[0]
    following = (*sample.token_ids, sample.next_token)
    rows = range(sample.observed)
    assert sample.targets == tuple(following[sample.prompt + row + 1] for row in rows)
    assert sample.answer_mask == tuple(row % 3 == 0 for row in rows)
    assert sample.needles == 1


def test_only_the_named_tensors_are_loaded_in_the_asked_dtype(tiny_trace: Any) -> None:
    layer = tiny_trace.layer("random-0", 1, dtype=torch.float64, names=("k", "probes"))
    assert set(layer.tensors) == {"k", "probes"}
    assert {t.dtype for t in layer.tensors.values()} == {torch.float64}
    with pytest.raises(KvtuneError, match="no 'q' loaded"):
        _ = layer.q


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": flip_last_byte,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_with_a_way_out(copied: Path, damage: str) -> None:
    path = copied / "sample-0001" / "layer-02.safetensors"
    DAMAGES[damage](path)
    trace = open_trace(copied)
    trace.layer("random-1", 1)
    with pytest.raises(KvtuneError) as caught:
        trace.layer("random-1", 2)
    assert caught.value.where == str(path)
    assert "capture again" in (caught.value.hint or "")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sample_entry_is_noticed_on_opening(copied: Path, damage: str) -> None:
    DAMAGES[damage](copied / "sample-0002" / "sample.json")
    with pytest.raises(KvtuneError, match=r"sample\.json"):
        open_trace(copied)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', '{"format": 1, "samples": 3}'])
def test_a_damaged_manifest_is_one_clear_error(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(KvtuneError) as caught:
        open_trace(copied)
    assert caught.value.where == str(copied / "manifest.json")


def rewrite(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_an_unfinished_trace_says_how_to_go_on(copied: Path) -> None:
    rewrite(copied, lambda m: m["samples"].pop())
    with pytest.raises(KvtuneError, match="3 of 4 samples") as caught:
        open_trace(copied)
    assert "continues" in (caught.value.hint or "")


def test_a_newer_format_is_refused(copied: Path) -> None:
    rewrite(copied, lambda m: m.update(format=2))
    with pytest.raises(KvtuneError, match="format 2"):
        open_trace(copied)


def test_a_path_that_leads_out_of_the_trace_is_refused(copied: Path) -> None:
    rewrite(copied, lambda m: m["samples"][0].update(folder="../elsewhere"))
    with pytest.raises(KvtuneError, match="leads out"):
        open_trace(copied)


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match="holds no trace"):
        open_trace(tmp_path)


def test_a_trace_of_another_model_is_refused(tiny_trace: Any) -> None:
    tiny_trace.require_model(tiny_trace.fingerprint)
    with pytest.raises(KvtuneError, match="another model"):
        tiny_trace.require_model("0" * 64)


def test_unknown_samples_layers_and_tensors_are_refused(tiny_trace: Any) -> None:
    with pytest.raises(KvtuneError, match="no sample 'random-9'"):
        tiny_trace.layer("random-9", 0)
    with pytest.raises(KvtuneError, match="no layer 3"):
        tiny_trace.layer("random-0", 3)
    with pytest.raises(KvtuneError, match="no tensor 'hidden'"):
        tiny_trace.layer("random-0", 0, names=("hidden",))


def test_the_content_hash_is_of_the_content_alone(
    tiny_model: Any, make_samples: Any, tmp_path: Path
) -> None:
    hashes = [
        capture(tiny_model, make_samples(1), tmp_path / name, probes=1, seed=seed).content_sha256
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
