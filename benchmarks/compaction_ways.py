"""Ways to lose less by compaction at 3 % and 1 %: error of attention's output on held-out queries.

    python benchmarks/compaction_ways.py --out benchmarks/results/compaction-ways-cpu.json

Attention Matching in 16 bits on every sixth layer of SmolLM2-135M, one prompt of each kind of text.
For every way: the squared error of the output at the observed tokens (which see the compacted
prompt and each other) over the square of the output, in the mean over heads. Ways: as it is; four
times as many reference queries; log-weights and values fitted together; half as many tokens again
pursued, of which those that are missed least are dropped; fits that are held more firmly to what
was there; and the last with more queries. No way sees the observed queries.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvtune.common.rotary import later_queries
from kvtune.policies.attention import attend, merge
from kvtune.policies.fitting import RIDGE, fitted_together, fitted_values, mass_weights, pursued
from kvtune.policies.signals import Needs, Signals
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.models import load_model
from kvtune.traces.workloads import Workload, build

KINDS = ("prose", "code", "retrieval")
SHARES = (0.01, 0.03)
Fit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Choose = Callable[[Tensor, Tensor, int], Tensor]


def references(signals: Signals, most: int) -> Tensor:
    """Attention of a sample of the prompt's queries, turned behind it: ``[H, R, P]``."""
    heads = len(signals.keys)
    queries = later_queries(signals.queries, signals.rope, most).unflatten(0, (heads, -1))
    logits = queries.flatten(1, 2) @ signals.keys.transpose(1, 2) * signals.scale
    return logits.softmax(-1)


def chosen(attention: Tensor, values: Tensor, count: int) -> Tensor:
    """What pursuit chooses."""
    return pursued(attention, values, count)


def pruned(attention: Tensor, values: Tensor, count: int) -> Tensor:
    """Half as many again by pursuit; then, one after another, what the fit misses least goes."""
    kept = pursued(attention, values, min(count + count // 2, attention.shape[-1]))
    outputs = (attention @ values).double()
    loudness = outputs.square().sum(-1).mean(1).sqrt()[:, None, None]
    target = torch.cat([outputs, loudness.expand(*outputs.shape[:2], 1)], -1)
    while kept.shape[-1] > count:
        columns = columns_of(attention, kept)
        gram = columns.mT @ columns
        gram += torch.diag_embed(1e-3 * gram.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True)
                                 .expand_as(kept))  # fmt: skip
        inverse = torch.linalg.inv(gram)
        weights = inverse @ (columns.mT @ target)
        missed = weights.square().sum(-1) / inverse.diagonal(dim1=1, dim2=2)
        gone = max((kept.shape[-1] - count) // 4, 1)
        stay = missed.argsort(-1, descending=True)[:, : kept.shape[-1] - gone]
        kept = kept.gather(1, stay)
    return kept


def columns_of(attention: Tensor, kept: Tensor) -> Tensor:
    """``[H, R, n]`` float64."""
    return attention.gather(2, kept[:, None].expand(-1, attention.shape[1], -1)).double()


def apart(
    columns: Tensor, outputs: Tensor, own: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Weights of the mass, then values."""
    weights = mass_weights(columns, ridge)
    return weights, fitted_values(columns, weights, outputs, own, ridge)


def held(ridge: float) -> Fit:
    """The same, held so firmly."""
    return partial(apart, ridge=ridge)


def held_out(signals: Signals, kept: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Relative squared error of the output at the observed tokens, ``[H]``."""
    future, heads = signals.future, len(signals.keys)
    assert future is not None
    queries = future.queries.unflatten(0, (heads, -1))  # [H, G, C, D]
    count = queries.shape[2]
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    own = attend(queries, future.keys[:, None], future.values[:, None], causal, signals.scale)
    whole = attend(queries, signals.keys[:, None], signals.values[:, None], None, signals.scale)
    keys = signals.keys.gather(1, kept[..., None].expand(-1, -1, signals.keys.shape[-1]))
    few = attend(
        queries, keys[:, None], values.float()[:, None], None, signals.scale,
        weights.log().float()[:, None, None],
    )  # fmt: skip
    expected, found = merge(whole, own), merge(few, own)
    error = (found - expected).square().sum((1, 2, 3))
    return error / expected.square().sum((1, 2, 3))


WAYS: dict[str, tuple[int, Choose, Fit]] = {
    "as it is": (512, chosen, apart),
    "four times the queries": (2048, chosen, apart),
    "fitted together": (512, chosen, fitted_together),
    "pruned": (512, pruned, apart),
    "held ten times as firmly": (512, chosen, held(10 * RIDGE)),
    "held a hundred times as firmly": (512, chosen, held(100 * RIDGE)),
    "ten times as firmly, four times the queries": (2048, chosen, held(10 * RIDGE)),
}


def measure(signals: Signals, share: float) -> dict[str, float]:
    """The error of every way in one layer."""
    tokens, head_dim = signals.keys.shape[1:]
    count = int(share * tokens * 4 * head_dim / (4 * head_dim + 4))
    found = {}
    for name, (most, choose, fit) in WAYS.items():
        attention = references(signals, most)
        kept = choose(attention, signals.values, count)
        own = signals.values.gather(1, kept[..., None].expand(-1, -1, head_dim))
        weights, values = fit(columns_of(attention, kept), attention @ signals.values, own)
        found[name] = float(held_out(signals, kept, weights, values).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1280, help="of a sample, 256 observed")
    parser.add_argument("--tiny", action="store_true", help="one short prompt, two layers")
    arguments = parser.parse_args()
    begun = time.monotonic()
    loaded = load_model("smollm2-135m", device="cpu", dtype="float32")
    kinds = KINDS[: 1 if arguments.tiny else 3]
    length = 300 if arguments.tiny else arguments.tokens
    samples = build(
        Workload({"evaluate": dict.fromkeys(kinds, 1)}, tokens=length, observed=length // 5),
        loaded.tokenizer,
    )
    step = 15 if arguments.tiny else 6
    rows: dict[str, Any] = {f"{share:.0%}": {way: {} for way in WAYS} for share in SHARES}
    for sample in samples:
        prompt = fresh_prompt(loaded, sample, Needs(window=sample.prompt, future=True))
        for share in SHARES:
            layers = [
                measure(prompt(layer), share) for layer in range(0, loaded.geometry.layers, step)
            ]
            for way in WAYS:
                mean = float(np.mean([layer[way] for layer in layers]))
                rows[f"{share:.0%}"][way][sample.kind] = round(mean, 5)
            print(sample.kind, f"{share:.0%}", layers[-1], file=sys.stderr)
        figures = {"tokens": length, "seconds": round(time.monotonic() - begun, 1), **rows}
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
