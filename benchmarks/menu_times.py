"""Processor seconds that each method adds to a search: of recording a sample, of replaying a layer.

    python benchmarks/menu_times.py --out benchmarks/results/menu-times-cpu.json

SmolLM2 on one thread, one sample of the small workload. ``sample`` is one capture with the signals
that a menu's methods read, ``layer`` every option of the menu on a layer, mean over ``--layers``;
the least of ``--times`` runs counts, and the menus take turns. ``methods`` are the layers' seconds
of each method's own options, at the laptop's shares in one precision and in all of its precisions.
``search`` is what nine samples and 30 layers make of them. Processor time and not the clock's,
because other work may run beside it. ``--menu`` names some of the menus.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvtune.common.files import write_json
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import Method
from kvtune.policies.signals import Needs
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.quality.build import layer_features
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.traces.capture import capture
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.trace import Trace
from kvtune.traces.workloads import build, small
from kvtune.tuner.options import FEW, LAPTOP, Menu, alike, every_method
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.screening import MOST
from kvtune.tuner.sources import menu_of, queries_of, signals_of

MODEL, SAMPLES, LAYERS = "smollm2-135m", 9, 30
NAMES = "three", "few", "all"
RESULTS = Path(__file__).parent / "results"
_ONE_PRECISION = alike((Int4(exact_first=4),))


def menus() -> dict[str, Menu]:
    """The menus whose times are compared, by name; of all methods those that go on to be replayed.

    They are the seven that ``screening-cpu.json`` names, on a trace with the signals of all.
    """
    asked = SearchRequest(
        MODEL, find_model(MODEL), find_gpu("4090"), 2**30, Path("run"), menu="all"
    )
    every = menu_of(asked, calibrated=False)
    rows = json.loads((RESULTS / "screening-cpu.json").read_text())["by number"]
    names = next(row["methods"] for row in rows if len(row["methods"]) == MOST)
    going_on = tuple(method for method in every.methods if method.label in names)
    return {"three": LAPTOP, "few": FEW, "all": replace(every, methods=going_on)}


def recorded(loaded: LoadedModel, sample: Sample, needs: Needs, folder: Path) -> Trace:
    """The trace of a sample with what a menu's methods read."""
    return capture(
        loaded,
        [sample],
        folder,
        probes=4,
        queries=queries_of(needs, sample.observed),
        signals=signals_of(needs),
    )


def replayed(trace: Trace, layers: Sequence[int], menu: Menu) -> float:
    """Processor seconds of a menu's options on one layer, mean over layers."""
    name, options = trace.samples[0].id, menu.options()
    given = [trace.layer(name, layer) for layer in layers]
    begun = time.process_time()
    for each in given:
        layer_features(LayerReplay.of(each), options, 16)
    return (time.process_time() - begun) / len(layers)


def by_method(trace: Trace, layers: Sequence[int]) -> dict[str, dict[str, float]]:
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


def measured(times: int, layers: list[int], named: Sequence[str]) -> dict[str, Any]:
    loaded, wanted = load_model(MODEL), {name: menus()[name] for name in named}
    sample = build(small(), loaded.tokenizer)[0]
    every = Menu(every_method(calibrated=False), LAPTOP.shares, LAPTOP.formats)
    needs = {name: every.needs if name == "all" else menu.needs for name, menu in wanted.items()}
    samples, per_layer = (dict.fromkeys(wanted, float("inf")) for _ in range(2))
    methods: dict[str, Any] = {}
    for turn, (name, menu) in product(range(times), wanted.items()):
        with TemporaryDirectory() as folder:
            begun = time.process_time()
            trace = recorded(loaded, sample, needs[name], Path(folder))
            samples[name] = min(samples[name], time.process_time() - begun)
            per_layer[name] = min(per_layer[name], replayed(trace, layers, menu))
            if turn == 0 and name == "all":
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
    parser.add_argument("--menu", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(arguments.times, arguments.layers, arguments.menu)
    write_json(arguments.out, {"machine": f"{platform.machine()}, one thread", **found})


if __name__ == "__main__":
    main()
