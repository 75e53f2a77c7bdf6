"""Whether a CPU's instructions for 16-bit numbers may answer for float32, and what they would save.

    python benchmarks/cpu_precision.py --out benchmarks/results/cpu-precision.json

SmolLM2 on one thread, one held-out sample, three ways: all in float32; float32 whose products torch
may compute from 16-bit numbers (``set_float32_matmul_precision("medium")``, of all products of the
process); all in bfloat16. Of each the processor seconds of a prompt, of an observed pass with four
probes and of live runs, how far the uncompressed cache lies from itself between a batch and alone,
and what policies lose that lose little. Each way is written as it ends.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from capture_replay import timed

from kvtune.common.files import write_json
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime.live import full_cache, run_beside_full
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.capture import observe
from kvtune.traces.models import load_model
from kvtune.traces.passes import prompt_cache
from kvtune.traces.probes import Probes
from kvtune.traces.workloads import build, small
from kvtune.tuner.validate import union_of_needs

WAYS = (("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest"))


def policies(layers: int, heads: int) -> list[Policy]:
    """Rules for all heads, those that lose least first."""
    forms = Bf16(), Int4(exact_first=4)
    options = [Option(Full(), ALL, form, form) for form in (Int8(), forms[1])]
    options += [
        Option(method, Budget(share=share), form, form)
        for share in (0.75, 0.5, 0.125)
        for method in (H2O(), SnapKV())
        for form in forms
    ]
    return [Policy.uniform(option, layers, heads) for option in options]


@contextmanager
def products(precision: str) -> Iterator[None]:
    """How torch multiplies matrices of float32 for the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measured(dtype: str, precision: str, times: int) -> dict[str, Any]:
    loaded = load_model("smollm2-135m", dtype=dtype)
    sample = next(s for s in build(small(), loaded.tokenizer) if s.split == "evaluate")
    tried = policies(loaded.geometry.layers, loaded.geometry.kv_heads)
    with products(precision):
        token_ids = sample.token_ids[: sample.prompt]
        cache, prompt_s = timed(times, lambda: prompt_cache(loaded, token_ids))
        _, observe_s = timed(times, lambda: observe(loaded, sample, cache, Probes(4)))
        prompt = fresh_prompt(loaded, sample, union_of_needs(tried))
        (full, runs), live_s = timed(times, lambda: run_beside_full(loaded, sample, prompt, tried))
        alone = full_cache(loaded, sample, prompt)
    seconds = {"prompt": prompt_s, "observed": observe_s, "live": live_s}
    return {
        "dtype": dtype,
        "products": precision,
        "processor seconds": {name: round(value, 2) for name, value in seconds.items()},
        "uncompressed from itself": float((full.exp() * (full - alone)).sum(-1).mean()),
        "losses": {
            policy.name: float(run.kl.mean()) for policy, run in zip(tried, runs, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, one thread",
        "16-bit products": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "ways": [],
    }
    for dtype, precision in WAYS:
        found["ways"].append(measured(dtype, precision, arguments.times))
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
