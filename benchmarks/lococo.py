"""LoCoCo's kernels trained on SmolLM2, and what they gain over keeping the heaviest tokens.

    python benchmarks/lococo.py --out benchmarks/results/lococo-h200.json [--steps 150]

Kernels are trained on the search split, layer by layer, as ``kvtune.runtime.learn`` does. Then,
live on held-out prose, code and retrieval: the divergence from the full cache at several budgets
with trained kernels, with the heaviest tokens in their place, and with ``h2o``. Samples are taken
by turns until the time is up. ``--device cpu --tiny`` shows that it runs to its end.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from formats import TINY, Found

from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.lococo import LoCoCo
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime.learn import WORKLOAD, kernels
from kvtune.runtime.live import run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.learned import keep_learned
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import by_turns
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.quality import bootstrap, estimate
from kvtune.tuner.validate import union_of_needs

KINDS = ("prose", "code", "retrieval")
BUDGETS = (32, 64, 128, 256)
METHODS = {"trained": LoCoCo("convolution"), "heaviest": LoCoCo(), "h2o": H2O()}


def policies(loaded: LoadedModel) -> dict[str, Policy]:
    """Every method at every budget, alike in all heads."""
    shape = loaded.geometry.layers, loaded.geometry.kv_heads
    return {
        f"{name} {tokens}": Policy.uniform(Option(method, Budget(tokens=tokens)), *shape)
        for tokens in BUDGETS
        for name, method in METHODS.items()
    }


def live(found: Found, loaded: LoadedModel, tiny: bool) -> None:
    """Divergences, sample after sample."""
    counts = {"evaluate": dict.fromkeys(KINDS[: 1 if tiny else 3], 1 if tiny else 8)}
    length, observed = (400, 16) if tiny else (2048, 256)
    samples = build(Workload(counts, tokens=length, observed=observed), loaded.tokenizer)
    asked = policies(loaded)
    kl: dict[str, list[float]] = {name: [] for name in asked}
    kinds: list[str] = []
    for sample in by_turns(samples):
        if found.is_over():
            break
        prompt = fresh_prompt(loaded, sample, union_of_needs(list(asked.values())))
        runs = run_live(loaded, sample, prompt, list(asked.values()))
        kinds.append(sample.kind)
        for name, run in zip(asked, runs, strict=True):
            kl[name].append(float(run.kl.mean()))
        report(found, kl, kinds)


def report(found: Found, kl: dict[str, list[float]], kinds: list[str]) -> None:
    """Means, and what the trained kernels gain, paired by sample."""
    for name, values in kl.items():
        mean = estimate(values, kinds, "live")
        row = {"KL": round(mean.value, 5), "low": round(mean.low, 5), "high": round(mean.high, 5)}
        found.figures["live"][name] = row | {"samples": len(values)}
    for tokens in BUDGETS:
        gain = np.array(kl[f"heaviest {tokens}"]) - np.array(kl[f"trained {tokens}"])
        low, high = np.percentile(bootstrap(gain, kinds), [2.5, 97.5])
        found.figures["gain over the heaviest"][str(tokens)] = {
            "nats a token": round(float(gain.mean()), 5),
            "low": round(float(low), 5), "high": round(float(high), 5),
        }  # fmt: skip
    found.write()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=150, help="of training, in each layer")
    parser.add_argument("--seconds", type=float, default=120, help="after which no sample is begun")
    parser.add_argument("--tiny", action="store_true", help="two steps, one short sample")
    arguments = parser.parse_args()
    found = Found(arguments.out, arguments.seconds, "live", "gain over the heaviest", "trained")
    loaded = load_model("smollm2-135m", device=arguments.device, dtype="float32")
    workload = (
        replace(WORKLOAD, counts=TINY, tokens=400, observed=16) if arguments.tiny else WORKLOAD
    )
    samples = build(workload, loaded.tokenizer)

    def train() -> None:
        made = kernels(loaded, samples, 2 if arguments.tiny else arguments.steps)
        keep_learned(loaded.fingerprint, made)
        shares = [round(float(share), 3) for share in made["lococo_share"]]
        found.figures["trained"] = {"share of the convolution, by layer": shares}

    found.attempt("training", train)
    found.attempt("live", lambda: live(found, loaded, arguments.tiny))
    found.write()


if __name__ == "__main__":
    main()
