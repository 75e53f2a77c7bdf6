"""How likely every token is in a stack that was started from an exported file: its next tokens.

For each stack a function of the samples and of a folder with the exported file, ``None`` for the
same stack without compression. It gives the log-probabilities of the tokens after the prompt,
``[tokens, vocabulary]`` of each sample, as the stack itself computes them. OpenVINO and vLLM are in
``started_openvino.py`` and ``started_vllm.py``; here are

    transformers    the exported kv_cache.py over the stock library
    kvpress         its press, then token by token
    llama-cpp       xllamacpp, which is llama-server in process, asked for some tokens (``--every``)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
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
