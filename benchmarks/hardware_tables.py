"""How well times from NVIDIA's measured tables hold: points, systems and serving runs left out.

    python -m kvtune.benchmarks.hardware_tables --systems FOLDER --configs FOLDER --out FILE
    python -m kvtune.benchmarks.hardware_tables ... --runs-every 3 --out FILE  # a third of the runs

FOLDER are ``systems`` and ``model_configs`` of an unpacked ``aiconfigurator-core`` wheel (left out:
the installed one). No row of the tables is written, only errors.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import STACKS, SYSTEM_OF_CARD, read_table, require_systems_folder
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.models import ModelShape, shape_from_config
from kvtune.profiles.split import split_over
from kvtune.simulator.latency.elsewhere import (
    Heads,
    ServingTables,
    attention_features,
    attention_points,
)
from kvtune.simulator.latency.serving_kernels import Overheads, ServingModel
from kvtune.simulator.latency.table_grid import fit_grids

CARDS = {system: find_gpu(slug) for slug, system in SYSTEM_OF_CARD.items()}
ALIKE = {"b200_sxm": 1, "b300_sxm": 1, "gb200": 1, "gb300": 1}  # one chip; left out together too


def summary(ratios: Any) -> dict[str, float]:
    """Of predicted over measured."""
    found = np.asarray(ratios)
    wrong = np.abs(found - 1)
    return {
        "count": len(found),
        "median_error": round(float(np.median(wrong)), 4),
        "within_10_percent": round(float(np.mean(wrong <= 0.1)), 4),
        "low": round(float(np.quantile(found, 0.1)), 3),
        "middle": round(float(np.median(found)), 3),
        "high": round(float(np.quantile(found, 0.9)), 3),
    }


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


# --- (c) whole serving runs --------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One measured run with what the tables alone give for it, in seconds."""

    group: str
    stack: str
    layers: int
    several: bool
    concurrent: float
    generated: int
    decode: float
    prefill: float
    prefill_each: float
    ttft: float
    tpot: float


_SAME = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "nvidia/Qwen3-32B-NVFP4": "Qwen/Qwen3-32B",
}


def read_runs(folder: Path, configs: Path, every: int = 1) -> tuple[list[Run], dict[str, int]]:
    """Runs with aggregated serving that the model can answer, and why others are left out.

    Args:
        folder: the tables.
        configs: the models' configurations.
        every: take one row of so many, drawn by its number.
    """
    found, left = [], defaultdict(int)
    with (folder / "silicon_sample.csv").open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if number * 7919 % every:
                continue
            try:
                found.append(_run(row, folder, configs))
            except KvtuneError as error:
                left[error.message.split(":")[0]] += 1
    return found, dict(left)


