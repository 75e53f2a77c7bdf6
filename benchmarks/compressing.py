"""What compressing prompts takes beside reading them, method by method, and what is predicted.

    python benchmarks/compressing.py --out compressing.json [--seconds 200] [--shape llama-3.1-8b]

Random weights in the shapes of SmolLM2-135M and of eight layers of Llama-3.1-8B. Prompts are read
as in service by each policy and uncompressed, in turn; the difference is what compressing takes.
A case that fails is recorded, and the next one follows; what the time does not suffice for is
named. ``--device cpu --tiny`` runs two layers of a small model, to see that the script runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvtune.common.estimate import Estimate
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import Method, find_method
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape
from kvtune.runtime import load_cache
from kvtune.runtime.graph import read_prompts
from kvtune.simulator.latency.compression import RATES, Rates, compression
from kvtune.simulator.latency.steps import prefill

METHODS = (
    "kvzip", "streaming_llm", "snapkv", "h2o", "tova", "keydiff", "expected_attention", "cake",
    "keydiff_blockwise", "keyformer",
)  # fmt: skip
REPEATS = 3


@dataclass(frozen=True)
class Case:
    """Prompts of one model.

    Args:
        shape: of the model.
        prompt_tokens: P of each.
        batch: prompts, read one after another.
    """

    shape: ModelShape
    prompt_tokens: int
    batch: int

    @property
    def name(self) -> str:
        """How results are keyed."""
        return f"{self.shape.name}, {self.shape.layers} layers, {self.batch} x {self.prompt_tokens}"


def cases(tiny: bool) -> list[Case]:
    """The cases, the shortest first."""
    small, large = find_model("smollm2-135m"), find_model("llama-3.1-8b")
    if tiny:
        return [Case(replace(small, layers=2, vocab_size=1000), 96, 2)]
    large = replace(large, layers=8, vocab_size=1000)
    return [Case(small, 2048, 8), Case(small, 8192, 8), Case(large, 8192, 4), Case(large, 32768, 1)]


class Words:
    """Stands in for a tokenizer: KVzip repeats a prompt behind a few words."""

    def __call__(self, text: str, **options: Any) -> Any:
        """Return one token id for each word of the text."""
        return SimpleNamespace(input_ids=[1 + len(word) for word in text.split()])


def random_model(shape: ModelShape, device: str) -> Any:
    """A Llama of this shape."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocab_size,
        max_position_embeddings=131072, initializer_range=0.02,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).bfloat16().eval()


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds until the device has done all of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def reading_s(policy: Policy, model: Any, prompts: Tensor, device: str) -> float:
    """The fastest of several times that the prompts are read, the first of which compiles."""
    taken = []
    for _ in range(REPEATS + 1):
        cache = load_cache(policy, model, new_tokens=64, tokenizer=Words())
        taken.append(timed(lambda cache=cache: read_prompts(model, cache, prompts), device))
    return min(taken[1:])


@cache
def policy_of(case: Case, method: Method) -> Policy:
    """A fifth of each prompt kept by this method, in four bits."""
    option = Option(method, Budget(share=0.2), Int4(), Int4())
    return Policy.uniform(option, case.shape.layers, case.shape.kv_heads)


@cache
def predicted_reading(case: Case) -> Estimate:
    """Seconds that reading the prompts uncompressed is predicted to take."""
    gpu = find_gpu("h200")
    return prefill(case.shape, gpu, "bf16", case.prompt_tokens, case.batch, "runtime")


def predicted_ms(case: Case, method: Method, rates: Rates = RATES) -> list[float]:
    """What compressing one prompt is predicted to take: the figure, its low and its high end."""
    said = compression(
        policy_of(case, method), case.shape, find_gpu("h200"), case.prompt_tokens,
        predicted_reading(case), case.batch, rates,
    )  # fmt: skip
    return [1e3 * end / case.batch for end in (said.value, said.low, said.high)]


def compared(case: Case, model: Any, method: Method, full_s: float, device: str) -> dict[str, Any]:
    """Measured and predicted, ms a prompt."""
    prompts = torch.randint(1, 1000, (case.batch, case.prompt_tokens), device=device)
    taken = reading_s(policy_of(case, method), model, prompts, device) - full_s
    return {"measured": 1e3 * taken / case.batch, "predicted": predicted_ms(case, method)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", help="only cases of this one; left out: all")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    deadline = time.monotonic() + asked.seconds
    found: dict[str, Any] = {"torch": torch.__version__, "skipped": []}
    if asked.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    for case in cases(asked.tiny):
        if asked.shape not in (None, case.shape.name):
            continue
        if time.monotonic() > deadline:
            found["skipped"].append(case.name)
            continue
        with torch.no_grad():
            found[case.name] = of_case(case, asked.device, deadline)
        asked.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


def of_case(case: Case, device: str, deadline: float) -> dict[str, Any]:
    """Every method; the model is made once."""
    model = random_model(case.shape, device)
    prompts = torch.randint(1, 1000, (case.batch, case.prompt_tokens), device=device)
    plain = Policy.uniform(Option(), case.shape.layers, case.shape.kv_heads)
    full_s = reading_s(plain, model, prompts, device)
    found: dict[str, Any] = {"shape": asdict(case)["shape"]["name"], "reading ms": 1e3 * full_s}
    for name in METHODS:
        if time.monotonic() > deadline:
            found[name] = "the time was up"
            continue
        try:
            found[name] = compared(case, model, find_method(name)(), full_s, device)
        except Exception as error:  # one method's fault is no other's
            traceback.print_exc()
            found[name] = f"{type(error).__name__}: {error}"
        print(case.name, name, found[name], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
