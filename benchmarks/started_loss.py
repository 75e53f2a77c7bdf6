"""What stacks lose that were started from an exported file, beside the loss that is predicted.

    pip install xllamacpp kvpress       # a part whose package is missing is passed over
    python benchmarks/started_loss.py --trace DIR --model DIR --gguf FILE --out FILE [--only PART]
        [--policy FILE]

``--trace`` is what ``kvtune capture`` wrote of the model. Plans are exported and run on the trace's
held-out samples: the prompt, then the observed tokens, whose next-token distributions are held
against those of the uncompressed cache in the same stack (mean KL, nats a token, over kinds of
text). Parts, whose answers are added to the file:

    predicted       every plan replayed on these samples and calibrated, as a search does it, with
                    its interval of 80 %: what samples differ by, and left-out live runs
    transformers    the exported kv_cache.py, a plan that differs from head to head: the one that a
                    search wrote to ``--policy``, else one that is made up
    kvpress         its press, another number of tokens in every layer
    llama-cpp       xllamacpp, which is llama-server in process, q8_0 and q4_0; every ``--every``-th
                    observed token, all probabilities of the vocabulary
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from started_targets import BY_LAYER, MIXED, plan_of
from torch import Tensor

from kvtune.common.files import write_json
from kvtune.policies.export.contract import find_exporter
from kvtune.policies.formats.llama_cpp import Q4, Q8
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import PolicyDocument, write_policy
from kvtune.policies.policy_file.reader import read_policy
from kvtune.traces.samples import Sample
from kvtune.traces.trace import Trace, open_trace

LLAMA = {"q8_0": Q8, "q4_0": Q4}
SEARCHED = "as searched"
LEVEL = 0.8
Logs = Callable[[Sample], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--model", required=True, help="the traced model, as transformers loads it")
    parser.add_argument("--gguf", type=Path, help="the same weights, for llama.cpp")
    parser.add_argument("--policy", type=Path, help="that kvtune search wrote for the model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(PARTS))
    parser.add_argument("--every", type=int, default=8)
    arguments = parser.parse_args()
    trace = open_trace(arguments.trace)
    found = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    for name in [arguments.only] if arguments.only else PARTS:
        package, part = PARTS[name]
        if importlib.util.find_spec(package) is None:
            print(f"{name}: passed over, {package} is not installed", file=sys.stderr)
            continue
        print(f"{name}...", file=sys.stderr, flush=True)
        try:
            found[name] = {**found.get(name, {}), **part(arguments, trace)}
        except Exception as fault:
            traceback.print_exc()
            found[name] = {"fault": repr(fault)}
        found["within"] = within(found)
        write_json(arguments.out, found)
    print(json.dumps(found["within"], indent=1))


def plan(arguments: argparse.Namespace, name: str) -> PolicyDocument:
    """A plan by name; llama.cpp's are its own types for all keys and values."""
    if name == SEARCHED:
        return read_policy(arguments.policy)
    if name not in LLAMA:
        return plan_of(arguments, name)
    facts = plan_of(arguments, MIXED).model
    form = LLAMA[name](rotation="hadamard")
    policy = Policy.uniform(Option(Full(), ALL, form, form), facts.layers, facts.kv_heads)
    return PolicyDocument(policy, facts)


def by_head(arguments: argparse.Namespace) -> str:
    """The plan that transformers runs."""
    return SEARCHED if arguments.policy else MIXED


def predicted(arguments: argparse.Namespace, trace: Trace) -> dict[str, Any]:
    """Replayed losses as what a live run should show, and how far live runs lay from that."""
    from kvtune.simulator.quality.evaluate import replay_policies
    from kvtune.tuner.quality import calibrated
    from kvtune.tuner.source_models import packaged_calibration

    names = [by_head(arguments), BY_LAYER, *LLAMA]
    samples, curves = held_out(trace), packaged_calibration()
    policies = [plan(arguments, name).policy for name in names]
    losses = replay_policies(trace, samples, policies)
    kinds = [sample.kind for sample in samples]
    answers = {}
    for name, each in zip(names, losses, strict=True):
        evicts = name not in LLAMA
        told = calibrated(curves, each, kinds, "table", evicts=evicts, level=LEVEL)
        alone = [float(f) for f in curves.factors(kinds, evicts, LEVEL)]
        answers[name] = {
            "kl": told.value, "low": told.low, "high": told.high,
            "by_sample": [float(loss) for loss in each], "factors_of_models_alone": alone,
        }  # fmt: skip
    return answers


def held_out(trace: Trace) -> list[Sample]:
    """The samples on which a plan's loss is printed."""
    return list(trace.of_split("evaluate"))


