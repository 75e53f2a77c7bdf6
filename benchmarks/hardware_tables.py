"""How well times from NVIDIA's measured tables hold: points and systems left out.

    python -m kvtune.benchmarks.hardware_tables [--systems FOLDER] --out FILE

FOLDER is ``systems`` of an unpacked ``aiconfigurator-core`` wheel (left out: the installed one). No
row of the tables is written, only errors. Whole serving runs are judged by hardware_runs.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.benchmarks.hardware_runs import summary
from kvtune.benchmarks.serving_recipes import CARDS
from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import STACKS, read_table, require_systems_folder
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.stack_kernels.attention import (
    Heads,
    attention_features,
    attention_points,
)
from kvtune.profiles.stack_kernels.grid import fit_grids
from kvtune.profiles.stack_kernels.tables import ServingTables
from kvtune.simulator.latency.serving_kernels import ServingModel
from kvtune.simulator.latency.stack_overheads import Overheads

ALIKE = {"b200_sxm": 1, "b300_sxm": 1, "gb200": 1, "gb300": 1}  # one chip; left out together too


# --- (a) a third of the points left out --------------------------------------------------------


def points_left_out(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Decode attention of every system and stack, heads of 64 and 128, all windows and formats."""
    random, each, whole = np.random.default_rng(seed), {}, []
    for system in CARDS:
        for stack in STACKS:
            ratios: list[float] = []
            for width in (64, 128):
                table = read_table(
                    folder, system, "attention", stack, "generation_attention_perf",
                    {"head_dim": width},
                )  # fmt: skip
                for window, rows in _families(table) if table else ():
                    ratios += _family_left_out(rows, window, random)
            if ratios:
                each[f"{system} {stack}"] = summary(ratios)
                whole += ratios
    return {"all": summary(whole), "each": each}


def _families(table: Any) -> Iterator[tuple[int, Any]]:
    windows = np.unique(table.columns.get("window_size", [0]))
    for window in windows:
        for form in np.unique(table.columns["kv_cache_dtype"]):
            rows = table.where(window_size=window, kv_cache_dtype=form)
            if len(rows):
                yield int(window), rows.of_most_used_kernel()


def _family_left_out(rows: Any, window: int, random: np.random.Generator) -> list[float]:
    known, hidden = [], []
    for points in attention_points(rows, "generation").values():
        drawn = random.random(len(points)) < 1 / 3
        items = list(points.items())
        known.append({key: s for (key, s), out in zip(items, drawn, strict=True) if not out})
        hidden.append({key: s for (key, s), out in zip(items, drawn, strict=True) if out})
    grids = fit_grids(known, attention_features("generation", window))
    found: list[float] = []
    for grid, held in zip(grids, hidden, strict=True):
        if grid is not None and held:
            batch, length = np.array(list(held)).T
            found += list(grid.at(batch, length) / np.array(list(held.values())))
    return found


# --- (b) systems left out whole ----------------------------------------------------------------


def systems_left_out(folder: Path, chips: bool) -> dict[str, Any]:
    """Decode attention of a system from the nearest other one, scaled by bandwidth.

    Args:
        folder: the tables.
        chips: leave all systems of one chip out together.
    """
    each, whole = {}, []
    for system, card in CARDS.items():
        for stack in STACKS:
            ratios: list[float] = []
            for heads in (Heads(32, 8, 128), Heads(8, 8, 128), Heads(8, 1, 128), Heads(64, 8, 128)):
                for form in ("bfloat16", "fp8"):
                    ratios += _from_nearest(folder, system, card, stack, heads, form, chips)
            if ratios:
                each[f"{system} {stack}"] = summary(ratios)
                whole += ratios
    return {"all": summary(whole), "each": each}


def _from_nearest(
    folder: Path, system: str, card: GpuProfile, stack: Any, heads: Heads, form: str, chips: bool
) -> list[float]:
    from kvtune.simulator.latency.stacks import unlike

    table = read_table(
        folder, system, "attention", stack, "generation_attention_perf", {"head_dim": heads.width}
    )
    rows = table and table.where(window_size=0, kv_cache_dtype=form).of_most_used_kernel()
    points = attention_points(rows, "generation").get(heads[:2], {}) if rows else {}
    others = [
        name for name in CARDS
        if name != system and CARDS[name].vendor == card.vendor
        and not (chips and ALIKE.get(name, name) == ALIKE.get(system, system))
    ]  # fmt: skip
    for name in sorted(others, key=lambda one: unlike(CARDS[one], card)):
        tables = ServingTables(folder, name, stack)
        try:
            if not points:
                return []
            batch, length = np.array(list(points)).T
            near = tables.decode_attention(heads, None, form, batch, length)
            floor = float(tables.decode_attention(heads, None, form, 1, 1))
        except KvtuneError:
            continue
        ratio = CARDS[name].bandwidth_bytes_per_s / card.bandwidth_bytes_per_s
        scaled = floor + np.maximum(near - floor, 0) * ratio
        return list(scaled / np.array(list(points.values())))
    return []


