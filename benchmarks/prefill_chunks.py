"""What reading prompts takes on a GPU, by how many tokens the feed-forward parts are given at once.

    python benchmarks/prefill_chunks.py --out benchmarks/results/prefill-chunks-h200.json

Two prompts of 8,192 tokens, random weights in Llama-3.1-8B's shape, uncompressed pages. As much as
all tokens together is what the runtime did before prompts were read one after another, in chunks of
``PREFILL_CHUNK_TOKENS``: then both prompts are read as one batch. ``apart`` reads them one after
another with feed-forward parts given whole prompts. Ways take turns; every round of each way is
written, with the peak of torch's allocator. ``products`` are the feed-forward part's two matrix
products alone, by the rows of the left side: seconds for all tokens of the prompts, of all layers.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mem_promise import random_model

from kvtune.common.files import write_json
from kvtune.policies.option import Option
from kvtune.policies.paging import PREFILL_CHUNK_TOKENS
from kvtune.policies.policy import Policy
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape
from kvtune.runtime import admission
from kvtune.runtime.admission import read_prompts
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.device import Bench, bench_for

BATCH, TOKENS = 2, 8192


class NoBench:
    """Tries the course where nothing can be timed."""

    def forget_peak(self) -> None:
        """Nothing to forget."""

    def peak_bytes(self) -> int:
        """Zero: a CPU keeps no peak of its memory."""
        return 0

    def seconds(self, call: Any) -> float:
        """The call is made; what it takes means nothing."""
        call()
        return 0.0


def reduced(shape: ModelShape) -> ModelShape:
    """Two narrow layers, to try the whole course on a CPU."""
    return replace(
        shape, layers=2, query_heads=4, kv_heads=2, head_dim=16, hidden_size=64,
        intermediate_size=64, vocab_size=128, windows=shape.windows[:2],
    )  # fmt: skip


def read(model: Any, prompts: torch.Tensor, chunk: int, apart: bool, bench: Any) -> dict[str, Any]:
    """One reading of both prompts."""
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    cache = load_cache(Policy.uniform(Option(), layers, heads), model)
    alone = patch.object(admission, "together", lambda lengths, _: map(single, range(len(lengths))))
    bench.forget_peak()
    call = partial(read_prompts, model, cache, prompts, chunk_tokens=chunk)
    if not apart:
        return {"seconds": bench.seconds(call), "peak_bytes": bench.peak_bytes()}
    with alone:
        return {"seconds": bench.seconds(call), "peak_bytes": bench.peak_bytes()}


def single(row: int) -> range:
    """The sequence of this row alone, as a batch to read."""
    return range(row, row + 1)


@torch.no_grad()
def products(model: Any, tokens: int, rows: int, bench: Any) -> float:
    """Seconds of all layers' feed-forward matrix products on ``tokens``, ``rows`` at a time."""
    mlp = model.model.layers[0].mlp
    device, dtype = model.device, model.dtype
    wide = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    hidden = torch.randn(rows, wide.shape[1], device=device, dtype=dtype)
    inner = torch.randn(rows, wide.shape[0] // 2, device=device, dtype=dtype)

    def both() -> None:
        for _ in range(tokens // rows):
            torch.nn.functional.linear(hidden, wide)
            torch.nn.functional.linear(inner, mlp.down_proj.weight)

    both()
    return float(bench.seconds(both)) * len(model.model.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of every way, after one to warm up")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, which times nothing")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shape = find_model("llama-3.1-8b")
    tokens = 64 if arguments.tiny else TOKENS
    model = random_model(
        reduced(shape) if arguments.tiny else shape, context=BATCH * tokens, tiny=arguments.tiny
    )
    bench: Bench | NoBench = NoBench() if arguments.tiny else bench_for("cuda")
    prompts = torch.randint(0, 100, (BATCH, tokens), device=model.device)
    usual = tokens // 4 if arguments.tiny else PREFILL_CHUNK_TOKENS
    ways = {
        **{f"chunks of {usual * n}": (usual * n, True) for n in (1, 2, 4)},
        "both prompts at once": (BATCH * tokens, False),
    }
    found: dict[str, Any] = {"device": "cpu" if arguments.tiny else torch.cuda.get_device_name()}
    found |= {"batch": BATCH, "prompt_tokens": tokens, "ways": {name: [] for name in ways}}
    found["products"] = {
        str(rows): products(model, BATCH * tokens, rows, bench)
        for rows in (usual, 2 * usual, tokens, BATCH * tokens)
    }
    write_json(arguments.out, found)
    for round_ in range(arguments.rounds + 1):
        for name, (chunk, apart) in ways.items():
            ran = read(model, prompts, chunk, apart, bench)
            if round_:
                found["ways"][name].append(ran)
                write_json(arguments.out, found)


if __name__ == "__main__":
    main()
