"""Shapes of every kind of layer: what is cached and stored, worked out by hand beside each."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.common.units import MIB
from kvtune.profiles.config_file import check_numbers
from kvtune.profiles.gguf_shape import shape_from_gguf
from kvtune.profiles.model_config import shape_from_config, shape_of
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.weights import format_name, weight_bytes

SMALL = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 32000, "num_hidden_layers": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
FULL, SLIDES, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LONG = 131_072


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))


def shape(kind: str, **changes: Any) -> ModelShape:
    pytest.importorskip("transformers")
    return shape_of({"model_type": kind, **SMALL, **changes}, "config.json", "mine")


def states(model: ModelShape) -> int:
    return sum(layer.state_bytes for layer in model.layer_caches)


def test_linear_layers_hold_a_state_and_no_keys() -> None:
    model = shape(
        "qwen3_5_text", layer_types=([LINEAR] * 3 + [FULL]) * 2, linear_conv_kernel_dim=4,
        linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=4,
        linear_num_value_heads=8,
    )  # fmt: skip
    # Convolution over 4 tokens of keys, queries and values in bf16; one 64 x 64 matrix a head.
    conv, matrix = 4 * (2 * 4 * 64 + 8 * 64) * 2, 8 * 64 * 64 * 4
    assert states(model) in (6 * (conv + matrix), 6 * (conv + matrix // 2))
    assert model.kv_bytes(LONG) - states(model) == 256 * MIB


def test_one_attention_layer_of_eight() -> None:
    model = shape(
        "jamba", attn_layer_period=8, attn_layer_offset=4, expert_layer_period=2,
        expert_layer_offset=1, num_experts=8, num_experts_per_tok=2, mamba_d_state=16,
        mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=64,
    )  # fmt: skip
    assert model.kv_bytes(LONG) - states(model) == 128 * MIB
    assert [bool(layer.kv_heads) for layer in model.layer_caches] == [i == 4 for i in range(8)]
    assert model.parameter_counts().experts == 4 * 8 * 3 * 1024 * 2048


def test_layers_that_share_keys_and_heads_that_differ() -> None:
    kinds = [SLIDES, FULL] * 4
    shared = shape("gemma4_text", num_kv_shared_layers=4, sliding_window=512, layer_types=kinds)
    assert shared.kv_bytes(LONG) == 2 * 1024 * LONG + 2 * 1024 * 512
    differ = shape(
        "gemma4_text", sliding_window=512, layer_types=kinds, num_global_key_value_heads=1,
        global_head_dim=256, num_key_value_heads=4, head_dim=256, num_kv_shared_layers=0,
    )  # fmt: skip
    assert differ.kv_bytes(LONG) == 4 * 1024 * LONG + 4 * 4096 * 512


@pytest.mark.parametrize(
    ("kind", "changes", "windows"),
    [
        ("qwen2_5_vl", {"use_sliding_window": False, "sliding_window": 4096}, [None] * 8),
        ("mistral", {"sliding_window": None}, [None] * 8),
        ("mistral", {"sliding_window": 4096}, [4096] * 8),
        ("cohere2", {"sliding_window": 64, "head_dim": None}, [64, 64, 64, None] * 2),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 6},
            [None] * 6 + [64] * 2,
        ),
    ],
)
def test_windows(kind: str, changes: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.window for layer in shape(kind, **changes).layer_caches] == windows


@pytest.mark.parametrize(
    ("kind", "changes", "billions"),
    [
        (  # GPT-NeoX: two feed-forward matrices
            "gpt_neox",
            {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32,
             "num_hidden_layers": 32, "vocab_size": 50432, "num_key_value_heads": None,
             "head_dim": None}, 6.86,
        ),
        (  # Command R7B: tied unless the file says otherwise
            "cohere2",
            {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
             "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 256000,
             "tie_word_embeddings": None}, 8.03,
        ),
        (  # ERNIE 4.5 21B: experts under other names
            "ernie4_5_moe",
            {"hidden_size": 2560, "intermediate_size": 12288, "num_attention_heads": 20,
             "num_key_value_heads": 4, "num_hidden_layers": 28, "moe_num_experts": 64,
             "moe_num_shared_experts": 2, "moe_k": 6, "moe_intermediate_size": 1536,
             "moe_layer_start_index": 1, "moe_layer_end_index": 27, "moe_layer_interval": 1,
             "vocab_size": 103424, "tie_word_embeddings": True}, 21.8,
        ),
    ],
)  # fmt: skip
def test_published_sizes(kind: str, changes: dict[str, Any], billions: float) -> None:
    pytest.importorskip("transformers")
    merged = {"model_type": kind, **SMALL, **changes}
    given_ = {key: value for key, value in merged.items() if value is not None}
    assert shape_of(given_, "f", "m").parameters / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0,
                           "original_max_position_embeddings": 32768}}, 131072),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 65536),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 8192}}, 32768),
        ({"rope_scaling": None}, 32768),
    ],
)  # fmt: skip
def test_the_longest_context_holds_the_scaling(changes: dict[str, Any], tokens: int) -> None:
    assert shape("llama", max_position_embeddings=32768, **changes).max_context == tokens


# --- stored weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantisation", "name", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8.0),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq int4", 4.16),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "awq int4", 4.31),
        ({"quant_method": "mxfp4"}, "mxfp4", 4.25),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4 bits", 4.5),
        (
            {"quant_method": "compressed-tensors",
             "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}},
            "float8", 8.0,
        ),
    ],
)  # fmt: skip
def test_a_quantised_checkpoint_is_counted_as_stored(
    quantisation: dict[str, Any], name: str, bits: float
) -> None:
    model = shape("llama", quantization_config=quantisation)
    assert model.stored is not None
    assert format_name(model, "stored") == name
    assert model.stored.bits == pytest.approx(bits, rel=0.005)
    size = weight_bytes(model, "stored")
    assert size.tier == "assumed"
    assert size.low < size.value < size.high
    if name != "mxfp4":  # of which only experts are quantised
        counts = model.parameter_counts()
        expected = 2 * counts.sixteen_bit + counts.matrices * bits / 8
        assert size.value == pytest.approx(expected, rel=0.005)


def test_files_say_the_bytes_themselves(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import numpy as np
    from safetensors.numpy import save_file

    save_file(
        {"a": np.zeros((3, 5), np.uint8), "b": np.zeros(7, np.float32)}, tmp_path / "m.safetensors"
    )
    config = {"model_type": "llama", **SMALL, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = weight_bytes(shape_from_config(tmp_path), "stored")
    assert (size.value, size.tier) == (3 * 5 + 7 * 4, "exact")


# --- GGUF ------------------------------------------------------------------------------------


def gguf_file(path: Path, architecture: str, tensors: dict[str, Any], **keys: Any) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    plain = {"block_count": 8, "context_length": LONG, "embedding_length": 1024,
             "feed_forward_length": 2048, "attention.head_count": 8, "attention.head_count_kv": 2,
             "attention.key_length": 128, "attention.value_length": 128}  # fmt: skip
    for key, value in {**plain, **keys}.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def table() -> dict[str, Any]:
    import numpy as np

    return {"token_embd.weight": np.zeros((64, 32), np.float16)}


@pytest.mark.parametrize(
    ("architecture", "window", "every"),
    [("gemma3", 512, 6), ("gemma2", 512, 2), ("gpt-oss", 128, 2), ("cohere2", 512, 4)],
)
def test_gguf_windows_are_those_of_the_architecture(
    tmp_path: Path, architecture: str, window: int, every: int
) -> None:
    file = gguf_file(tmp_path / "m.gguf", architecture, table(), attention__sliding_window=window)
    full = 8 // every
    assert shape_from_gguf(file).kv_bytes(LONG) == 1024 * (full * LONG + (8 - full) * window)


def test_gguf_windows_that_llama_cpp_does_not_use_and_those_nobody_knows(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "m.gguf", "qwen2", table(), attention__sliding_window=512)
    assert shape_from_gguf(file).kv_bytes(LONG) == 8 * 1024 * LONG
    other = gguf_file(tmp_path / "o.gguf", "unheard-of", table(), attention__sliding_window=512)
    with pytest.raises(KvtuneError, match="which layers of 'unheard-of' have its window"):
        shape_from_gguf(other)


@pytest.mark.parametrize(
    ("norms", "of_queries", "over_heads", "a_layer"),
    [
        ({"attn_norm": 1024, "ffn_norm": 1024}, False, False, 2),
        ({"attn_norm": 1024, "ffn_norm": 1024, "attn_q_norm": 128, "attn_k_norm": 128},
         True, False, 2),
        ({"attn_norm": 1024, "post_attention_norm": 1024, "ffn_norm": 1024, "post_ffw_norm": 1024,
          "attn_q_norm": 1024, "attn_k_norm": 1024}, True, True, 4),
    ],
)  # fmt: skip
def test_a_gguf_says_which_norms_a_layer_has(
    tmp_path: Path, norms: dict[str, int], of_queries: bool, over_heads: bool, a_layer: int
) -> None:
    import numpy as np

    tensors = {f"blk.0.{name}.weight": np.ones(wide, np.float32) for name, wide in norms.items()}
    model = shape_from_gguf(gguf_file(tmp_path / "m.gguf", "qwen3", table() | tensors))
    found = model.query_key_norm, model.norms_over_heads, model.norms_per_layer
    assert found == (of_queries, over_heads, a_layer)


def test_gguf_lists_say_which_layers_attend(tmp_path: Path) -> None:
    keys = {"ssm__inner_size": 2048, "ssm__state_size": 16, "ssm__conv_kernel": 4}
    file = gguf_file(
        tmp_path / "m.gguf",
        "jamba",
        table(),
        attention__head_count_kv=[0, 0, 0, 0, 2, 0, 0, 0],
        **keys,
    )
    model = shape_from_gguf(file)
    assert states(model) == 7 * 4 * (3 * 2048 + 16 * 2048)
    assert model.kv_bytes(LONG) - states(model) == 128 * MIB


def test_a_recurrent_gguf_takes_any_number_of_tokens(tmp_path: Path) -> None:
    keys = {"ssm__inner_size": 2048, "ssm__state_size": 16, "ssm__conv_kernel": 4}
    model = shape_from_gguf(gguf_file(tmp_path / "m.gguf", "mamba", table(), **keys))
    assert model.kv_bytes(1) == model.kv_bytes(LONG) == states(model) > 0
    assert model.tokens_that_fit(states(model)) is None
    assert model.tokens_that_fit(states(model) - 1) == 0


def test_a_gguf_says_its_own_size_over_all_its_files(tmp_path: Path) -> None:
    import numpy as np

    first = gguf_file(tmp_path / "m-00001-of-00002.gguf", "llama", table())
    with pytest.raises(KvtuneError, match="there is no such file; the model has 2 files"):
        shape_from_gguf(first)
    rest = {"output.weight": np.zeros((64, 32), np.float32)}
    gguf_file(tmp_path / "m-00002-of-00002.gguf", "llama", rest)
    model = shape_from_gguf(first)
    assert not model.tied_embeddings
    size = weight_bytes(model, "stored")
    assert (size.value, size.tier) == (64 * 32 * (2 + 4), "exact")


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=6))
def test_a_broken_gguf_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, at: int, instead: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "broken"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.gguf"
    if not whole.exists():
        gguf_file(whole, "llama", table())
    raw = whole.read_bytes()
    file = folder / "m.gguf"
    file.write_bytes(raw[:at] + instead + raw[at + len(instead) :])
    with contextlib.suppress(KvtuneError):
        assert shape_from_gguf(file).kv_bytes(1) > 0


# --- what nobody means -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2**63), ("num_hidden_layers", 99_999_999), ("hidden_size", 2**31),
        ("num_attention_heads", 10**300), ("n_routed_experts", 10**9), ("sliding_window", 10**300),
        ("rope_theta", float("inf")), ("layer_types", ["x"] * 2**18),
    ],
)  # fmt: skip
def test_numbers_that_no_model_has_are_refused_with_their_key(key: str, value: Any) -> None:
    with pytest.raises(KvtuneError, match=key) as caught:
        check_numbers({"text_config": {key: value}}, "config.json")
    assert len(caught.value.message) < 120


def test_deep_nesting_and_other_encodings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("[" * 100_000)
    with pytest.raises(KvtuneError, match=r"nested too deeply|no valid JSON"):
        shape_from_config(file)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(KvtuneError, match="no text in UTF-8"):
        shape_from_config(file)


def test_a_torn_memory_of_a_shape_is_built_again(tmp_path: Path) -> None:
    before = shape("cohere2")  # what is plain is read without its class, and not remembered
    kept = list((tmp_path / "cache" / "shapes").iterdir())
    assert kept
    for each in kept:
        each.write_text('{"layers": [')
    assert shape("cohere2") == before