# --- what the datasheet tier assumes -----------------------------------------------------------


def achieved_shares(folder: Path) -> dict[str, list[float]]:
    """Low, likely and high shares of the sheets' figures, over systems and stacks.

    They are the priors in simulator/latency/priors.py. Floors are in microseconds.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for system, card in CARDS.items():
        for stack in STACKS:
            tables = ServingTables(folder, system, stack)
            _attention_shares(tables, card, found)
            _matrix_shares(tables, card, found)
    return {
        name: [round(float(q), 3) for q in np.quantile(values, [0.1, 0.5, 0.9])]
        for name, values in found.items()
    }


def _attention_shares(
    tables: ServingTables, card: GpuProfile, found: dict[str, list[float]]
) -> None:
    heads = Heads(32, 8, 128)
    batch, length = np.meshgrid([1, 4, 16, 64, 128], [1024, 4096, 16384, 65536])
    shares = {}
    for form, width in (("bfloat16", 2), ("fp8", 1)):
        try:
            seconds = tables.decode_attention(heads, None, form, batch, length)
            small = tables.decode_attention(heads, None, form, [1, 256, 1], [16, 16, 1])
        except KvtuneError:
            continue
        read = batch * length * 2 * heads.kv * heads.width * width
        large = read > 128e6 * width
        shares[form] = float(np.median((read / seconds)[large])) / card.bandwidth_bytes_per_s
        found[f"decode attention {form}"].append(shares[form])
        if form == "bfloat16":
            found["decode attention, floor"].append(float(small[2]) * 1e6)
            found["decode attention, a sequence"].append(float(small[1] - small[0]) / 255e-6)
            prompt = float(tables.context_attention(heads, None, form, 1, 8192))
            operations = 4 * heads.query * heads.width * 8192 * 8193 / 2
            found["prompt attention"].append(operations / prompt / card.bf16_flop_per_s)
    if len(shares) == 2:
        found["fp8 cache over bf16"].append(shares["fp8"] / shares["bfloat16"])


def _matrix_shares(tables: ServingTables, card: GpuProfile, found: dict[str, list[float]]) -> None:
    peaks = (("bfloat16", 2, card.bf16_flop_per_s), ("fp8", 1, card.fp8_flop_per_s))
    for form, width, peak in peaks:
        if form not in tables.matrix_formats() or peak is None:
            continue
        sizes = [(out, wide) for out in (8192, 12288, 16384) for wide in (8192, 12288)]
        for rows in (8192, 2048, 512):
            reached = [2 * rows * o * w / float(tables.matrix(o, w, form, rows)) for o, w in sizes]
            found[f"matrices of {rows} rows {form}"].append(float(np.median(reached)) / peak)
        read = [o * w * width / float(tables.matrix(o, w, form, 4)) for o, w in sizes]
        share = float(np.median(read)) / card.bandwidth_bytes_per_s
        found[f"matrices of 4 rows {form} {card.memory_kind}"].append(share)


# --- (c) speed ---------------------------------------------------------------------------------


def estimates_a_second(folder: Path) -> float:
    """Whole decode steps of Llama-3.1-8B on an H200 by vLLM's kernels, in one call, one thread."""
    from kvtune.profiles.models import find_model

    tables = ServingTables(folder, "h200_sxm", "vllm")
    model = ServingModel(
        tables, find_model("llama-8b"), 1, "bfloat16", "bfloat16", "bfloat16", 4.8e12,
        Overheads(1e-6, 1e-4, 1e-6),
    )  # fmt: skip
    random = np.random.default_rng(0)
    batch, tokens = random.integers(1, 257, 200_000), random.integers(1, 65_536, 200_000)
    model.decode(batch[:10], tokens[:10])
    started = time.perf_counter()
    model.decode(batch, tokens)
    return len(batch) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = given.systems or require_systems_folder()
    report = {
        "tables": "aiconfigurator-core 0.12.0",
        "estimates_a_second": round(estimates_a_second(folder)),
        "systems_left_out": systems_left_out(folder, chips=False),
        "chips_left_out": systems_left_out(folder, chips=True),
        "achieved_shares": achieved_shares(folder),
        "points_left_out": points_left_out(folder),
    }  # fmt: skip
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in ("points_left_out", "systems_left_out", "chips_left_out"):
        print(name, report[name]["all"])  # type: ignore[index]
    print("estimates a second:", report["estimates_a_second"])


if __name__ == "__main__":
    main()
