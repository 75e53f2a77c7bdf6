"""What a token takes without a GPU: our pages in plain torch, the exported single file, no policy.

    python benchmarks/plain_step.py --out benchmarks/results/plain-step.json

SmolLM2-135M in bf16 on one thread, a prompt of 1024 tokens, a policy that the export can express
too. Time is the process's own CPU time, since others may use the machine; the best of a few rounds.
``--tiny`` tries the script on a random model instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvtune.common.files import write_json
from kvtune.policies.export.contract import write_export
from kvtune.policies.export.exporters.transformers import Transformers
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument
from kvtune.runtime import load_cache
from kvtune.traces.geometry import read_geometry


def model_of(tiny: bool) -> Any:
    if not tiny:
        from kvtune.traces.models import load_model

        return load_model("smollm2-135m", device="cpu").model
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads)).bfloat16().eval()


@torch.no_grad()
def seconds_a_token(model: Any, ids: torch.Tensor, cache: Any, tokens: int) -> float:
    """CPU seconds of a decode step behind the prompt."""
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    token = ids[:, -1:]
    model(input_ids=token, past_key_values=cache, use_cache=True)
    before = time.process_time()
    for _ in range(tokens):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    return (time.process_time() - before) / tokens


def exported(model: Any, policy: Policy, folder: Path) -> Any:
    geometry = read_geometry(model)
    facts = ModelFacts("model", geometry.layers, geometry.kv_heads, geometry.head_dim)
    write_export(Transformers().export(PolicyDocument(policy, facts)), folder)
    spec = importlib.util.spec_from_file_location("kv_cache", folder / "kv_cache.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = model_of(asked.tiny)
    geometry = read_geometry(model)
    option = Option(SnapKV(window=32), Budget(share=0.25), Int4(), Int4())
    policy = Policy.uniform(option, geometry.layers, geometry.kv_heads)
    ids = torch.randint(5, 90, (1, asked.prompt), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}

    def note(name: str, cache: Callable[[], Any]) -> None:
        found.setdefault(name, []).append(seconds_a_token(model, ids, cache(), asked.tokens))
        print(name, f"{1e3 * found[name][-1]:.1f} ms a token", flush=True)

    own = model.config._attn_implementation
    with tempfile.TemporaryDirectory() as place:
        module = exported(model, policy, Path(place))
        for _ in range(asked.rounds):
            note("DynamicCache", lambda: DynamicCache(config=model.config))
            with load_cache(policy, model) as cache:
                note("load_cache", lambda cache=cache: cache)
            module.apply(model)
            note("exported file", module.build_cache)
            model.set_attn_implementation(own)
    answer = {
        "cpu_seconds_a_token": {name: min(times) for name, times in found.items()},
        "rounds": found,
        "prompt": asked.prompt,
        "policy": policy.name,
        "model": "tiny" if asked.tiny else "smollm2-135m",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(answer["cpu_seconds_a_token"])
    if asked.out:
        write_json(asked.out, answer)


if __name__ == "__main__":
    main()
