"""Processor seconds that each method adds to a search: of recording a sample, of replaying a layer.

    python benchmarks/menu_times.py --out benchmarks/results/menu-times-cpu.json

SmolLM2 on one thread, one sample of the small workload. ``sample`` is one capture with the signals
that a menu's methods read, ``layer`` every option of the menu on a layer, mean over ``--layers``;
the least of ``--times`` runs counts, and the menus take turns. ``methods`` are the layers' seconds
of each method's own options, at the laptop's shares in one precision and in all of its precisions.
``search`` is what nine samples and 30 layers make of them. Processor time and not the clock's,
because other work may run beside it.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvtune.common.files import write_json
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import Method
from kvtune.simulator.quality.build import layer_features
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.traces.capture import capture
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.trace import Trace
from kvtune.traces.workloads import build, small
from kvtune.tuner.options import FEW, LAPTOP, ROTATED, WEIGHTED, Menu, alike, every_method
from kvtune.tuner.sources import queries_of, signals_of

SAMPLES, LAYERS = 9, 30
_ONE_PRECISION = alike((Int4(exact_first=4),))


def menus() -> dict[str, Menu]:
    """The menus whose times are compared, by name."""
    methods = every_method(calibrated=False, pairs=True)
    formats = (*LAPTOP.formats, *ROTATED)
    return {
        "three": LAPTOP,
        "few": FEW,
        "all, replayed in full": replace(
            LAPTOP, methods=methods, formats=formats, weighted=WEIGHTED
        ),
    }


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def recorded(loaded: LoadedModel, sample: Sample, menu: Menu, folder: Path) -> Trace:
    """The trace of a sample with what a menu's methods read."""
    return capture(
        loaded,
        [sample],
        folder,
        probes=4,
        queries=queries_of(menu.needs, sample.observed),
        signals=signals_of(menu.needs),
    )


def replayed(trace: Trace, layers: Iterable[int], menu: Menu) -> float:
    """Processor seconds of a menu's options on one layer, mean over layers."""
    name, options = trace.samples[0].id, menu.options()
    each = [
        seconds(lambda at=layer: layer_features(LayerReplay.of(trace.layer(name, at)), options, 16))
        for layer in layers
    ]
    return sum(each) / len(each)


def by_method(trace: Trace, layers: Iterable[int]) -> dict[str, dict[str, float]]:
    """Each method's own seconds on a layer: in one precision, and in all of the laptop's."""

    def menu(method: Method, formats: Any) -> Menu:
        return Menu((method,), LAPTOP.shares, formats)

    return {
        method.label: {
            "one precision": round(replayed(trace, layers, menu(method, _ONE_PRECISION)), 3),
            "all precisions": round(replayed(trace, layers, menu(method, LAPTOP.formats)), 3),
        }
        for method in every_method(calibrated=False, pairs=False)
    }


def measured(times: int, layers: list[int], names: list[str]) -> dict[str, Any]:
    loaded = load_model("smollm2-135m")
    sample = build(small(), loaded.tokenizer)[0]
    wanted = {name: menu for name, menu in menus().items() if name in names}
    samples = dict.fromkeys(wanted, float("inf"))
    per_layer = dict.fromkeys(wanted, float("inf"))
    methods: dict[str, Any] = {}
    for turn in range(times):
        for name, menu in wanted.items():
            with TemporaryDirectory() as folder:
                taken = seconds(
                    lambda menu=menu, to=folder: recorded(loaded, sample, menu, Path(to) / "trace")
                )
                samples[name] = min(samples[name], taken)
                trace = recorded(loaded, sample, menu, Path(folder) / "trace")
                per_layer[name] = min(per_layer[name], replayed(trace, layers, menu))
                if turn == 0 and name.startswith("all"):
                    methods = by_method(trace, layers)
            print(name, samples[name], per_layer[name], flush=True)
    return {
        "options": {name: len(menu.options()) for name, menu in wanted.items()},
        "sample": {name: round(value, 3) for name, value in samples.items()},
        "layer": {name: round(value, 3) for name, value in per_layer.items()},
        "search": {
            name: round(SAMPLES * (samples[name] + LAYERS * per_layer[name]), 1) for name in wanted
        },
        "methods": methods,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 11, 20, 27])
    parser.add_argument("--menus", nargs="+", default=list(menus()))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(arguments.times, arguments.layers, arguments.menus)
    write_json(arguments.out, {"machine": f"{platform.machine()}, one thread", **found})


if __name__ == "__main__":
    main()
