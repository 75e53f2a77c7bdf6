"""Which options of a wider menu on a CPU are worth their time: losses with and without groups.

    python benchmarks/few_options.py --out benchmarks/results/few-options-cpu.json

SmolLM2, one thread, the small workload: options are replayed on one sample, each head is given the
option that loses least at a share of the KV bytes (one price a byte for all heads), and the losses
that its choices have on another sample, summed over heads, are divided by those of the whole menu.
``layer`` are the processor seconds of a layer, the least of three runs. The wider menu is
``FEW`` as it was with 102 options.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from kvtune.common.files import write_json
from kvtune.policies.methods.attention_matching import AttentionMatching
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import Option
from kvtune.simulator.quality.build import build_tables, layer_features
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.simulator.quality.tables import Tables
from kvtune.traces.capture import capture
from kvtune.traces.models import load_model
from kvtune.traces.trace import Trace
from kvtune.traces.workloads import build, small
from kvtune.tuner.options import LAPTOP, SMALL_SHARES, WEIGHTED, Menu
from kvtune.tuner.sources import queries_of, signals_of

SHARES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.25)
WIDE = replace(
    LAPTOP,
    more=(
        Menu((AttentionMatching(select="h2o"),), SMALL_SHARES[:4], LAPTOP.formats),
        Menu((), SMALL_SHARES[2:], (), WEIGHTED, (WeightedKeys("h2o"),)),
    ),
)
LEFT_OUT: dict[str, Callable[[Option], bool]] = {
    "nothing": lambda option: False,
    "values fitted in 2 bits": lambda option: _is_fitted(option) and option.values.bits == 2,
    "bits by channel below a quarter": lambda option: _is_wide(option) and _share(option) < 1 / 4,
    "2.3 bits by channel": lambda option: _is_wide(option) and option.keys == WEIGHTED[1][0],
    "these three": lambda option: any(LEFT_OUT[name](option) for name in list(LEFT_OUT)[1:4]),
    "all bits by channel": lambda option: _is_wide(option),
    "all fitted values": lambda option: _is_fitted(option),
    "both": lambda option: _is_wide(option) or _is_fitted(option),
}


def _is_fitted(option: Option) -> bool:
    return isinstance(option.method, AttentionMatching)


def _is_wide(option: Option) -> bool:
    return isinstance(option.method, WeightedKeys)


def _share(option: Option) -> float:
    return option.budget.resolve(1 << 20) / (1 << 20)


def held_bytes(tables: Tables) -> Any:
    """Bytes of every option in a head, ``[O]``."""
    prompt, size = tables.prompt_tokens, tables.head_dim
    return np.array(
        [
            sum(
                sum(part.stored_bytes((option.keys, option.values), size))
                for part in option.method.plan(option.budget.resolve(prompt), prompt)
            )
            for option in tables.options
        ],
        float,
    )


def chosen(loss: Any, held: Any, most: float) -> Any:
    """The option of every head ``[I]``, of least loss at ``most`` bytes in the mean."""
    low, high = -60.0, 60.0  # of the price's logarithm
    for _ in range(80):
        middle = (low + high) / 2
        found = (loss + 2.0**middle * held).argmin(1)
        low, high = (middle, high) if held[found].mean() > most else (low, middle)
    return (loss + 2.0**high * held).argmin(1)


def sums(tables: Tables, held: Any, columns: Any) -> list[Any]:
    """What the choices lose on the sample they were made on and on the other, at every share."""
    own, other = tables.loss[:, :, columns].astype(float)
    full = tables.prompt_tokens * tables.head_dim * 2 * 2  # keys and values, of two bytes
    heads = np.arange(len(own))
    picked = [chosen(own, held[columns], share * full) for share in SHARES]
    return [np.array([own[heads, at].sum(), other[heads, at].sum()]) for at in picked]


def seconds(trace: Trace, layers: list[int], options: tuple[Option, ...]) -> float:
    """Processor seconds of a layer, the least of three."""
    given = [trace.layer(trace.samples[0].id, layer) for layer in layers]
    times = []
    for _ in range(3):
        fresh = [LayerReplay.of(each) for each in given]
        begun = time.process_time()
        for each in fresh:
            layer_features(each, options, 16)
        times.append((time.process_time() - begun) / len(layers))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs=2, default=[0, 3], help="chosen on, held out")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 11, 20, 27])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded, rows = load_model("smollm2-135m"), {}
    texts = build(small(), loaded.tokenizer)
    texts = [texts[number] for number in arguments.samples]
    queries = queries_of(WIDE.needs, texts[0].observed)
    with TemporaryDirectory() as folder:
        trace = capture(
            loaded, texts, Path(folder), probes=4, queries=queries, signals=signals_of(WIDE.needs)
        )
        tables = build_tables(trace, WIDE.options())
        held, whole = held_bytes(tables), None
        for name, is_left_out in LEFT_OUT.items():
            columns = [at for at, o in enumerate(tables.options) if not is_left_out(o)]
            found = sums(tables, held, columns)
            whole = whole or found
            ratios = np.array([mine / all_ for mine, all_ in zip(found, whole, strict=True)])
            rows[name] = {
                "options": len(columns),
                "layer": round(
                    seconds(trace, arguments.layers, tuple(tables.options[c] for c in columns)), 3
                ),
                "chosen on": ratios[:, 0].round(3).tolist(),
                "held out": ratios[:, 1].round(3).tolist(),
            }
            print(name, rows[name], flush=True)
    machine = f"{platform.machine()}, one thread"
    write_json(arguments.out, {"machine": machine, "shares": SHARES, "left out": rows})


if __name__ == "__main__":
    main()
