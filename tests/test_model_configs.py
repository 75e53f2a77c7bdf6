"""Known models of 2026 beside other sources: sizes in their names, cache bytes by hand.

The configurations are numbers out of each model's own config.json on the Hugging Face hub, as
github.com/ai-dynamo/aiconfigurator keeps them (model_configs, commit 095f58a51c4c); seven as
github.com/citsjtu2020/LLM-Prof does (sglang/Model_Config.md, commit 8434c8d19c39); GLM-4.5-Air as a
log of ms-swift prints it.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

from kvtune.profiles.model_config import shape_of
from kvtune.profiles.models import find_model, list_models
from kvtune.profiles.plain_decoder import plain_shape
from kvtune.tests.tiers import each

_FILE = resources.files("kvtune.benchmarks") / "data" / "model_configs.jsonl"
CONFIGS = [json.loads(line) for line in _FILE.read_text().splitlines()]

# Billions of parameters, and of active ones, as publishers name the model or say on its card.
PUBLISHED = {
    "llama-4-scout": (109, 17), "llama-4-maverick": (400, 17), "qwen3-coder-480b-a35b": (480, 35),
    "qwen3.5-27b": (27, None), "qwen3.5-35b-a3b": (35, 3), "qwen3.5-122b-a10b": (122, 10),
    "qwen3.5-397b-a17b": (397, 17), "qwen3.6-27b": (27, None), "qwen3.6-35b-a3b": (35, 3),
    "gemma-4-26b-a4b": (26, 4), "gemma-4-31b": (31, None), "nemotron-3-nano-30b-a3b": (31.6, 3.2),
    "nemotron-3-super-120b-a12b": (120, 12), "nemotron-3-ultra-550b-a55b": (550, 55),
    "nemotron-h-56b": (56, None), "minimax-m2.5": (229, 10), "minimax-m2.7": (229, 10),
    "mimo-7b": (7.6, None), "mimo-v2-flash": (309, 15), "qwen3-vl-2b": (2.1, None),
    "qwen3-vl-4b": (4.4, None), "qwen3-vl-8b": (8.8, None), "qwen3-vl-32b": (33.4, None),
    "qwen3-vl-30b-a3b": (31, 3), "qwen3-vl-235b-a22b": (236, 22), "mixtral-8x22b": (141, 39),
    "kimi-k2.5": (1026, 32), "deepseek-v3.2": (671, 37), "glm-5": (744, 40), "glm-5.1": (744, 40),
    "deepseek-v4-flash": (284.33, 13),  # llama.cpp issue 27680 prints 284.33 B
    "deepseek-v4-pro": (1573, 49), "glm-5.2": (743, 40), "glm-4.5-air": (106, 12),
    "glm-4.7": (355, 32), "glm-4.7-flash": (30, 3), "granite-4.0-h-small": (32, 9),
    "kimi-linear-48b-a3b": (48, 3), "ministral-3-8b": (8.4, None), "qwen3-next-80b-a3b": (80, 3),
    "gemma-4-e2b": (4.65, 2.3), "gemma-4-e4b": (7.52, 4.5),  # 5.1 and 8.0 with their towers
    "glm-4.5": (355, 32), "glm-4.6": (355, 32), "minimax-m2": (229, 10), "minimax-m1": (456, 45.9),
    "olmo-2-1b": (1.48, None), "olmo-2-7b": (7.30, None), "olmo-2-13b": (13.7, None),
    "olmo-2-32b": (32.2, None), "olmo-3-7b": (7.30, None), "olmo-3-32b": (32.2, None),
    "qwen3.5-4b": (4.21, None), "qwen3.5-9b": (8.95, None),  # 4.5 and 9.4 with their towers
    "granite-4.0-h-tiny": (7, None), "granite-4.0-h-1b": (1.5, None),
    "gemma-3n-e2b": (4.44, None),  # 5.44 B with its towers
    "gemma-3n-e4b": (6.87, None),  # 7.85 B with its towers for images and sound
}  # fmt: skip

# Bytes a token in 16 bits, by hand: layers that attend x (keys + values) x 2.
BYTES = {
    "llama-4-scout": 48 * 2 * 8 * 128 * 2,
    "llama-4-maverick": 48 * 2 * 8 * 128 * 2,
    "qwen3.5-27b": 64 // 4 * 2 * 4 * 256 * 2,
    "qwen3.5-35b-a3b": 40 // 4 * 2 * 2 * 256 * 2,
    "qwen3.5-122b-a10b": 48 // 4 * 2 * 2 * 256 * 2,
    "qwen3.5-397b-a17b": 60 // 4 * 2 * 2 * 256 * 2,
    "qwen3.6-27b": 64 // 4 * 2 * 4 * 256 * 2,
    "qwen3.6-35b-a3b": 40 // 4 * 2 * 2 * 256 * 2,
    "gemma-4-26b-a4b": 5 * 2 * 2 * 512 * 2 + 25 * 2 * 8 * 256 * 2,
    "gemma-4-31b": 10 * 2 * 4 * 512 * 2 + 50 * 2 * 16 * 256 * 2,
    "nemotron-3-nano-30b-a3b": 6 * 2 * 2 * 128 * 2,
    "nemotron-3-ultra-550b-a55b": 12 * 2 * 2 * 128 * 2,
    "nemotron-h-56b": 10 * 2 * 8 * 128 * 2,
    "minimax-m2.5": 62 * 2 * 8 * 128 * 2,
    "mimo-7b": 36 * 2 * 8 * 128 * 2,
    "qwen3-vl-8b": 36 * 2 * 8 * 128 * 2,
    "qwen3-vl-30b-a3b": 48 * 2 * 4 * 128 * 2,
    "qwen3-coder-480b-a35b": 62 * 2 * 8 * 128 * 2,
    "mixtral-8x22b": 56 * 2 * 8 * 128 * 2,
    "kimi-k2.5": 61 * (512 + 64) * 2,
    "deepseek-v3.2": 61 * (512 + 64 + 128) * 2,
    "glm-4.5-air": 46 * 2 * 8 * 128 * 2,
    "glm-4.6": 92 * 2 * 8 * 128 * 2,
    # 15 layers of their own, three of them full; 24 and four
    "gemma-4-e2b": 12 * 2 * 256 * 2 + 3 * 2 * 512 * 2,
    "gemma-4-e4b": 20 * 2 * 2 * 256 * 2 + 4 * 2 * 2 * 512 * 2,
    "gemma-3n-e2b": 20 * 2 * 2 * 256 * 2,
    "granite-4.0-h-tiny": 4 * 2 * 4 * 128 * 2,
    "minimax-m1": 80 // 8 * 2 * 8 * 128 * 2,
    "minimax-m2": 62 * 2 * 8 * 128 * 2,
    "olmo-2-13b": 40 * 2 * 40 * 128 * 2,
    "olmo-2-32b": 64 * 2 * 8 * 128 * 2,
    "olmo-3-7b": 32 * 2 * 32 * 128 * 2,
    "qwen3.5-9b": 32 // 4 * 2 * 4 * 256 * 2,
    "glm-5": 78 * (512 + 64 + 128) * 2,
    # windows of 128: 43 keys, of two layers values too; an entry every 4 or 128 tokens
    "deepseek-v4-flash": 2 * (45 * 512 + 21 * (512 + 128) // 4 + 20 * 512 // 128),
}


def counted() -> list[str]:
    return [shape.name for shape in list_models() if shape.counted is not None]


@each("name", counted())
def test_sizes_are_those_that_publishers_name(name: str) -> None:
    shape, (total, active) = find_model(name), PUBLISHED[name]
    assert shape.parameters == pytest.approx(total * 1e9, rel=0.03)
    if active is not None:
        assert shape.active_parameters == pytest.approx(active * 1e9, rel=0.25)
    assert "huggingface.co" in shape.source


@each("name", [name for name in BYTES if name in counted()])
def test_cache_bytes_are_those_counted_by_hand(name: str) -> None:
    assert find_model(name).kv_bytes_per_token() == BYTES[name]


def test_compressed_entries_grow_with_the_context_and_windows_do_not() -> None:
    shape = find_model("deepseek-v4-flash")
    one, two = shape.kv_bytes(2**16), shape.kv_bytes(2**17)
    assert two - one == 2**16 * 2 * (21 * 640 // 4 + 20 * 512 // 128)
    assert not shape.keeps_all(64)


def test_plain_models_are_what_their_configuration_says() -> None:
    read = {entry["known_as"]: plain_shape(entry["config"]) for entry in CONFIGS}
    plain = {name: shape for name, shape in read.items() if shape is not None}
    assert len(plain) == 14
    for name, shape in plain.items():
        known = find_model(name)
        assert shape.parameters == known.parameters
        assert shape.kv_bytes(100_000) == known.kv_bytes(100_000)


@pytest.mark.full
@pytest.mark.parametrize("entry", CONFIGS, ids=lambda entry: entry["hub"])
def test_known_models_are_what_their_class_says(entry: dict[str, Any]) -> None:
    if entry["known_as"] is None:
        pytest.skip("a type that transformers has no class of, or a second file of a known model")
    read, known = shape_of(entry["config"], entry["hub"], "read"), find_model(entry["known_as"])
    assert read.parameters == known.parameters
    for context in (1, 1000, 100_000):
        assert read.kv_bytes(context) == known.kv_bytes(context)
