"""Which families of policies hold up on a model that was no source, live at equal bytes.

    python benchmarks/stand_in_families.py MODEL --out benchmarks/results/FILE.json

What a search on the packaged tables offers without the model's weights beside rules that decide at
run time from the prompt, and so need to know nothing of the model's heads: uniform ones, AdaKV, and
what has been published since. Every rule is tried in 4 and 3 bits with exact sinks and in 16 bits.
Samples are short enough for layers with a window of 512 tokens. Written after every sample.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtune.common.files import write_json
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int3, Int4
from kvtune.policies.policy import Policy
from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.baselines import FAMILIES, STRONG, candidates
from kvtune.tuner.quality import mean_over_kinds, ratio_interval
from kvtune.tuner.solver import evicts
from kvtune.tuner.source_models import all_tables, packaged_calibration
from kvtune.tuner.validate import union_of_needs

KINDS = ("prose", "code", "retrieval")
SHARES = (0.03, 0.06, 0.12, 0.18, 0.25)
TRIED = ("uniform", "adakv", "kvzip", "expected_attention", "keydiff")
FORMS = (Bf16(), Int4(exact_first=4), Int3(exact_first=4))
OFFERED = "offered"
ROWS = 18


def offered(loaded: LoadedModel, shares: tuple[float, ...]) -> list[tuple[float, str, Policy]]:
    """What a search on the packaged tables gives all heads, at every share of the bytes."""
    geometry = loaded.geometry
    shape = geometry.layers, geometry.kv_heads
    tables = all_tables(1, 1, geometry.head_dim, "any")[0]
    judging, curves = tables.of_split("select"), packaged_calibration()
    kinds = [sample.kind for sample in judging.samples]
    expected = [
        curves.mean(judging.by_sample(np.array([number])), kinds, evicts(option))
        for number, option in enumerate(tables.options)
    ]
    taken = tables.footprints(tables.prompt_tokens, geometry.head_dim) / (
        4 * geometry.head_dim * tables.prompt_tokens
    )
    found = []
    for share in shares:
        best = min(np.flatnonzero(taken <= share), key=lambda number: expected[number])
        found.append((share, OFFERED, Policy.uniform(tables.options[best], *shape)))
    return found


def entries(
    loaded: LoadedModel, prompt: int, shares: tuple[float, ...], families: tuple[str, ...]
) -> list[tuple[float, str, Policy]]:
    """Share, family and policy of all that is run."""
    geometry = loaded.geometry
    shape = prompt, geometry.layers, geometry.kv_heads, geometry.head_dim
    full = 4 * int(np.prod(shape))
    found = offered(loaded, shares)
    for share in shares:
        for family in families:
            only = {(m, form) for _, m in (FAMILIES | STRONG)[family] for form in FORMS}
            found += [
                (share, family, policy)
                for policy in candidates(family, int(share * full), *shape, only)
            ]
    return found


def losses(loaded: LoadedModel, sample: Sample, policies: list[Policy]) -> list[float]:
    """What every policy loses live on a sample, nats/token."""
    prompt = fresh_prompt(loaded, sample, union_of_needs(policies))
    full = full_cache(loaded, sample, prompt)
    found = []
    for at in range(0, len(policies), ROWS):
        some = policies[at : at + ROWS]
        found += [float(run.kl.mean()) for run in run_live(loaded, sample, prompt, some, full)]
    return found


def judged(rows: list[dict[str, Any]], kinds: list[str]) -> dict[str, Any]:
    """At every share the best of each family, over the best uniform rule; an interval with it."""
    found: dict[str, Any] = {}
    for share in dict.fromkeys(row["share"] for row in rows):
        best: dict[str, dict[str, Any]] = {}
        for row in (row for row in rows if row["share"] == share):
            loss = mean_over_kinds(row["losses"], kinds)
            if row["family"] not in best or loss < best[row["family"]]["loss"]:
                best[row["family"]] = {
                    "policy": row["policy"], "loss": loss, "losses": row["losses"]
                }  # fmt: skip
        uniform = best["uniform"]["losses"]
        for each in best.values():
            ratio, low, high = ratio_interval(each.pop("losses"), uniform, kinds)
            each |= {"times the best uniform": ratio, "interval": [low, high]}
        found[f"{100 * share:g}%"] = best
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--each", type=int, default=4, help="samples of a kind of text")
    parser.add_argument("--seconds", type=float, default=600.0, help="no sample is begun after")
    parser.add_argument("--tiny", action="store_true", help="one share, two families, one sample")
    arguments = parser.parse_args()
    started = time.monotonic()
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    each = 1 if arguments.tiny else arguments.each
    shares, families = (SHARES[2:3], TRIED[::2]) if arguments.tiny else (SHARES, TRIED)
    workload = Workload({"evaluate": dict.fromkeys(KINDS, each)}, tokens=448, observed=64)
    samples = by_turns(build(workload, loaded.tokenizer))
    everyone = entries(loaded, samples[0].prompt, shares, families)
    rows: list[dict[str, Any]] = [
        {"share": share, "family": family, "policy": policy.name, "losses": []}
        for share, family, policy in everyone
    ]
    found: dict[str, Any] = {
        "model": Path(loaded.name).name,
        "device": torch.cuda.get_device_name() if loaded.device != "cpu" else "cpu",
        "samples": workload.describe(),
        "no needle in the last": UNASKED_END,
    }
    kinds: list[str] = []
    for sample in samples:
        if time.monotonic() - started > arguments.seconds:
            found.setdefault("left out", []).append(sample.id)
            continue
        policies = [policy for _, _, policy in everyone]
        for row, loss in zip(rows, losses(loaded, sample, policies), strict=True):
            row["losses"].append(loss)
        kinds.append(sample.kind)
        if set(kinds) == set(KINDS):
            found |= {"kinds": kinds, "best": judged(rows, kinds), "rows": rows}
            write_json(arguments.out, found)
        print(f"[{time.monotonic() - started:6.1f} s] {sample.id}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
