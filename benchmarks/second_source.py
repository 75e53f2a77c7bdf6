"""Packs a model as a source of stand-in bands from prompts that its sliding layers see whole.

    python benchmarks/second_source.py gemma-3-270m-q4_k_m.gguf --name gemma-3-270m --out FILE

Layers with a window of 512 tokens attend to everything in samples this short, so that all layers
can be compressed. On a CPU it takes some minutes for a model of 270 M parameters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvtune.common.progress import Bars
from kvtune.policies.signals import Needs
from kvtune.traces.capture import capture
from kvtune.traces.models import load_model
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.options import FULL
from kvtune.tuner.source_models import pack
from kvtune.tuner.sources import queries_of, signals_of

KINDS = ("prose", "code", "retrieval")
WORKLOAD = Workload(
    {"select": dict.fromkeys(KINDS, 1), "evaluate": dict.fromkeys(KINDS, 2)},
    tokens=448,
    observed=64,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", required=True, help="of the source, as answers will show it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/second-source"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--probes", type=int, default=8)
    arguments = parser.parse_args()
    progress = Bars()
    loaded = load_model(
        arguments.model, device=arguments.device, dtype="float32", progress=progress
    )
    needs = FULL.needs | Needs(column_sums=True)
    trace = capture(
        loaded,
        build(WORKLOAD, loaded.tokenizer),
        arguments.scratch / arguments.name,
        probes=arguments.probes,
        workload_description=WORKLOAD.describe(),
        signals=signals_of(needs),
        queries=queries_of(needs, WORKLOAD.observed),
        progress=progress,
    )
    print(pack(trace, arguments.name, arguments.out, arguments.device, progress))


if __name__ == "__main__":
    main()
