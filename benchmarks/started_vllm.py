"""vLLM from an exported file, or under KVTUNE_POLICY, asked how likely every observed token is.

An engine runs in a process of its own, this file; the observed tokens are put in the place of those
that it samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from started_stacks import CONTEXT, Logs, Samples, said, transformers
from torch import Tensor

LOGS = "logs.safetensors"


def vllm(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """An engine in a process of its own; without compression the same file, its dtype ``auto``."""
    if folder is None:
        folder = arguments.folder
        return in_vllm(arguments, samples, ["--config", str(folder / "vllm.yaml"), *_AUTO])
    return in_vllm(arguments, samples, ["--config", str(folder / "vllm.yaml")])


_AUTO = ("--kv-cache-dtype", "auto")


def vllm_16_bits(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """The file of a plan that loses nothing, beside transformers' own next tokens in float32."""
    stack = transformers if folder is None else vllm
    return stack(arguments, samples, folder)


def vllm_plugin(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """The same with the policy itself."""
    longest = ["--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(CONTEXT)]
    words = ["--model", str(arguments.model), *longest, "--max-num-seqs", "2"]
    if folder and arguments.device == "cuda":
        words += ["--worker-cls", "kvtune.runtime.serving.vllm_0_26_worker.Worker"]
        words += ["--attention-backend", "CUSTOM"]
    return in_vllm(arguments, samples, words, folder and folder / "policy.yaml")


def in_vllm(
    arguments: argparse.Namespace,
    samples: Samples,
    words: list[str],
    policy: Path | None = None,
) -> Logs:
    """What an engine says with these words of the command line."""
    environment = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0")
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # so that it need not be there
    if arguments.device == "cpu":
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    else:
        words = [*words, "--kv-cache-memory-bytes", str(2**30)]
        if "--attention-backend" not in words:  # the one that reads 4 and 8 bits a token and head
            words += ["--attention-backend", "TRITON_ATTN"]
    if policy:
        environment["KVTUNE_POLICY"] = str(policy)
    with tempfile.TemporaryDirectory() as folder:
        asked = {"words": words, "samples": [(s.id, s.prompt, s.token_ids) for s in samples]}
        path = Path(folder, "asked.json")
        path.write_text(json.dumps(asked), "utf-8")
        command = [sys.executable, __file__, str(path)]
        subprocess.run(command, env=environment, check=True)  # noqa: S603
        found = load_file(Path(folder, LOGS))
        return [found[name] for name in sorted(found)]


def inside_vllm(path: Path) -> None:
    """The process that has the engine: each sample is a request, its answer given beforehand."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Given(LogitsProcessor):  # type: ignore[misc]
        """Writes down what was likely, and lets only the given token through."""

        tokens: list[int]
        seen: Logs

        def __init__(self, *_: Any) -> None:
            """Nothing that it is given matters."""

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            """One request at a time."""

        def apply(self, logits: Tensor) -> Tensor:
            number = len(Given.seen)
            if number < len(Given.tokens):
                Given.seen.append(logits[0].float().log_softmax(-1).cpu())
                kept = logits[0, Given.tokens[number]].clone()
                logits[0] = -torch.inf
                logits[0, Given.tokens[number]] = kept
            return logits

    asked = json.loads(path.read_text("utf-8"))
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    words = [*asked["words"], "--enforce-eager", "--no-enable-prefix-caching"]
    engine_args = EngineArgs.from_cli_args(parser.parse_args(words))
    engine_args.logits_processors = [Given]
    Given.tokens, Given.seen = [], []
    engine, found = LLMEngine.from_engine_args(engine_args), []
    for name, prompt, ids in asked["samples"]:
        # What is said after the last observed token is asked too, so that each has been read.
        Given.tokens, Given.seen = [*ids[prompt:], ids[-1]], []
        settings = SamplingParams(
            temperature=0, max_tokens=len(Given.tokens), ignore_eos=True, detokenize=False
        )
        engine.add_request(name, {"prompt_token_ids": list(ids[:prompt])}, settings)
        while engine.has_unfinished_requests():
            engine.step()
        found.append(torch.stack(Given.seen[1:]))  # the first is the prompt's own
        said(name)
    save_file(
        {f"{number:04}": each.contiguous() for number, each in enumerate(found)},
        path.with_name(LOGS),
    )


if __name__ == "__main__":
    inside_vllm(Path(sys.argv[1]))
