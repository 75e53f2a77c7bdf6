"""How likely every token is in a stack that was started from an exported file: its next tokens.

For each stack a function of the samples and of a folder with the exported file, ``None`` for the
same stack without compression. It gives the log-probabilities of the tokens after the prompt,
``[tokens, vocabulary]`` of each sample, as the stack itself computes them:

    transformers    the exported kv_cache.py over the stock library
    kvpress         its press, then token by token
    llama-cpp       xllamacpp, which is llama-server in process, asked for some tokens (``--every``)
    openvino        the runtime under OpenVINO GenAI: the model that GenAI makes of the GGUF file,
                    with paged attention, its prompt in chunks of GenAI's default, then by token
    vllm            vLLM from vllm.yaml, the observed tokens put in the place of those it samples
    vllm-plugin     vLLM under KVTUNE_POLICY, likewise
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTEXT = 2048


@dataclass(frozen=True)
class Observed:
    """Tokens of a text; those after the prompt are looked at."""

    id: str
    kind: str
    prompt: int
    token_ids: list[int]


Logs = list[Tensor]
Samples = list[Observed]
Stack = Callable[[argparse.Namespace, Samples, Path | None], Logs]


def said(text: str) -> None:
    """On the way, to the error channel."""
    print(f"  {text}", file=sys.stderr, flush=True)


def transformers(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """The exported module, or no cache of ours."""
    from transformers import AutoModelForCausalLM

    from kvtune.common.transformers_interface import cache_argument

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if folder is None:
        return [at_once(model, sample) for sample in samples]
    spec = importlib.util.spec_from_file_location("kv_cache", folder / "kv_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.apply(model)

    def compressed(sample: Observed) -> Tensor:
        cache, ids = module.build_cache(), torch.tensor([sample.token_ids])
        with torch.no_grad():
            for part in (ids[:, : sample.prompt], ids[:, sample.prompt :]):
                out = model(input_ids=part, use_cache=True, **cache_argument(model, cache))
        return out.logits[0].float().log_softmax(-1)

    return [compressed(sample) for sample in samples]


def at_once(model: Any, sample: Observed) -> Tensor:
    """One pass over all tokens."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([sample.token_ids]))
    return out.logits[0, sample.prompt :].float().log_softmax(-1)


