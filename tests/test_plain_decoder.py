"""Plain decoders: what is told without their class is what the class itself says, or nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtune.profiles.model_class import ClassFacts, build_facts, facts_of
from kvtune.profiles.plain_decoder import plain_shape

BASE: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 320,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "hidden_act": "silu", "head_dim": 16, "sliding_window": None,
}  # fmt: skip

CONFIGS = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
        "num_hidden_layers": st.integers(1, 3),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([8, 16, 32]),
        "intermediate_size": st.sampled_from([32, 96]),
        "tie_word_embeddings": st.booleans(),
        "sliding_window": st.sampled_from([None, 7, 128]),
    }
)


def said_by_class(config: dict[str, Any]) -> ClassFacts:
    return build_facts(config, "config.json")


@settings(
    deadline=None, derandomize=True, max_examples=8,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(CONFIGS)
def test_plain_decoders_are_what_their_class_says(changes: dict[str, Any]) -> None:
    config = {**BASE, **changes}
    plain = plain_shape(config)
    if plain is None:  # a Llama has no window; what one would mean is the class's to say
        assert (config["model_type"], bool(config["sliding_window"])) == ("llama", True)
        return
    theirs = said_by_class(config)
    assert plain.layer_caches == theirs.layers
    assert plain.tied_embeddings == theirs.tied
    assert plain.parameters == theirs.counts.total
    ours, counts = plain.parameter_counts(), theirs.counts
    assert (ours.embedding, ours.head, ours.attention, ours.feed_forward, ours.small) == (
        counts.embedding, counts.head, counts.attention, counts.feed_forward, counts.small,
    )  # fmt: skip
    theirs = replace(theirs, counts=ours)
    assert facts_of(config, "config.json") == theirs


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma3"}, {"attention_bias": True}, {"mlp_bias": True},
        {"num_key_value_heads": None}, {"hidden_size": 63, "head_dim": None},
        {"model_type": "qwen3", "head_dim": None}, {"tie_word_embeddings": None},
        {"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 4096}, {"num_local_experts": 4}, {"vocab_size": 0}, {"vocab_size": True},
        {"model_type": "mistral", "sliding_window": "x"}, {"partial_rotary_factor": 0.5},
    ],
)  # fmt: skip
def test_whatever_else_is_there_is_left_to_the_class(changes: dict[str, Any]) -> None:
    assert plain_shape({**BASE, **changes}) is None


def test_a_mistral_that_does_not_speak_of_its_window_slides_as_its_class_does() -> None:
    unsaid = {k: v for k, v in BASE.items() if k != "sliding_window"} | {"model_type": "mistral"}
    assert plain_shape(unsaid) is None
    assert {layer.window for layer in said_by_class(unsaid).layers} == {4096}


def test_an_estimate_of_a_plain_folder_loads_no_torch(tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(BASE))
    code = (
        "import sys; from kvtune.profiles.models import shape_from_config as s; "
        f"s({str(tmp_path)!r}); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert run.stdout.split() == ["False", "False"]
