"""What a step of a live long generation takes of a processor, over all of its 4,096 tokens.

    python benchmarks/long_steps.py --out benchmarks/results/long-steps-cpu.json
    python benchmarks/long_steps.py --prompts 4 --out benchmarks/results/long-steps-4-cpu.json
    python benchmarks/long_steps.py --model smollm2-135m --tokens 32 --out /tmp/steps.json

Five caches read the same tokens side by side, as in ``long_plans.py``: the uncompressed one, a plan
in four bits whose heads have budgets of their own under a bound, and three rules for all heads.
``--prompts`` generate as one batch; a token is then one of each prompt.
Without ``--model`` it is a random Llama of two layers, whose losses mean nothing: what is measured
is processor time by stretch of 256 tokens, so that others on the machine do not count, that of the
model alone beside it, and the most bytes that the plan held, over its bound. What is done after
``--seconds`` is written.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtune.common.files import write_json
from kvtune.policies.formats.rotated import RotatedInt4
from kvtune.policies.methods.a2sf import PREFILL
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.runtime.generate import Generations
from kvtune.runtime.live_policies import LivePolicy
from kvtune.traces.models import LoadedModel, load_model, wrap
from kvtune.tuner.long.menu import most_bytes

INT4, RESIDUAL = RotatedInt4(), 16
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)


def random_llama() -> LoadedModel:
    """Two layers with heads of 64 and random weights; it needs no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=384, intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=8192,
    )  # fmt: skip
    return wrap(LlamaForCausalLM(config).eval(), None, name="random-llama")


def policies(loaded: LoadedModel, prompt: int, tokens: int) -> list[LivePolicy]:
    """The plan, bounded by what its heads may come to hold, and three rules for all heads."""
    layers, heads = loaded.geometry.layers, loaded.geometry.kv_heads
    everything, rng = prompt + tokens, np.random.default_rng(0)
    drawn = rng.choice([round(share * everything) for share in SHARES], layers * heads)
    options = [Option(PREFILL, Budget(tokens=int(n)), INT4, INT4) for n in drawn]
    options[0] = Option(Full(), ALL, INT4, INT4)
    rows = tuple(tuple(options[at : at + heads]) for at in range(0, len(options), heads))
    shape = prompt, tokens, RESIDUAL, loaded.geometry.head_dim
    bound = sum(most_bytes(option, *shape) for option in options)
    bound += footprint_of_lengths(layers, heads)
    share = round(everything / 16)
    rules = {
        "a2sf": Option(PREFILL, Budget(tokens=share)),
        "tova": Option(Tova(), Budget(tokens=share)),
        "a2sf in four bits": Option(PREFILL, Budget(tokens=3 * share), INT4, INT4),
    }
    return [
        LivePolicy(Policy("plan", rows), residual=RESIDUAL, limit_bytes=bound),
        *(
            LivePolicy(Policy.uniform(option, layers, heads, name=name), residual=RESIDUAL)
            for name, option in rules.items()
        ),
    ]


def model_alone(loaded: LoadedModel, rows: int) -> float:
    """Processor seconds of the model on one token of each row, without any cache."""
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    each = []
    with torch.no_grad():
        for _ in range(5):
            started = time.process_time()
            loaded.model(input_ids=ids, use_cache=False)
            each.append(time.process_time() - started)
    return float(np.median(each))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    end = time.monotonic() + arguments.seconds
    loaded = load_model(arguments.model, dtype="float32") if arguments.model else random_llama()
    prompt, tokens = arguments.prompt_tokens, arguments.tokens
    vocabulary = loaded.model.config.vocab_size
    shape = arguments.prompts, prompt + 1
    ids = np.random.default_rng(1).integers(3, vocabulary, shape).tolist()
    side_by_side = policies(loaded, prompt, tokens)
    generation = Generations(loaded, ids, side_by_side, room=tokens, temperature=1.0)
    stretches = []
    while generation.generated < tokens and time.monotonic() < end:
        first, started = generation.generated, time.process_time()
        generation.advance(min(256, tokens - first))
        spent = time.process_time() - started
        done = generation.generated - first
        stretches.append({"first": first, "tokens": done, "processor_s_a_token": spent / done})
    runs, bound = generation.runs()[0], side_by_side[0].limit_bytes
    assert bound is not None
    return {
        "model": loaded.name, "prompts": arguments.prompts, "prompt_tokens": prompt,
        "generated": generation.generated, "of": tokens,
        "caches": sum(len(layer) for layer in generation.layers),
        "model_alone_s": model_alone(loaded, len(generation.policies) * arguments.prompts),
        "stretches": stretches,
        "processor_s": sum(s["tokens"] * s["processor_s_a_token"] for s in stretches),
        "peak_over_bound": runs[0].peak_bytes / bound,
        "runs": {
            run.name: {"kl": float(run.kl.mean()), "evicted": int(run.evicted.sum())}
            for run in runs
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="left out: a random Llama of two layers")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/long-steps-cpu.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments)
    write_json(arguments.out, found)
    print(json.dumps({k: v for k, v in found.items() if k != "stretches"}, indent=1))


if __name__ == "__main__":
    main()
