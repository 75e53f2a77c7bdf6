"""Configurations of models that bring code of their own."""

from __future__ import annotations

from typing import Any

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.profiles.model_config import shape_of

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2,
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512,
}  # fmt: skip
MAP = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


def test_a_class_of_its_own_is_never_counted_as_its_types() -> None:
    mine = {**LLAMA, "architectures": ["MineForCausalLM"], "auto_map": MAP}
    with pytest.raises(KvtuneError, match="MineForCausalLM comes with the model's own code"):
        shape_of(mine, "config.json", "mine")


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "auto_map": MAP},  # transformers has the class; the code is a copy
        {**LLAMA, "architectures": ["MineForCausalLM"]},  # nothing is brought
        {**LLAMA, "model_type": "yi", "architectures": ["YiForCausalLM"], "auto_map": MAP},
    ],
)
def test_known_layers_are_counted(config: dict[str, Any]) -> None:
    assert shape_of(config, "config.json", "m").kv_bytes_per_token() == 2 * 2 * 2 * 16 * 2


@pytest.mark.parametrize("classes", [True, 7, "LlamaForCausalLM", {"a": 1}, [3], [["x"]]])
def test_classes_that_are_no_list_of_names_are_refused(classes: object) -> None:
    with pytest.raises(KvtuneError, match="must be a list of class names") as caught:
        shape_of({**LLAMA, "architectures": classes}, "config.json", "m")
    assert caught.value.where == "config.json"
