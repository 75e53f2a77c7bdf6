"""Whether stand-in bands hold on a model that was no source: uniform options, live.

    python benchmarks/stand_in.py MODEL --out benchmarks/results/FILE.json

runs any model that kvtune loads, on a CPU in some minutes. Samples are short enough for layers with
a window of 512 tokens. Given an earlier results file in place of MODEL, it holds those live losses
against the bands of today.
"""

from __future__ import annotations

import argparse
import json
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.common.files import write_json
from kvtune.policies.policy import Policy
from kvtune.runtime.live import run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.quality.tables import head_exchangeable
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.band import band, needed_factor
from kvtune.tuner.solver import evicts
from kvtune.tuner.source_models import packaged_calibration, packaged_tables

EACH = {"prose": 1, "code": 1, "retrieval": 1}
SAMPLES = Workload({"evaluate": EACH}, tokens=448, observed=32, needles=1)
OPTIONS = (
    "full all int4+4", "full all int4", "full all int4+4/int2+4",
    "h2o 50% int4+4", "h2o 50% int4+4/int2+4", "h2o 25% int4", "h2o 14.3% int4+4",
    "h2o 7.14% int4+4", "snapkv 25% int4+4", "snapkv 14.3% int4+4",
    "streaming_llm 50% int4+4", "streaming_llm 25% int4+4",
)  # fmt: skip
_TOGETHER = 4


def bands() -> dict[str, Any]:
    """The band of every option on the packaged source's held-out samples."""
    source = packaged_tables()[0]
    tables = head_exchangeable(source, "any", 1, 1, source.head_dim).of_split("evaluate")
    kinds = [sample.kind for sample in tables.samples]
    curves = packaged_calibration()
    return {
        option.label: band(
            tables.by_sample(np.array([number])), kinds, curves, evicts=evicts(option)
        )
        for number, option in enumerate(tables.options)
    }


def live(loaded: LoadedModel) -> dict[str, dict[str, float]]:
    """Loss of every option by kind of text, nats/token."""
    shape = (loaded.geometry.layers, loaded.geometry.kv_heads)
    known = {option.label: option for option in packaged_tables()[0].options}
    policies = [Policy.uniform(known[label], *shape) for label in OPTIONS]
    needs = reduce(or_, (policy.needs for policy in policies))
    found: dict[str, dict[str, float]] = {label: {} for label in OPTIONS}
    for sample in build(SAMPLES, loaded.tokenizer):
        prompt = fresh_prompt(loaded, sample, needs)
        for at in range(0, len(policies), _TOGETHER):
            some = policies[at : at + _TOGETHER]
            for policy, run in zip(some, run_live(loaded, sample, prompt, some), strict=True):
                found[policy.name][sample.kind] = float(run.kl.mean())
    return found


def ran(model: str, device: str) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """What the model is, and its live losses: run now, or read from an earlier file."""
    if model.endswith(".json"):
        earlier = json.loads(Path(model).read_text(encoding="utf-8"))
        kept = ("model", "fingerprint", "dtype", "no needle in the last", "samples")
        about = {name: earlier[name] for name in kept if name in earlier}
        return about, {row["option"]: row["live_by_kind"] for row in earlier["rows"]}
    loaded = load_model(model, device=device, dtype="float32")
    about = {
        "model": Path(model).stem,
        "fingerprint": loaded.fingerprint,
        "dtype": loaded.dtype,
        "no needle in the last": UNASKED_END,
        "samples": SAMPLES.describe(),
    }
    return about, live(loaded)


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="weights, or a results file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    (about, lives), expected = ran(arguments.model, arguments.device), bands()
    means = {label: float(np.mean(list(kinds.values()))) for label, kinds in lives.items()}
    rows = [
        {"option": label, "live": means[label], "live_by_kind": kinds,
         "band": [expected[label].low, expected[label].high], "source": expected[label].value,
         "needed factor": needed_factor(expected[label], means[label])}
        for label, kinds in lives.items()
    ]  # fmt: skip
    inside = sum(row["band"][0] <= row["live"] <= row["band"][1] for row in rows)
    write_json(arguments.out, {**about, "inside": inside, "rows": rows})
    print(json.dumps({"inside": inside, "of": len(rows)}))


if __name__ == "__main__":
    main()
