"""A batched run of kvtune's own runtime beside what the serving simulation predicts of it.

All requests are there at the start and are alike, so that continuous batching comes to one batch
after another: each is read at once and decodes to its end. The runtime does that, prompts together
and steps as a CUDA graph, and the simulation is given the same requests, batch and memory.

python benchmarks/serve_sim_live.py --gpu h200 --model llama-8b --batch 16 --out FILE
python benchmarks/serve_sim_live.py --tiny    # any machine; shows that it runs, predicts nothing
python benchmarks/serve_sim_live.py --again results/serve-sim-live-h200.json    # predict it anew
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtune.common.files import write_json
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import read_policy
from kvtune.profiles.gpus import detect_gpu, find_gpu
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.fuse import fused_on_gpu
from kvtune.runtime.graph import DecodeLoop
from kvtune.simulator.serving.engine import serve
from kvtune.simulator.serving.report import Goals
from kvtune.simulator.serving.requests import Requests
from kvtune.simulator.serving.server import server
from kvtune.simulator.serving.step import Limits
from kvtune.simulator.serving.times import prepare

UNTIMED = 3  # the first token, and two in the open before the graph is captured


class Batch(NamedTuple):
    """Seconds of one batch: reading its prompts, and one decode step of it on average."""

    read_s: float
    step_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", help="as kvtune gpus lists it; left out: this machine's")
    parser.add_argument("--model", default="llama-8b", help="whose shape is given random weights")
    parser.add_argument("--policy", type=Path, help="left out: the uncompressed cache")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--again", type=Path, help="a result whose measured run is predicted anew")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.again:
        predict_again(arguments.again)
        return
    if arguments.tiny:
        arguments.model, arguments.gpu = "smollm2-135m", arguments.gpu or "h100"
        arguments.batch, arguments.batches, arguments.prompt, arguments.output = 2, 2, 96, 8
    shape = find_model(arguments.model)
    if arguments.tiny:
        shape = dataclasses.replace(shape, layers=2, windows=(None, None), vocab_size=1000)
    found = {
        **{
            key: str(value) for key, value in vars(arguments).items() if key not in ("out", "again")
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **compare(shape, arguments),
    }
    if arguments.out:
        write_json(arguments.out, found)
    print(json.dumps(found, indent=2))


def compare(shape: ModelShape, asked: argparse.Namespace) -> dict[str, Any]:
    """Throughput and time a token: measured, predicted, and how far the latter is off."""
    bound = (shape.layers, shape.kv_heads)
    policy = read_policy(asked.policy).bind(*bound) if asked.policy else None
    batches = run_batches(shape, policy, asked)
    step = float(np.median([batch.step_s for batch in batches]))
    seconds = sum(batch.read_s + (asked.output - 1) * batch.step_s for batch in batches)
    measured = {
        "tokens_per_second": len(batches) * asked.batch * asked.output / seconds,
        "tpot_p50": step,
        "read_s": float(np.median([batch.read_s for batch in batches])),
    }
    return beside(measured, predict(shape, policy, asked))


def beside(measured: dict[str, float], predicted: dict[str, Any]) -> dict[str, Any]:
    """Both, and how far the latter is off."""
    errors = {key: predicted[key]["value"] / measured[key] - 1 for key in predicted}
    return {"measured": measured, "predicted": predicted, "predicted_over_measured": errors}


def predict_again(path: Path) -> None:
    """Write a result anew with what is predicted of its run today; nothing is run."""
    known = json.loads(path.read_text(encoding="utf-8"))
    numbers = {key: int(known[key]) for key in ("batch", "batches", "prompt", "output")}
    gpu = known["device"].removeprefix("NVIDIA ").lower()
    asked = argparse.Namespace(gpu=gpu, **numbers)
    predicted = predict(find_model(known["model"]), None, asked)
    write_json(path, known | beside(known["measured"], predicted))
    print(path.name, json.dumps(beside(known["measured"], predicted)["predicted_over_measured"]))


def run_batches(shape: ModelShape, policy: Policy | None, asked: argparse.Namespace) -> list[Batch]:
    """Every batch of random prompts through the runtime; one before them compiles."""
    model = random_model(shape, asked.prompt + asked.output)
    plan = policy or Policy.uniform(Option(), shape.layers, shape.kv_heads, name="uncompressed")
    torch.manual_seed(0)
    return [run_batch(model, plan, shape, asked) for _ in range(1 + asked.batches)][1:]


@torch.no_grad()
def run_batch(model: Any, policy: Policy, shape: ModelShape, asked: argparse.Namespace) -> Batch:
    prompts = torch.randint(1, shape.vocab_size, (asked.batch, asked.prompt), device=model.device)
    places = torch.arange(asked.prompt, device=model.device).expand_as(prompts)
    cache = load_cache(policy, model, new_tokens=asked.output)
    begin = now()
    with fused_on_gpu(model):
        logits = model(
            input_ids=prompts, position_ids=places, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
    read_s = now() - begin
    loop = DecodeLoop(model, cache, logits.argmax(-1), places[:, -1] + 1, asked.output)
    with loop.ready():
        steps = asked.output - UNTIMED
        begin = now()
        loop.advance(steps)
        return Batch(read_s, (now() - begin) / steps)


def now() -> float:
    """Seconds, after all that was launched is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def random_model(shape: ModelShape, context: int) -> Any:
    """Llama's own code with random weights in the shape: bf16 on a GPU, float32 elsewhere."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab_size, tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=2 * context,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    try:
        with torch.device("cuda" if on_gpu else "cpu"):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(standard)


def predict(
    shape: ModelShape, policy: Policy | None, asked: argparse.Namespace
) -> dict[str, dict[str, object]]:
    """The simulation of the same requests: all there at once, a step reads a whole batch."""
    gpu = find_gpu(asked.gpu) if asked.gpu else detect_gpu()
    if gpu is None:
        raise SystemExit("no GPU was found; name one with --gpu")
    count = asked.batch * asked.batches
    requests = Requests(
        np.zeros(count),
        np.full(count, asked.prompt),
        np.full(count, asked.output),
        source="all at once",
    )
    limits = Limits(asked.batch, asked.batch * asked.prompt)
    serving = server(shape, gpu, gpu.visible_bytes, "bf16", limits)
    figures = serve(prepare(serving, requests, policy), requests, Goals()).figures
    return {key: figures[key].as_dict() for key in ("tokens_per_second", "tpot_p50")}


if __name__ == "__main__":
    main()
