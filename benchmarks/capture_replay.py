"""Processor seconds of capturing one sample of the small workload and of replaying its options.

    python benchmarks/capture_replay.py --out benchmarks/results/capture-replay-cpu.json

SmolLM2 on one thread: the prompt's pass with its column sums, the observed pass with four probes,
and every option of the laptop's menu on some layers. The least of ``--times`` runs of each counts,
per sample and per layer; ``search`` is what nine samples and 30 layers make of them. Processor time
and not the clock's, because other work may run beside it. ``losses`` are the options' losses on
those layers, so that two versions of kvtune can be held against each other.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from kvtune.common.files import write_json
from kvtune.simulator.quality.build import layer_features
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.traces.capture import capture, observe
from kvtune.traces.models import load_model
from kvtune.traces.passes import run_prompt
from kvtune.traces.probes import Probes
from kvtune.traces.signals import column_sums
from kvtune.traces.workloads import build, small
from kvtune.tuner.options import LAPTOP

T = TypeVar("T")
SAMPLES, LAYERS = 9, 30


def timed(times: int, run: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the processor seconds of its quickest run."""
    least = float("inf")
    for _ in range(times):
        begun = time.process_time()
        found = run()
        least = min(least, time.process_time() - begun)
    return found, least


def measured(times: int, layers: list[int]) -> dict[str, Any]:
    begun = time.process_time()
    loaded = load_model("smollm2-135m")
    loading = time.process_time() - begun
    sample = build(small(), loaded.tokenizer)[0]

    def prompt() -> list[Any]:
        cache: list[Any] = []

        def keep(layer: int, q: Any, k: Any, v: Any) -> None:
            cache.append((k, v))
            column_sums(q[0], k[0], loaded.geometry.scale, None)

        run_prompt(loaded, sample.token_ids[: sample.prompt], keep)
        return cache

    cache, prompt_s = timed(times, prompt)
    _, observe_s = timed(times, lambda: observe(loaded, sample, cache, Probes(4)))
    options = LAPTOP.options()
    with TemporaryDirectory() as folder:
        trace = capture(
            loaded, [sample], Path(folder), probes=4, queries=192, signals=("column_sums",)
        )
        given = [trace.layer(sample.id, layer) for layer in layers]

    def replay() -> list[Any]:
        fresh = [LayerReplay.of(each) for each in given]  # nothing kept from the run before
        return [layer_features(each, options, 16) for each in fresh]

    features, replay_s = timed(times, replay)
    layer_s = replay_s / len(layers)
    seconds = {"loading": loading, "prompt": prompt_s, "observed": observe_s, "layer": layer_s}
    search = {
        "capture": SAMPLES * (prompt_s + observe_s),
        "replay": SAMPLES * LAYERS * layer_s,
    }
    return {
        "options": len(options),
        "processor seconds": {name: round(value, 3) for name, value in seconds.items()},
        "search": {name: round(value, 1) for name, value in search.items()},
        "losses": [float((each**2).sum(-1).mean()) for each in features],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 11, 20, 27])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(arguments.times, arguments.layers)
    write_json(arguments.out, {"machine": f"{platform.machine()}, one thread", **found})


if __name__ == "__main__":
    main()
