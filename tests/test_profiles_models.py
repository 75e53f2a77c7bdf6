"""Model shapes: published totals, cache bytes, names, strict tables, and any config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.profiles.models import find_model, list_models, shape_from_config, shape_from_record
from kvtune.profiles.strict import parse
from kvtune.tests.tiers import each

# Totals of the published safetensors files (vision towers in, DeepSeek's MTP layer out).
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mistral-small-24b": 23_572_403_200,
    "mistral-small-3.1-24b": 24_011_361_280,
    "ministral-8b": 8_019_808_256,
    "mixtral-8x7b": 46_702_792_704,
    "phi-4-mini": 3_836_021_760,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "smollm3-3b": 3_075_098_624,
    "kimi-k2": 1_026_408_232_448,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "phi-4": 14_659_507_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
SHAPES = st.sampled_from(list_models())


@each("name", PARAMETERS)
def test_parameters_are_those_that_were_published(name: str) -> None:
    assert find_model(name).parameters == PARAMETERS[name]


def test_every_shipped_model_has_a_published_total() -> None:
    # Those counted in their class stand in test_model_configs.
    assert {s.name for s in list_models() if s.counted is None} == set(PARAMETERS)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("smollm2-135m", 23_040),
        ("qwen2.5-7b", 57_344),
        ("deepseek-v3", 61 * (512 + 64) * 2),
        ("gpt-oss-20b", 24 * 2 * 8 * 64 * 2),
    ],
)
def test_cache_bytes_of_a_token(name: str, size: int) -> None:
    assert find_model(name).kv_bytes_per_token() == size


def test_latent_attention_caches_one_head_without_its_query_heads() -> None:
    shape = find_model("deepseek-v3")
    assert shape.kv_bytes_per_token() == 70_272
    assert (shape.cache_heads, shape.latent is not None) == (1, True)


@pytest.mark.parametrize(
    ("name", "full", "window"), [("gemma-3-27b", 10, 1024), ("gemma-3-4b", 5, 1024),
                                 ("gemma-3-1b", 4, 512), ("gpt-oss-20b", 12, 128)]
)  # fmt: skip
def test_sliding_layers_hold_no_more_than_their_window(name: str, full: int, window: int) -> None:
    shape, context = find_model(name), 32768
    layer_bytes = 2 * shape.kv_heads * shape.head_dim * 2
    assert shape.windows.count(None) == full
    expected = layer_bytes * (full * context + (shape.layers - full) * window)
    assert shape.kv_bytes(context) == expected
    assert shape.kv_bytes(window) == window * shape.kv_bytes_per_token()


def test_gemma_slides_five_times_then_attends_to_everything() -> None:
    assert find_model("gemma-3-4b").windows[:7] == (1024,) * 5 + (None, 1024)
    assert find_model("gpt-oss-120b").windows[:3] == (128, None, 128)


@settings(deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 10**13))
def test_tokens_that_fit_is_the_inverse_of_the_cache_bytes(shape: Any, size: int) -> None:
    tokens = shape.tokens_that_fit(size)
    assert tokens == 0 or shape.kv_bytes(tokens) <= size
    assert tokens == 2**40 or shape.kv_bytes(tokens + 1) > size


@settings(deadline=None, derandomize=True)
@given(SHAPES, st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_longer_context_never_takes_less(shape: Any, context: int, more: int) -> None:
    assert shape.kv_bytes(context) <= shape.kv_bytes(context + more)


def test_a_mixture_multiplies_as_many_parameters_as_its_publisher_says() -> None:
    assert 3.5e9 < find_model("gpt-oss-20b").active_parameters < 3.7e9  # 3.6 B
    assert 36e9 < find_model("deepseek-v3").active_parameters < 38e9  # and 37 B


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("llama-8b", "llama-3.1-8b"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("LLAMA-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
        ("llama-70b", "llama-3.3-70b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
    ],
)
def test_names_are_found(name: str, canonical: str) -> None:
    assert find_model(name).name == canonical


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(KvtuneError, match=r"'lama-8b'.*Did you mean 'llama-8b'"):
        find_model("lama-8b")


# --- strict tables ---------------------------------------------------------------------------

RECORD = """\
source: somewhere
layers: 4
query_heads: 8
kv_heads: 2
head_dim: 16
hidden_size: 128
intermediate_size: 256
vocab_size: 1000
max_context: 2048
tied_embeddings: true
"""


def test_a_record_is_read() -> None:
    shape = shape_from_record("tiny", parse(RECORD, "tiny.yaml"))
    assert (shape.layers, shape.kv_heads, shape.windows) == (4, 2, (None,) * 4)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("layers: 4", "layer: 4", r"tiny\.yaml:2: 'layer' is no known key\. Did you mean 'layers'"),
        ("layers: 4\n", "", r"tiny\.yaml:1: the key 'layers' is missing"),
        ("layers: 4", "layers: -4", r"tiny\.yaml:2: 'layers' must be at least 1, not -4"),
        ("layers: 4", "layers: four", r"tiny\.yaml:2: 'layers' must be a whole number"),
        ("layers: 4", "layers: true", r"tiny\.yaml:2: 'layers' must be a whole number"),
        ("layers: 4", "layers: 4\nlayers: 5", r"tiny\.yaml:3: the key 'layers' stands here twice"),
        ("kv_heads: 2", "kv_heads: 3", r"tiny\.yaml:4: 'kv_heads' must divide query_heads \(8\)"),
        ("embeddings: true", "embeddings: 1", r"tiny\.yaml:10: .* must be true or false, not 1"),
        ("layers: 4", "layers: [4", r"tiny\.yaml:\d+: this is no valid YAML"),
        (RECORD, "", r"tiny\.yaml: the file is empty"),
        (RECORD, "- 1", r"tiny\.yaml:1: must be a mapping"),
    ],
)
def test_a_bad_record_is_refused_with_file_line_and_key(old: str, new: str, says: str) -> None:
    with pytest.raises(KvtuneError) as caught:
        shape_from_record("tiny", parse(RECORD.replace(old, new), "tiny.yaml"))
    assert caught.match(says)


# --- config.json -----------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def write_config(folder: Path, **changes: object) -> Path:
    values = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("name", "width"),
    [("minimax-m2.5", 128 * (48 + 8)), ("olmo-2-7b", 128 * 64), ("qwen3-vl-8b", 2 * 128)],
)
def test_counted_models_say_how_queries_and_keys_are_normalised(name: str, width: int) -> None:
    shape = find_model(name)
    assert shape.query_key_norm
    assert shape.norms_over_heads == (width > 2 * shape.head_dim)
    router = shape.experts.count * (shape.hidden_size + 1) if shape.experts else 0
    norms = 2 * shape.hidden_size + router + width  # of a layer
    assert shape.parameter_counts().small == shape.layers * norms + shape.hidden_size


def test_a_config_gives_the_same_shape_as_the_table(tmp_path: Path) -> None:
    ours, read = find_model("llama-8b"), shape_from_config(write_config(tmp_path))
    assert read.parameter_counts() == ours.parameter_counts()
    assert (read.kv_bytes(5000), read.max_context) == (ours.kv_bytes(5000), ours.max_context)
    assert shape_from_config(tmp_path / "config.json").parameters == ours.parameters


def test_a_nested_gemma_config_takes_the_defaults_of_its_class(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 34, "sliding_window": 1024}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    read, ours = shape_from_config(tmp_path), find_model("gemma-3-4b")
    assert read.windows == ours.windows
    counts = read.parameter_counts()
    assert counts.total - counts.other == ours.parameters - ours.other_parameters


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, (None,) * 4),
        (
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True,
             "max_window_layers": 3}, (None, None, None, 64),
        ),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
            (8, None, 8, None),
        ),
        ({"model_type": "qwen2_moe", "sliding_window": 0}, (None,) * 4),
    ],
)  # fmt: skip
def test_windows_of_a_config(tmp_path: Path, changes: dict[str, Any], windows: Any) -> None:
    read = shape_from_config(write_config(tmp_path, num_hidden_layers=4, **changes))
    assert read.windows == windows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": ...}, "'model_type' is missing"),
        ({"model_type": "of_its_own_code"}, "no layers are known of models of type"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be at most 1,024"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, "5 of 4"),
        ({"hidden_size": -1}, "'hidden_size' must be a whole number of at least 1, not -1"),
        ({"hidden_size": "wide"}, "'hidden_size' must be a whole number"),
        ({"num_key_value_heads": 5}, r"\(5\) must divide 'num_attention_heads' \(32\)"),
        (
            {"layer_types": ["full_attention"]},
            r"\(32\) must be equal to the number of .layer_types. \(1\)",
        ),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "bert"}, "bert is an encoder"),
    ],
)
def test_a_bad_config_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(KvtuneError, match=says) as caught:
        shape_from_config(write_config(tmp_path, **changes))
    assert caught.value.where is not None
    assert caught.value.where.endswith("config.json")


def test_a_missing_or_broken_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match="cannot read it"):
        shape_from_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(KvtuneError, match="no valid JSON"):
        shape_from_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(KvtuneError, match="JSON object"):
        shape_from_config(tmp_path)


SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 128, "head_dim": 16,
}  # fmt: skip
LATENT = {
    "head_dim": None, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "extra", "buffers"),
    [
        ("LlamaConfig", {}, 0),
        ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}, 0),
        ("MistralConfig", {}, 0),
        ("Qwen2Config", {"head_dim": None}, 0),
        ("Qwen3Config", {}, 0),
        ("Phi3Config", {"pad_token_id": 0}, 0),
        ("Gemma2Config", {}, 0),
        ("Gemma3TextConfig", {}, 0),
        ("MixtralConfig", {"num_local_experts": 4}, 0),
        (
            "Qwen3MoeConfig",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            0,
        ),
        ("GptOssConfig", {"num_local_experts": 4}, 0),
        ("DeepseekV3Config", LATENT, 3 * 8),  # the router's corrections are buffers there
    ],
)
def test_the_count_is_that_of_the_model_transformers_builds(
    tmp_path: Path, config: str, extra: dict[str, Any], buffers: int
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = {key: value for key, value in {**SMALL, **extra}.items() if value is not None}
    made = getattr(transformers, config)(**settings)
    made.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert shape_from_config(tmp_path).parameters == counted + buffers


def test_every_model_answers_to_its_hub_id() -> None:
    for shape in list_models():
        found = re.search(r"huggingface\.co/([\w.-]+/[\w.-]+)", shape.source)
        assert found, shape.name
        assert find_model(found[1]).name == shape.name


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("llama3.1:8b", "llama-3.1-8b"),
        ("llama3.1:8b-instruct-q4_K_M", "llama-3.1-8b"),
        ("phi4:14b", "phi-4"),
        ("Qwen/Qwen3-8B-AWQ", "qwen3-8b"),
        ("unsloth/Llama-3.1-8B-Instruct-GGUF", "llama-3.1-8b"),
        ("gemma3:27b-it-qat", "gemma-3-27b"),
        ("llama4:scout", "llama-4-scout"),
    ],
)
def test_names_as_people_type_them(typed: str, name: str) -> None:
    assert find_model(typed).name == name