def kvpress(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """The exported press over stock transformers."""
    import kvpress as presses
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    if folder is None:
        return [at_once(model, sample) for sample in samples]
    told = json.loads((folder / "kvpress.json").read_text("utf-8"))
    press = presses.PerLayerCompressionPress(
        getattr(presses, told["press"])(**told["settings"]), told["compression_ratios"]
    )

    def compressed(sample: Observed) -> Tensor:
        ids, cache, found = torch.tensor([sample.token_ids]), DynamicCache(), []
        with torch.no_grad():
            with press(model):
                model(
                    input_ids=ids[:, : sample.prompt], past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
            for at in range(sample.prompt, ids.shape[1]):  # every layer has another length
                out = model(
                    input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True,
                    position_ids=torch.tensor([[at]]), cache_position=torch.tensor([at]),
                )  # fmt: skip
                found.append(out.logits[0, -1].float().log_softmax(-1))
        said(sample.id)
        return torch.stack(found)

    return [compressed(sample) for sample in samples]


def llama_cpp(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """A server with the preset's types, or in 16 bits; one question for each observed token."""
    import configparser

    import xllamacpp

    preset = configparser.ConfigParser()
    if folder:
        preset.read_string("[top]\n" + (folder / "llama-preset.ini").read_text("utf-8"))
    asked = dict(preset["kvtune"]) if folder else {}
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(arguments.gguf), CONTEXT, 1
    for key, role in (("cache-type-k", "cache_type_k"), ("cache-type-v", "cache_type_v")):
        kind = f"GGML_TYPE_{asked.get(key, 'f16').upper()}"
        setattr(params, role, getattr(xllamacpp.ggml_type, kind))
    flash = {"auto": "AUTO", "on": "ENABLED"}[asked.get("flash-attn", "auto")]
    params.flash_attn_type = getattr(
        xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}"
    )
    params.fit_params, params.port = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # threads spin while waiting
    server, found = xllamacpp.Server(params), []
    for sample in samples:
        ends = range(sample.prompt + 1, len(sample.token_ids) + 1, arguments.every)
        rows = [next_token(server.listening_address, sample.token_ids[:end]) for end in ends]
        found.append(torch.stack(rows))
        said(sample.id)
    return found


def next_token(address: str, ids: list[int]) -> Tensor:
    """All log-probabilities of the token after these; what was read before is taken from cache."""
    asked = {
        "prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 10**6, "cache_prompt": True,
    }  # fmt: skip
    request = urllib.request.Request(  # noqa: S310 (our own server)
        f"{address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=900) as answer:  # noqa: S310
        (row,) = json.load(answer)["completion_probabilities"]
    found = torch.full((len(row["top_logprobs"]),), -torch.inf)
    for each in row["top_logprobs"]:
        found[each["id"]] = each["logprob"]
    return found.log_softmax(-1)


def openvino(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """Precision of the cache as the file says it, else 16 bits."""
    import openvino as runtime
    from openvino._offline_transformations import paged_attention_transformation

    properties = {"KV_CACHE_PRECISION": "f16"}
    if folder:
        text = (folder / "openvino.json").read_text("utf-8")
        told = json.loads("\n".join(x for x in text.splitlines() if not x.startswith("#")))
        properties = told["properties"]
    core = runtime.Core()
    model = core.read_model(converted(arguments.gguf))
    paged_attention_transformation(model)
    compiled = core.compile_model(model, "CPU", properties)
    return [paged_answers(runtime, compiled, sample) for sample in samples]


OPENVINO_PAGE, OPENVINO_CHUNK = 32, 256


def converted(gguf: Path) -> Path:
    """The model that OpenVINO GenAI makes of a GGUF file, which it writes beside it when asked."""
    import openvino_genai

    folder = Path(tempfile.mkdtemp())
    (folder / gguf.name).symlink_to(gguf.resolve())
    settings = openvino_genai.SchedulerConfig()
    settings.num_kv_blocks = 8
    openvino_genai.LLMPipeline(
        str(folder / gguf.name), "CPU", scheduler_config=settings, enable_save_ov_model=True
    )
    return folder / "openvino_model.xml"


def paged_answers(runtime: Any, compiled: Any, sample: Observed) -> Tensor:
    """One sequence in pages of its own."""
    import numpy as np

    request, ids = compiled.create_infer_request(), sample.token_ids
    pages = -(-len(ids) // OPENVINO_PAGE)
    for port in compiled.inputs:
        if "cache" in port.any_name:
            shape = [pages, *(each.get_length() for each in list(port.partial_shape)[1:])]
            request.set_tensor(port, runtime.Tensor(port.element_type, runtime.Shape(shape)))

    def step(start: int, stop: int) -> Tensor:
        held, small = -(-stop // OPENVINO_PAGE), np.int32
        given = {
            "input_ids": np.array(ids[start:stop], np.int64),
            "position_ids": np.arange(start, stop), "max_context_len": np.array(stop, small),
            "past_lens": np.array([start], small),
            "subsequence_begins": np.array([0, stop - start], small),
            "block_indices_begins": np.array([0, held], small),
            "block_indices": np.arange(held, dtype=small),
        }  # fmt: skip
        for name, value in given.items():
            request.set_tensor(name, runtime.Tensor(value))
        request.infer()
        logits = request.get_output_tensor(0).data.reshape(stop - start, -1)
        return torch.from_numpy(logits[-1].copy()).float().log_softmax(-1)

    for start in range(0, sample.prompt, OPENVINO_CHUNK):
        step(start, min(start + OPENVINO_CHUNK, sample.prompt))
    found = torch.stack([step(at, at + 1) for at in range(sample.prompt, len(ids))])
    said(sample.id)
    return found


def vllm(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """An engine in a process of its own; without compression the same file, its dtype ``auto``."""
    if folder is None:
        folder = arguments.folder
        return in_vllm(arguments, samples, ["--config", str(folder / "vllm.yaml"), *_AUTO])
    return in_vllm(arguments, samples, ["--config", str(folder / "vllm.yaml")])


_AUTO = ("--kv-cache-dtype", "auto")


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
    if policy:
        environment["KVTUNE_POLICY"] = str(policy)
    with tempfile.TemporaryDirectory() as folder:
        asked = {"words": words, "samples": [(s.id, s.prompt, s.token_ids) for s in samples]}
        path = Path(folder, "asked.json")
        path.write_text(json.dumps(asked), "utf-8")
        command = [sys.executable, __file__, str(path)]
        subprocess.run(command, env=environment, check=True)  # noqa: S603
        return list(torch.load(Path(folder, "logs.pt"), weights_only=True))


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
    torch.save(found, path.with_name("logs.pt"))


STACKS: dict[str, tuple[str, Stack]] = {
    "transformers": ("transformers", transformers),
    "kvpress": ("kvpress", kvpress),
    "llama-cpp": ("xllamacpp", llama_cpp),
    "openvino": ("openvino_genai", openvino),
    "vllm": ("vllm", vllm),
    "vllm-plugin": ("vllm", vllm_plugin),
}
"""By name, with the package that must be installed."""

if __name__ == "__main__":
    inside_vllm(Path(sys.argv[1]))
