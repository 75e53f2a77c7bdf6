"""Loading models from disk, their fingerprints and geometry, and names that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from kvtune.common.errors import KvtuneError
from kvtune.traces.geometry import geometry_from_dict
from kvtune.traces.models import choose_dtype, fingerprint, load_model, wrap


@pytest.fixture(scope="module")
def folder(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, saved as transformers saves models."""
    path = tmp_path_factory.mktemp("saved")
    tiny_model.model.save_pretrained(path)
    tiny_model.tokenizer.save_pretrained(path)
    return path


def test_a_saved_folder_loads_as_the_same_model(folder: Path, tiny_model: Any) -> None:
    loaded = load_model(folder)
    assert loaded.fingerprint == tiny_model.fingerprint
    assert loaded.geometry == tiny_model.geometry
    assert (loaded.device, loaded.dtype) == ("cpu", "float32")
    assert "CPU" in loaded.dtype_reason
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, tiny_model.model(ids).logits)
    assert loaded.tokenizer("ab").input_ids == tiny_model.tokenizer("ab").input_ids


def test_copies_in_other_dtypes_have_the_same_fingerprint(folder: Path, tiny_model: Any) -> None:
    half = load_model(folder, dtype="bfloat16")
    assert half.dtype == "bfloat16"
    assert half.fingerprint == tiny_model.fingerprint


def test_other_weights_have_another_fingerprint(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], tiny_model: Any
) -> None:
    config = LlamaConfig(**tiny_fields)
    same, other = make_network(config), make_network(config, seed=1)
    assert fingerprint(same, tiny_model.geometry) == tiny_model.fingerprint
    assert fingerprint(other, tiny_model.geometry) != tiny_model.fingerprint
    with torch.no_grad():
        same.model.layers[2].mlp.down_proj.weight[3, 3] += 0.1
    assert fingerprint(same, tiny_model.geometry) != tiny_model.fingerprint


def test_geometry_is_read_and_survives_json(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    fields = {**tiny_fields, "sliding_window": 8, "query_pre_attn_scalar": 16}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    }
    config = Gemma3TextConfig(**fields, layer_types=kinds, rope_parameters=ropes)
    geometry = wrap(make_network(config), None, name="gemma").geometry
    assert (geometry.layers, geometry.query_heads, geometry.kv_heads) == (3, 4, 2)
    assert (geometry.head_dim, geometry.group, geometry.scale) == (8, 2, 0.25)
    assert geometry.windows == (8, 8, None)
    near, far = geometry.rope_at(0), geometry.rope_at(2)
    assert near is not None
    assert far is not None
    assert (near.kind, near.theta) == ("default", 100.0)
    assert (far.kind, far.theta, dict(far.scaling)["factor"]) == ("linear", 1000.0, 8.0)
    expected = torch.tensor([1000.0 ** (-2 * i / 8) / 8 for i in range(4)])
    torch.testing.assert_close(torch.tensor(far.inverse_frequencies), expected)
    assert geometry_from_dict(json.loads(json.dumps(geometry.as_dict()))) == geometry


def test_rope_facts_turn_a_key_back(tiny_model: Any) -> None:
    """The pairs (i, i + D/2) turned by -position * frequency are the keys before RoPE."""
    from kvtune.traces.passes import prompt_cache

    raw: list[torch.Tensor] = []
    projection = tiny_model.model.model.layers[0].self_attn.k_proj
    hook = projection.register_forward_hook(lambda *given: raw.append(given[2]))
    try:
        turned = prompt_cache(tiny_model, range(2, 32))[0][0][0]  # [H, N, D]
    finally:
        hook.remove()
    rope = tiny_model.geometry.rope_at(0)
    angle = torch.arange(30.0)[:, None] * torch.tensor(rope.inverse_frequencies)
    one, two = turned.chunk(2, -1)
    back = [one * angle.cos() + two * angle.sin(), two * angle.cos() - one * angle.sin()]
    expected = raw[0].reshape(30, 2, 8).transpose(0, 1)
    torch.testing.assert_close(torch.cat(back, -1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm-135m", "no model called"),
        ("nowhere.gguf", "no such GGUF"),
        ("./nowhere", "no model called"),
    ],
)
def test_unknown_models_are_refused(name: str, message: str) -> None:
    with pytest.raises(KvtuneError, match=message):
        load_model(name)


def test_near_names_are_offered() -> None:
    with pytest.raises(KvtuneError) as caught:
        load_model("smolm2-135")
    assert "smollm2-135m" in (caught.value.hint or "")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match=r"no config\.json"):
        load_model(tmp_path)


def test_a_folder_with_damaged_weights_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(KvtuneError, match="cannot be loaded"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(folder: Path, tiny_model: Any, tmp_path: Path) -> None:
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(tiny_model.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(KvtuneError, match="cannot be loaded"):
        load_model(tmp_path)


def test_a_file_that_is_no_gguf_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"no model" * 100)
    with pytest.raises(KvtuneError, match="cannot be read"):
        load_model(tmp_path / "model.gguf")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99"])
def test_devices_that_are_not_there_are_refused(folder: Path, device: str) -> None:
    with pytest.raises(KvtuneError, match=r"is no device|not supported|has no"):
        load_model(folder, device=device)


def test_dtypes_come_with_a_reason_or_are_refused() -> None:
    assert choose_dtype("cpu") == ("float32", choose_dtype("cpu")[1])
    assert choose_dtype("cpu", "float16")[0] == "float16"
    with pytest.raises(KvtuneError, match="no dtype"):
        choose_dtype("cpu", "fp8")