def transformers(arguments: argparse.Namespace, trace: Trace) -> dict[str, Any]:
    """The exported module over stock transformers."""
    from transformers import AutoModelForCausalLM

    from kvtune.common.transformers_interface import cache_argument

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()

    full, stock = model(), model()
    with tempfile.TemporaryDirectory() as folder:
        document = plan(arguments, by_head(arguments))
        exported("transformers", document, arguments.model, Path(folder))
        spec = importlib.util.spec_from_file_location("kv_cache", Path(folder, "kv_cache.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.apply(stock)

        def compressed(sample: Sample) -> Tensor:
            cache, ids = module.build_cache(), torch.tensor([sample.token_ids])
            with torch.no_grad():
                for part in (ids[:, : sample.prompt], ids[:, sample.prompt :]):
                    out = stock(input_ids=part, use_cache=True, **cache_argument(stock, cache))
            return out.logits[0].float().log_softmax(-1)

        found = losses(held_out(trace), uncompressed(full), compressed)
        return {by_head(arguments): found | printed(document)}


def printed(document: PolicyDocument) -> dict[str, Any]:
    """The loss that a search printed with its plan."""
    quality = document.provenance.quality if document.provenance else None
    loss = quality.kl_nats_per_token if quality else None
    return {"printed": loss.as_dict()} if loss else {}


def uncompressed(model: Any) -> Logs:
    """One pass over all tokens."""

    def logs(sample: Sample) -> Tensor:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([sample.token_ids]))
        return out.logits[0, sample.prompt :].float().log_softmax(-1)

    return logs


def kvpress(arguments: argparse.Namespace, trace: Trace) -> dict[str, Any]:
    """The exported press over stock transformers."""
    import kvpress as presses
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()

    def compressed(sample: Sample) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:  # ratios are of a prompt's length
            document = plan(arguments, BY_LAYER)
            exported("kvpress", document, arguments.model, Path(folder), sample.prompt)
            settings = json.loads(Path(folder, "kvpress.json").read_text("utf-8"))
        press = presses.PerLayerCompressionPress(
            getattr(presses, settings["press"])(**settings["settings"]),
            settings["compression_ratios"],
        )
        ids, cache, found = torch.tensor([sample.token_ids]), DynamicCache(), []
        with torch.no_grad():
            with press(model):
                model(input_ids=ids[:, : sample.prompt], past_key_values=cache, use_cache=True)
            for at in range(sample.prompt, ids.shape[1]):  # every layer has another length
                out = model(
                    input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True,
                    position_ids=torch.tensor([[at]]), cache_position=torch.tensor([at]),
                )  # fmt: skip
                found.append(out.logits[0, -1].float().log_softmax(-1))
        return torch.stack(found)

    return {BY_LAYER: losses(held_out(trace), uncompressed(model), compressed)}


def llama_cpp(arguments: argparse.Namespace, trace: Trace) -> dict[str, Any]:
    """A server for each type of cache, asked for every next token on its own."""
    samples = held_out(trace)
    full = server_logs(arguments, samples, "f16")
    answers = {}
    for name in LLAMA:
        there = server_logs(arguments, samples, name)
        each = [divergence(one, other) for one, other in zip(full, there, strict=True)]
        answers[name] = losses_by_kind(samples, each) | {"tokens_a_sample": len(full[0])}
    return answers


def server_logs(arguments: argparse.Namespace, samples: list[Sample], kind: str) -> list[Tensor]:
    """Log-probabilities ``[tokens, vocabulary]`` of each sample."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(arguments.gguf), 2048, 1
    for role in ("cache_type_k", "cache_type_v"):
        setattr(params, role, getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}"))
    flash = "AUTO" if kind == "f16" else "ENABLED"
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
        print(f"  {kind}: {sample.id}", file=sys.stderr, flush=True)
    return found


def next_token(address: str, ids: tuple[int, ...]) -> Tensor:
    """All log-probabilities of the token after these; what was read before is taken from cache."""
    asked = {
        "prompt": ids,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": 10**6,
        "cache_prompt": True,
    }
    request = urllib.request.Request(  # noqa: S310 (our own server)
        f"{address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=900) as answer:  # noqa: S310
        (row,) = json.load(answer)["completion_probabilities"]
    found = torch.full((len(row["top_logprobs"]),), -torch.inf)
    for each in row["top_logprobs"]:
        found[each["id"]] = each["logprob"]
    return found.log_softmax(-1)


def exported(
    stack: str, document: PolicyDocument, model: str, folder: Path, context: int = 2048
) -> None:
    """The files of a stack, and the plan beside them."""
    made = find_exporter(stack)().export(document, model=model, context_tokens=context, batch=1)
    for name, text in made.files.items():
        (folder / name).write_text(text, "utf-8")
    (folder / "policy.yaml").write_text(write_policy(document), "utf-8")


def losses(samples: list[Sample], full: Logs, compressed: Logs) -> dict[str, Any]:
    """Of each sample, and their mean over kinds."""
    each = []
    for sample in samples:
        each.append(divergence(full(sample), compressed(sample)))
        print(f"  {sample.id}: {each[-1]:.4f}", file=sys.stderr, flush=True)
    return losses_by_kind(samples, each)


def losses_by_kind(samples: list[Sample], each: list[float]) -> dict[str, Any]:
    by_kind: dict[str, list[float]] = {}
    for sample, loss in zip(samples, each, strict=True):
        by_kind.setdefault(sample.kind, []).append(loss)
    means = {kind: float(np.mean(values)) for kind, values in by_kind.items()}
    return {"kl": float(np.mean(list(means.values()))), "by_kind": means}


def divergence(of: Tensor, to: Tensor) -> float:
    """Mean KL(of || to), nats a token."""
    seen = of.isfinite()
    return float(torch.where(seen, of.exp() * (of - to), 0).sum(-1).mean())


def within(found: dict[str, Any]) -> dict[str, Any]:
    """Live beside predicted, where both are there."""
    answers = {}
    for part, plans in found.items():
        for name, live in plans.items() if part in PARTS and part != "predicted" else ():
            expected = found.get("predicted", {}).get(name)
            if expected and isinstance(live, dict):
                ratio, inside = live["kl"] / expected["kl"], live["kl"] <= expected["high"]
                answers[f"{part}, {name}"] = {
                    "live": round(live["kl"], 5), "live_over_predicted": round(ratio, 3),
                    "interval": [round(expected["low"], 5), round(expected["high"], 5)],
                    "inside": bool(inside and live["kl"] >= expected["low"]),
                }  # fmt: skip
    return answers


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace, Trace], dict[str, Any]]]] = {
    "predicted": ("scipy", predicted),
    "transformers": ("transformers", transformers),
    "kvpress": ("kvpress", kvpress),
    "llama-cpp": ("xllamacpp", llama_cpp),
}

if __name__ == "__main__":
    main()
