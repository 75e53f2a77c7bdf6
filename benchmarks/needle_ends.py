"""Whether plans that one needle sample has chosen hold on others, by where its needles lie.

    python benchmarks/needle_ends.py --out benchmarks/results/needle-ends-cpu.json [--ends 64 0]

Tables of the small workload's search samples (prose, code, one with needles) are solved at 6 and
12 % of the bytes with three shares of the terms between heads, and the plans run live on other
needle samples. ``--ends 0`` lets needles lie anywhere in the prompts that the tables are made of,
as they did before: one in SnapKV's observation window shows it what will be asked. The samples that
are run live have none in their last 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from recorded_parts import say
from single_cells import Bench, captured

from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces import needles
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.options import LAPTOP
from kvtune.tuner.solver import policy_of
from kvtune.tuner.validate import union_of_needs, validate_policies

KINDS = ("prose", "code", "retrieval")


def solved(loaded: LoadedModel, end: int, folder: Path) -> tuple[Bench, dict[str, np.ndarray]]:
    """Tables of search samples without needles in their last ``end`` tokens, and the plans."""
    usual, needles.UNASKED_END = needles.UNASKED_END, end
    try:
        workload = Workload({"search": dict.fromkeys(KINDS, 1)}, tokens=1024, observed=128)
        bench = Bench(loaded, captured(loaded, workload, LAPTOP, folder), LAPTOP)
    finally:
        needles.UNASKED_END = usual
    cases = product((0.06, 0.12), (0.4, 0.1, 0.8))
    return bench, {f"{share:.0%}, {part}": bench.solved(share, part) for share, part in cases}


def measured(loaded: LoadedModel, end: int, texts: int) -> dict[str, Any]:
    """Loss and needle digits of each plan on needle samples that the tables know nothing of."""
    with tempfile.TemporaryDirectory() as folder:
        bench, choices = solved(loaded, end, Path(folder))
    say("tables")
    tables = bench.tables
    plans = [policy_of(tables, choice, name) for name, choice in choices.items()]
    needs = union_of_needs(plans)
    other = Workload({"select": {"retrieval": texts}}, tokens=1024, observed=128)
    found = validate_policies(
        plans,
        loaded,
        build(other, loaded.tokenizer),
        lambda sample: fresh_prompt(loaded, sample, needs),
    )
    return {
        name: {
            "predicted on search": dict(
                zip(KINDS, tables.by_sample(choices[name]).tolist(), strict=True)
            ),
            "live": list(run.losses),
            "needle digits right": run.retrieval_accuracy and run.retrieval_accuracy.value,
            "full cache": run.full_cache_accuracy and run.full_cache_accuracy.value,
        }
        for name, run in zip(choices, found, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ends", type=int, nargs="+", default=[64, 0])
    parser.add_argument("--texts", type=int, default=4, help="needle samples to run live")
    arguments = parser.parse_args()
    loaded, begun = load_model("smollm2-135m", device=arguments.device), time.monotonic()
    found: dict[str, Any] = {"device": loaded.device, "dtype": loaded.dtype}
    for end in arguments.ends:
        name = f"no needle in the last {end} tokens"
        found[name] = measured(loaded, end, arguments.texts)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        say(name, f"{time.monotonic() - begun:.0f} s", json.dumps(found[name]))


if __name__ == "__main__":
    main()
