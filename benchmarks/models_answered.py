"""Which kinds of models kvtune answers for: tiny random ones of every kind, beside themselves.

For each kind, the model's own eager attention answers prompts, four further tokens one by one and
a second turn of five tokens at once; then a cache of ``load_cache`` does, uncompressed. The figure
is the largest difference of logits in fp32 over their standard deviation, for the prompts
(computed alike) and for what follows (read back from pages in bf16). A compressing policy and
``generate`` are then run too, with and without padding. A model is answered or refused; any other
exception is printed as a fault, and makes the script fail.

::

    python benchmarks/models_answered.py --out benchmarks/results/models-answered.json
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.traces.geometry import read_geometry

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MHA = {"num_key_value_heads": 4, "head_dim": 32}
NO_HEAD_DIM = {"head_dim": None}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
WINDOW = {"sliding_window": 16}
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
LINEAR = ["linear_attention", "full_attention"] * 2
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, no grouping": ("llama", MHA),
    "mistral, window": ("mistral", WINDOW),
    "mixtral": ("mixtral", EXPERTS),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {**WINDOW, "use_sliding_window": True, "layer_types": ALTERNATING}),
    "qwen3": ("qwen3", {}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "moe_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 64}),
    "qwen3_next": ("qwen3_next", {**EXPERTS, "layer_types": LINEAR}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", WINDOW),
    "gemma3_text": ("gemma3_text", {**WINDOW, "layer_types": ALTERNATING}),
    "gemma3n_text": (
        "gemma3n_text",
        {
            **WINDOW, "layer_types": ALTERNATING, "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            **WINDOW, "layer_types": ALTERNATING, "num_kv_shared_layers": 0,
            "num_global_key_value_heads": 1, "global_head_dim": 128, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 512,
        },
    ),
    "phi3": ("phi3", {}),
    "phi": ("phi", {"head_dim": 32}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {**WINDOW, "layer_types": ALTERNATING}),
    "gpt_neox": ("gpt_neox", MHA),
    "gpt2": ("gpt2", MHA),
    "opt": ("opt", {**MHA, "ffn_dim": 192, "word_embed_proj_dim": 128}),
    "falcon": ("falcon", NO_HEAD_DIM),
    "falcon, alibi": ("falcon", {**NO_HEAD_DIM, "alibi": True}),
    "mpt": ("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 4, "max_seq_len": 512}),
    "bloom": ("bloom", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**WINDOW, "layer_types": ALTERNATING}),
    "granite": ("granite", {"attention_multiplier": 0.05}),
    "stablelm": ("stablelm", MHA),
    "starcoder2": ("starcoder2", {}),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "llama4_text": (
        "llama4_text", {**EXPERTS, "attention_chunk_size": 8192, "intermediate_size_mlp": 192},
    ),
    "diffllama": ("diffllama", {}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, **WINDOW}),
    "nemotron": ("nemotron", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "smollm3": ("smollm3", {}),
    "exaone4": ("exaone4", {**WINDOW, "layer_types": ALTERNATING}),
    "ernie4_5": ("ernie4_5", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "seed_oss": ("seed_oss", {}),
    "jamba": ("jamba", {**EXPERTS, "use_mamba_kernels": False}),
    "mamba": ("mamba", {}),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 256}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "minimax": ("minimax", {**EXPERTS, "layer_types": LINEAR}),
    "doge": ("doge", {}),
    "t5": ("t5", {"d_model": 128, "d_kv": 32, "num_heads": 4, "num_layers": 2, "d_ff": 192}),
    "bart": ("bart", {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2}),
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What became of one kind of model.

    Args:
        model: its kind.
        outcome: ``answered``, ``refused``, ``fault``, or ``not built`` where this release of
            transformers does not make the model.
        reason: why not answered.
        prompt: largest difference of logits over their standard deviation, of prompts.
        later: the same, of tokens after them.
    """

    model: str
    outcome: str
    reason: str = ""
    prompt: float = 0.0
    later: float = 0.0


def build(kind: str, fields: dict[str, Any]) -> Any:
    """A random model of a kind, in fp32 with its own eager attention."""
    torch.manual_seed(0)
    given = {name: value for name, value in {**SMALL, **fields}.items() if value is not None}
    config = CONFIG_MAPPING[kind](**given)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def prompts(batch: int) -> dict[str, Tensor]:
    """Token ids and mask ``[B, 40]``; the second of two rows has 25 tokens, padded on the left."""
    ids = torch.randint(3, 500, (batch, 40), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[1:, :15] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def logits_of(model: Any, cache: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Logits ``[tokens, vocabulary]`` of the prompts' real tokens, and of all that follow."""
    inputs = prompts(batch)
    mask = inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp_min(0)
    prompt = model(**inputs, position_ids=places, past_key_values=cache, use_cache=True).logits
    later = []
    for count in (1, 1, 1, 1, 5):
        ids = torch.arange(7, 7 + count).expand(batch, -1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        places = (mask.cumsum(1) - 1)[:, -count:]
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache,
            use_cache=True,
        ).logits  # fmt: skip
        later.append(found.flatten(0, 1))
    return prompt[inputs["attention_mask"].bool()], torch.cat(later)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, over the standard deviation."""
    return float((ours - theirs).abs().max() / theirs.std())


def compressing(layers: int, heads: int) -> Policy:
    """Ten tokens a head in four bits; layers that slide cannot hold those, and refuse them."""
    option = Option(SnapKV(window=4, kernel=3), Budget(tokens=10), Int4(), Int4())
    return Policy.uniform(option, layers, heads)


def answered(name: str, model: Any) -> Answer:
    """Try a model; raises what kvtune does."""
    geometry = read_geometry(model)
    shape = geometry.layers, geometry.kv_heads
    full = Policy.uniform(Option(), *shape)
    load_cache(full, model).close()  # refused before anything else is asked of it
    prompt = later = 0.0
    for batch in (1, 2):
        own = logits_of(model, DynamicCache(config=model.config), batch)
        with load_cache(full, model) as cache:
            ours = logits_of(model, cache, batch)
        prompt = max(prompt, difference(ours[0], own[0]))
        later = max(later, difference(ours[1], own[1]))
        policy = full if any(geometry.windows) else compressing(*shape)
        with load_cache(policy, model) as cache:
            compressed = logits_of(model, cache, batch)
        prompt = max(prompt, difference(compressed[0], own[0]))
        with load_cache(policy, model) as cache:
            model.generate(**prompts(batch), past_key_values=cache, max_new_tokens=3)
    return Answer(name, "answered", "", prompt, later)


def tried(name: str) -> Answer:
    """What becomes of one kind of model."""
    try:
        model = build(*MODELS[name])
    except Exception as error:
        return Answer(name, "not built", _line(error))
    try:
        return answered(name, model)
    except KvtuneError as error:
        return Answer(name, "refused", error.message)
    except Exception as error:  # what this script is there to find
        return Answer(name, "fault", _line(error))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _row(found: Answer) -> str:
    if found.outcome == "answered":
        return f"{found.model:22}answered   {found.prompt:8.1e}   {found.later:8.1e}"
    return f"{found.model:22}{found.outcome:11}{found.reason}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'model':22}{'':11}{'prompt':>8}   {'later':>8}")
    found = []
    for name in asked.models:
        found.append(tried(name))
        print(_row(found[-1]), flush=True)
    if asked.out:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        report = {**versions, "models": [asdict(answer) for answer in found]}
        asked.out.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(answer.outcome == "fault" for answer in found))


if __name__ == "__main__":
    sys.exit(main())
