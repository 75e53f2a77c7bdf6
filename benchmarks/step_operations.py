"""Tensor operations of a decode step in pages: what a step costs a GPU's host, counted on a CPU.

    python benchmarks/step_operations.py --out benchmarks/results/step-operations-cpu.json

SmolLM2's shape with few layers and random weights, a prompt of 256 tokens, one sequence. Of every
reader that chooses no pages, of policies that evict from pages, and of formats that are read back:
operations of a step and a layer, without those of the pages' kernels (on a GPU a launch or two
each) and without those of the uncompressed model; the first step, which makes indices, and the mean
of the next ones. An operation is a kernel's launch on a GPU, or the look at one: mostly 5 to 10
microseconds of its host. ``waits`` are those for which the host waits for the device: beside other
processes each may take a turn of theirs.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from readers_paged import options
from torch.utils._python_dispatch import TorchDispatchMode

from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.kvquant import KvQuant
from kvtune.policies.formats.qaq import Qaq
from kvtune.policies.formats.rotated import RotatedInt3, RotatedInt4
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.cache.plain_backend import PlainBackend

LAYERS, HEADS, GROUP, HEAD_DIM = 2, 3, 3, 64
PROMPT, STEPS, RESIDUAL = 256, 17, 16
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim")
KERNELS = ("write", "append", "append_rotated", "move", "attend", "fetch", "copy_tokens")


class Counter(TorchDispatchMode):
    """Counts operations, but those of the pages' kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits, self.inside = 0, 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        if not self.inside:
            self.count += 1
            self.waits += function._schema.name in WAITS
        return function(*given, **(named or {}))


@contextmanager
def counting() -> Iterator[Counter]:
    """Operations from here on; kernels' own are not counted."""
    counter, kept = Counter(), {name: getattr(PlainBackend, name) for name in KERNELS}

    def aside(name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            counter.inside += 1
            try:
                return kept[name](*given, **named)
            finally:
                counter.inside -= 1

        return call

    for name in KERNELS:
        setattr(PlainBackend, name, aside(name))
    try:
        with counter:
            yield counter
    finally:
        for name, method in kept.items():
            setattr(PlainBackend, name, method)


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = HEADS * GROUP * HEAD_DIM
    config = LlamaConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=LAYERS, vocab_size=64,
        num_attention_heads=HEADS * GROUP, num_key_value_heads=HEADS, head_dim=HEAD_DIM,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def steps(network: Any, policy: Policy, **read: Any) -> list[tuple[int, int]]:
    """Operations and waits of each step."""
    ids = torch.randint(1, 60, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    found = []
    with load_cache(policy, network, new_tokens=STEPS, **read) as cache:
        network(ids, past_key_values=cache)
        for step in range(STEPS):
            with counting() as counter:
                network(ids[:, step : step + 1], past_key_values=cache)
            found.append((counter.count, counter.waits))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    network = model()

    def counted(option: Option, **read: Any) -> list[tuple[int, int]]:
        return steps(network, Policy.uniform(option, LAYERS, HEADS), **read)

    cases: dict[str, tuple[Option, dict[str, Any]]] = {}
    for option in options():
        if not option.method.needs.sentences:  # which asks for a tokenizer
            cases[option.label] = option, {}
    evicting = Option(Tova(unit="kv_head"), Budget(tokens=PROMPT - 8))
    for form, residual in (
        (RotatedInt4(), RESIDUAL), (RotatedInt3(), RESIDUAL), (Int4(keys_by="token"), None),
    ):  # fmt: skip
        coded = replace(evicting, keys=form, values=form)
        name = f"evicts in {form.label}, window {residual or 0}"
        cases[name] = coded, {"evicts": True, "residual": residual}
    cases["evicts in bf16"] = evicting, {"evicts": True}
    heavy = replace(evicting, method=H2O())
    cases["evicts in bf16, h2o"] = heavy, {"evicts": True}
    for form in (Kivi(), Kitty(), KvQuant(), Qaq(), Gear()):
        cases[f"read back: {form.label}"] = Option(budget=ALL, keys=form, values=form), {}
    (base, waits), *_ = reversed(counted(Option()))
    out: dict[str, Any] = {"the model alone, a layer": base / LAYERS}
    for name, (option, read) in cases.items():
        if arguments.only in name:
            found = counted(option, **read)
            later = sum(count for count, _ in found[1:]) / len(found[1:])
            out[name] = {
                "first step": round((found[0][0] - base) / LAYERS, 1),
                "later steps": round((later - base) / LAYERS, 1),
                "last step": round((found[-1][0] - base) / LAYERS, 1),
                "waits of the last step": round((found[-1][1] - waits) / LAYERS, 1),
            }
            print(name, out[name], flush=True)
    arguments.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
