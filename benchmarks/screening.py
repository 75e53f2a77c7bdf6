"""How much is lost where few of all methods are replayed in full: heads' least losses, by number.

    kvtune search --model smollm2-135m --gpu 4090 --mem 1GiB --menu all     # captures a trace
    python benchmarks/screening.py TRACE --out benchmarks/results/screening-cpu.json

``together`` is what heads lose if each has the best of so many methods in as many bytes, over what
they lose with the best of all, mean over three budgets: on the cells that chose them, and by
methods that every second cell chose, on the others.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from kvtune.common.files import write_json
from kvtune.common.progress import Silent
from kvtune.policies.method import Method
from kvtune.simulator.quality.tables import Floats
from kvtune.traces.trace import Trace, open_trace
from kvtune.tuner.options import LAPTOP, METHODS, Menu, every_method
from kvtune.tuner.screening import covering, losses_of_methods


def together(losses: Floats, methods: tuple[Method, ...], chosen: tuple[Method, ...]) -> float:
    """Least losses of the chosen methods over those of all, mean over budgets."""
    rows = [methods.index(each) for each in chosen]
    least = losses.min(0).sum(-1)
    return round(float((losses[rows].min(0).sum(-1) / least).mean()), 3)


def menu_of(trace: Trace) -> Menu:
    """Every method that the trace has the signals of, as a search without calibration has them."""
    methods = every_method(calibrated=False, pairs=trace.geometry.layers % 2 == 0)
    return Menu(methods, LAPTOP.shares, LAPTOP.formats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    trace, started = open_trace(arguments.trace), time.process_time()
    menu = menu_of(trace)
    losses = losses_of_methods(menu, trace, arguments.device, Silent())
    taken, methods, heads = time.process_time() - started, menu.methods, trace.geometry.kv_heads
    cell = np.arange(losses.shape[-1]) // heads
    first, other = losses[..., cell % 2 == 0], losses[..., cell % 2 == 1]
    rows = []
    for count in range(len(METHODS), 11):
        chosen = covering(losses, methods, METHODS, count)
        half = covering(first, methods, METHODS, count)
        rows.append(
            {
                "methods": [method.label for method in chosen],
                "together": together(losses, methods, chosen),
                "on cells that chose nothing": together(other, methods, half),
            }
        )
    found = {
        "model": str(trace.manifest["model"]["name"]),
        "of methods": len(methods),
        "prompt tokens": trace.samples[0].prompt,
        "cells": int(cell.max()) + 1,
        "processor_seconds": round(taken, 1),
        "by number": rows,
    }
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