def _run(row: dict[str, str], folder: Path, configs: Path) -> Run:
    def number(name: str) -> float:
        return float(row[name] or 1) or 1.0

    gpus = int(number("tp_size"))
    plain = all(number(n) == 1 for n in ("attention_dp_size", "pp_size", "moe_ep_size"))
    if row["mode"] != "agg" or not plain or gpus > 8:
        raise KvtuneError("disaggregated, expert or pipeline parallel, or more than 8 GPUs")
    shape = _shape(row["model_path"], configs)
    if shape.experts and row["moe_tp_size"] and int(number("moe_tp_size")) != gpus:
        raise KvtuneError("experts on another number of GPUs than attention")
    tables = ServingTables(folder, row["system"], row["backend"])  # type: ignore[arg-type]
    form, experts = _formats(row)
    kv = "fp8" if row["precision"] in ("fp8", "fp4") and _kv_fp8(row) else "bfloat16"
    bandwidth = CARDS[row["system"]].bandwidth_bytes_per_s
    nothing = Overheads(0.0, 0.0, 0.0)
    model = ServingModel(tables, shape, gpus, form, experts, kv, bandwidth, nothing)
    prompt, generated, batch = int(row["isl"]), int(row["osl"]), number("batch_size")
    if batch * split_over(shape, gpus).kv_bytes(prompt + generated, 1 if kv == "fp8" else 2) > (
        0.9 * CARDS[row["system"]].visible_bytes
    ):
        raise KvtuneError("more sequences than the cache holds")
    together = max(1, 8192 // prompt)
    return Run(
        group=f"{row['model_path']} {row['system']}", stack=row["backend"], layers=shape.layers,
        several=gpus > 1,
        concurrent=batch, generated=generated,
        decode=float(model.decode(batch, prompt + generated / 2)),
        prefill=float(model.prefill(prompt)),
        prefill_each=float(model.prefill(prompt, together)) / together,
        ttft=float(row["silicon_ttft_ms"]) / 1e3, tpot=float(row["silicon_tpot_ms"]) / 1e3,
    )  # fmt: skip


def _kv_fp8(row: dict[str, str]) -> bool:
    """The recipes of these runs set an fp8 cache."""
    return row["backend"] == "trtllm" or "Llama-3.1-70B" in row["model_path"]


def _formats(row: dict[str, str]) -> tuple[str, str]:
    """Of the matrices and of the experts; gpt-oss has experts in MXFP4 whatever the row says."""
    if "gpt-oss" in row["model_path"]:
        blackwell = row["backend"] == "trtllm" and row["system"].startswith(("b", "g"))
        return "bfloat16", "w4a8_mxfp4_mxfp8" if blackwell else "w4a16_mxfp4"
    return row["gemm_quant_mode"] or "bfloat16", row["moe_quant_mode"] or "bfloat16"


_SHAPES: dict[str, ModelShape] = {}


def _shape(model: str, configs: Path) -> ModelShape:
    if model not in _SHAPES:
        path = configs / f"{_SAME.get(model, model).replace('/', '--')}_config.json"
        if not path.is_file() or "Qwen3.5" in model or "GLM" in model:
            raise KvtuneError(f"{model} is of a kind that the tables are not read for")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(path.read_text())
            _SHAPES[model] = replace(shape_from_config(Path(folder)), name=model)
    return _SHAPES[model]


# What a run adds to its kernels. TPOT: a layer's and a step's overheads, and the prefills of the
# others, which stop the decoding of all. TTFT: the prefill by a factor, launches a layer, a step;
# all of it grows with a power of the sequences at once, and beside it waits the queue of prompts
# that arrive together. Parameters are positive: their logarithms are fitted.
TPOT_START = np.log([0.9, 8e-6, 1e-3, 5e-6])
TTFT_START = np.log([1.0, 0.4e-3, 1.0, 0.1, 0.1])


Columns = dict[str, Any]


def columns(runs: list[Run]) -> Columns:
    """Figures of the runs as arrays, by name."""
    names = [f.name for f in fields(Run) if f.name not in ("group", "stack")]
    return {name: np.array([getattr(run, name) for run in runs], dtype=float) for name in names}


def tpot(x: Any, of: Columns) -> Any:
    """Seconds a token."""
    share, layer, step, sequence = np.exp(x)
    others = (of["concurrent"] - 1) * of["prefill_each"] / of["generated"]
    own = of["decode"] + of["layers"] * layer + step + sequence * of["concurrent"]
    return own + share * others


def tpot_scaled(x: Any, of: Columns) -> Any:
    """Seconds a token with the kernels by a factor, and a time a layer where GPUs share it."""
    factor, shared, *others = x
    more = (np.exp(factor) - 1) * of["decode"] + np.exp(shared) * of["layers"] * of["several"]
    return tpot(np.array(others), of) + more


def ttft(x: Any, of: Columns) -> Any:
    """Seconds to the first token; the step is the measured one, so that errors are TTFT's own."""
    factor, layer, step, power, queue = np.exp(x)
    alone = factor * of["prefill"] + layer * of["layers"] + step * of["tpot"]
    waiting = (of["concurrent"] - 1) * of["prefill_each"]
    return alone * of["concurrent"] ** min(power, 1.0) + queue * waiting


def ttft_in_line(x: Any, of: Columns) -> Any:
    """Seconds to the first token as the sum of a prefill, a step, a fixed part and a queue."""
    fixed, queue, step = np.exp(x)
    waiting = (of["concurrent"] - 1) * of["prefill_each"]
    return of["prefill"] + fixed + step * of["tpot"] + queue * waiting


FUNCTIONS: dict[str, tuple[Any, str, Any]] = {
    "tpot": (tpot, "tpot", TPOT_START),
    "ttft": (ttft, "ttft", TTFT_START),
    "tpot: kernels by a factor": (
        tpot_scaled, "tpot", np.concatenate([[0.0, np.log(2e-6)], TPOT_START])
    ),
    "ttft: sum of its parts": (ttft_in_line, "ttft", np.log([10e-3, 0.1, 1.0])),
}  # fmt: skip


def fit(function: Any, runs: list[Run], kind: str, start: Any) -> Any:
    """Least absolute errors in the logarithm, held lightly at the start."""
    of = columns(runs)

    def loss(x: Any) -> float:
        off = np.mean(np.abs(np.log(function(x, of) / of[kind])))
        return float(off + 1e-3 * np.sum((x - start) ** 2))

    return minimize(loss, start, method="Nelder-Mead", options={"maxiter": 800}).x


def half_width(ratios: list[Any]) -> float:
    """The logarithm within which 80 % of errors are, each group counted alike whatever its size."""
    off = np.concatenate([np.abs(np.log(group)) for group in ratios])
    weights = np.concatenate([np.full(len(group), 1 / len(group)) for group in ratios])
    order = np.argsort(off)
    reached = np.cumsum(weights[order]) / np.sum(weights)
    return float(off[order][np.searchsorted(reached, 0.8)])


def runs_left_out(runs: list[Run], name: str) -> dict[str, Any]:
    """Each model on each system predicted by parameters of all others of its stack.

    The interval of a group is as wide as the errors of all other groups, themselves left out.
    """
    function, kind, start = FUNCTIONS[name]
    ratios: dict[str, Any] = {}
    fitted = {}
    for stack in STACKS:
        of_stack = [r for r in runs if r.stack == stack]
        if len({r.group for r in of_stack}) < 2:
            continue  # nothing to fit on where the only group is left out
        for group in sorted({r.group for r in of_stack}):
            others = [r for r in of_stack if r.group != group]
            held = columns([r for r in of_stack if r.group == group])
            if others:
                x = fit(function, others, kind, start)
                ratios[f"{stack} {group}"] = function(x, held) / held[kind]
        own = np.concatenate([r for name, r in ratios.items() if name.startswith(stack)])
        parameters = np.exp(fit(function, of_stack, kind, start))
        fitted[stack] = {
            "parameters": [float(f"{v:.3g}") for v in parameters],
            "left_out": summary(own),
        }
    inside = [
        np.abs(np.log(own)) <= half_width([r for other, r in ratios.items() if other != name])
        for name, own in ratios.items()
    ]
    return {
        "all": summary(np.concatenate(list(ratios.values()))),
        "inside_interval": round(float(np.mean(np.concatenate(inside))), 3),
        "interval_factor": round(float(np.exp(half_width(list(ratios.values())))), 3),
        "stacks": fitted, "each": {name: summary(own) for name, own in ratios.items()},
    }  # fmt: skip


def ways_tried(runs: list[Run]) -> dict[str, Any]:
    """The simpler ways, with nothing fitted."""
    token, first = (np.array([getattr(r, k) for r in runs]) for k in ("tpot", "ttft"))
    waiting = np.array([(r.concurrent - 1) * r.prefill_each for r in runs])
    generated = np.array([r.generated for r in runs])
    decode, prefill = (np.array([getattr(r, k) for r in runs]) for k in ("decode", "prefill"))
    return {
        "tpot: kernels of a decode step alone": summary(decode / token),
        "tpot: with the others' prefills": summary((decode + waiting / generated) / token),
        "ttft: the prefill alone": summary(prefill / first),
        "ttft: with one step": summary((prefill + token) / first),
        "ttft: with a tenth of the queue": summary((prefill + token + 0.1 * waiting) / first),
    }


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


# --- (d) speed ---------------------------------------------------------------------------------


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
    parser.add_argument("--configs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--runs-every", type=int, help="only whole runs, one row of so many, and nothing else"
    )
    given = parser.parse_args()
    folder = given.systems or require_systems_folder()
    configs = given.configs or folder.parent / "model_configs"
    runs, left = read_runs(folder, configs, given.runs_every or 1)
    of_runs = {
        "used": len(runs), "left_out_for": left,
        **{name: runs_left_out(runs, name) for name in FUNCTIONS}, "ways": ways_tried(runs),
    }  # fmt: skip
    if given.runs_every:
        of_runs = {"tables": "aiconfigurator-core 0.12.0", "one_of": given.runs_every, **of_runs}
        given.out.write_text(json.dumps(of_runs, indent=1) + "\n", encoding="utf-8")
        for name in FUNCTIONS:
            print(name, of_runs[name]["all"], "inside:", of_runs[name]["inside_interval"])
        return
    report = {
        "tables": "aiconfigurator-core 0.12.0",
        "estimates_a_second": round(estimates_a_second(folder)),
        "runs": of_runs,
        "systems_left_out": systems_left_out(folder, chips=False),
        "chips_left_out": systems_left_out(folder, chips=True),
        "achieved_shares": achieved_shares(folder),
        "points_left_out": points_left_out(folder),
    }  # fmt: skip
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in ("points_left_out", "systems_left_out", "chips_left_out"):
        print(name, report[name]["all"])  # type: ignore[index]
    for name in ("tpot", "ttft"):
        found = report["runs"][name]  # type: ignore[index]
        print(name, found["all"], "inside:", found["inside_interval"])
    print("estimates a second:", report["estimates_a_second"])


if __name__ == "__main__":
    main()
