"""Latent attention put together from its kernels beside whole layers of it, as measured elsewhere.

    python -m kvtune.benchmarks.latent_parts --out benchmarks/results/latent-parts.json

TensorRT-LLM's tables in ``aiconfigurator-core`` have both: the kernel with the products that go
with it, and a layer's whole attention, projections included. Stacks without the second (SGLang)
are answered by the first; here the first is held against the second, over cards, heads, batches
and lengths. No row of the tables is written.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.benchmarks.hardware_runs import summary
from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import SYSTEM_OF_CARD, require_systems_folder
from kvtune.profiles.models import find_model
from kvtune.profiles.stack_kernels.attention import Kind
from kvtune.profiles.stack_kernels.latent import LatentCall
from kvtune.profiles.stack_kernels.tables import ServingTables
from kvtune.simulator.latency.serving_kernels import ServingModel
from kvtune.simulator.latency.stack_overheads import Overheads

MODEL = "deepseek-v3"
POINTS: dict[Kind, tuple[tuple[int, int], ...]] = {
    "generation": ((1, 1024), (8, 4096), (64, 4096), (256, 1024), (8, 32768)),
    "context": ((1, 1024), (1, 4096), (1, 16384), (8, 1024)),
}
"""Sequences and tokens of each."""


def ratios(folder: Path, system: str, kind: Kind) -> list[float]:
    """Parts over the whole layer; nothing where a card was not measured in both ways."""
    tables, found = ServingTables(folder, system, "trtllm"), []
    for form, gpus, (batch, tokens) in product(("bfloat16", "fp8_block"), (1, 8), POINTS[kind]):
        model = ServingModel(
            tables, find_model(MODEL), gpus, form, form, "bfloat16", 1e12, Overheads()
        )
        heads = model.shape.query_heads // gpus
        rows = np.array(float(batch if kind == "generation" else batch * tokens))
        try:
            whole = tables.latent_attention(
                LatentCall(kind, heads, "bfloat16", form), batch, tokens
            )
            kernel = tables.latent_attention(
                LatentCall(kind, heads, "bfloat16", None), batch, tokens
            )
            found.append(float((kernel + model.attention_matrices(rows)) / whole))
        except KvtuneError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=Path, help="left out: the installed wheel's")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = given.systems or require_systems_folder()
    report: dict[str, Any] = {"tables": "aiconfigurator-core 0.12.0", "model": MODEL}
    for kind in POINTS:
        each = {system: ratios(folder, system, kind) for system in SYSTEM_OF_CARD.values()}
        report[kind] = {
            "all": summary([ratio for found in each.values() for ratio in found]),
            "each": {system: summary(found) for system, found in each.items() if found},
        }
        print(kind, report[kind]["all"])
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
