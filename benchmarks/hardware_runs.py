"""Whole serving runs that others measured against serve-sim by a stack's tables, left out.

    python -m kvtune.benchmarks.hardware_runs --every 5 --out benchmarks/results/hardware-runs.json
    python -m kvtune.benchmarks.hardware_runs --systems FOLDER --configs FOLDER ... --out FILE

Each run is simulated with the load that its script made: a fixed number of clients, each of which
sends its next request when the last one is answered, ten requests a client, lengths drawn between
0.8 and 1 of what the row says (github.com/SemiAnalysisAI/InferenceX, benchmarks/benchmark_lib.sh,
utils/bench_serving). Of runs whose script is not public, lengths are drawn within a tenth of the
row's and the requests of each client (``WAVES``) were inferred from the runs.

What the tables do not hold (``NAMES``) is fitted: each model on each system is predicted by
parameters of all others of its stack. What was chosen by hand, ``WAVES`` among it, was chosen after
looking at rows of all models but those of ``UNREAD``, so that those errors are not of unseen runs.
``blind`` has those that are: of the models of ``UNREAD``, by parameters of the others; and of half
of the others, drawn once, by which nothing was chosen after the draw. No parameter is fitted on
``UNREAD``. No row of the tables is written, only errors.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.benchmarks.serving_recipes import Run, Setting, read_runs, shape_of
from kvtune.profiles.elsewhere import STACKS, Stack, require_systems_folder
from kvtune.profiles.split import split_over
from kvtune.profiles.stack_kernels.tables import ServingTables
from kvtune.simulator.latency.front_end import FrontEnd
from kvtune.simulator.latency.serving_kernels import ServingModel
from kvtune.simulator.latency.stack_overheads import Overheads
from kvtune.simulator.latency.stacks import KV_BYTES
from kvtune.simulator.serving.engine import Engine
from kvtune.simulator.serving.footprint import whole_footprint
from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.requests import Requests
from kvtune.simulator.serving.scheduler import Scheduler
from kvtune.simulator.serving.sequence import Footprint
from kvtune.simulator.serving.stack_times import StackGrids, StackTimes
from kvtune.simulator.serving.step import READING, Limits

BLOCK = 64
OTHER_BYTES = 3e9  # of a card beside weights and cache
MOST = 200  # requests of a run that are simulated, where two of each client are fewer
PUBLIC_WAVES, WAVES = 10, {"vllm": 10, "trtllm": 5, "sglang": 1}
WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int4_wo": 0.53}  # else 4 bits

NAMES = (
    "kernels", "small_kernel_s", "step_s", "sequence_s", "reading", "launches_s",
    "request_s", "token_s", "steps", "peer_s",
)  # fmt: skip
FRONT = NAMES.index("request_s")  # from here on what no step takes
PRIOR: dict[Stack, list[float]] = {
    "vllm": [1, 2.5e-6, 0.3e-3, 5e-6, 1, 0.6e-3, 20e-3, 3e-6, 1, 0.1e-3],
    "sglang": [1, 1.5e-6, 0.3e-3, 10e-6, 1, 0.4e-3, 20e-3, 3e-6, 1, 0.1e-3],
    "trtllm": [1, 1.5e-6, 0.3e-3, 5e-6, 1, 0.4e-3, 20e-3, 3e-6, 1, 0.1e-3],
}
SPREAD = np.array([0.07, 1e-6, 0.3e-3, 10e-6, 0.1, 0.3e-3, 15e-3, 3e-6, 1, 0.3e-3])
"""How far each parameter may well be from what is assumed before the fit. Both were set by hand,
with earlier fits of the same rows known (docs/hardware.md)."""

UNREAD = ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3", "moonshotai/Kimi-K2.5")
"""Models with latent attention, whose rows nobody had looked at before they were first judged."""

Parameters = np.ndarray[Any, np.dtype[np.float64]]


def overheads_of(x: Parameters) -> tuple[Overheads, FrontEnd]:
    """Parameters by name; none is negative."""
    named = dict(zip(NAMES, np.maximum(x, 0.0).tolist(), strict=True))
    front = FrontEnd(*(named.pop(name) for name in NAMES[FRONT:]))
    return Overheads(**named), front


# --- one run -----------------------------------------------------------------------------------


class Simulator:
    """Serves runs again; tables and grids of a setting are read once.

    Args:
        folder: the tables.
        configs: the models' configurations.
    """

    def __init__(self, folder: Path, configs: Path) -> None:
        self.folder, self.configs = folder, configs

    def times(self, run: Run, x: Parameters) -> tuple[float, float, float]:
        """Mean seconds to the first token, seconds a token, and tokens of a prompt."""
        requests = drawn(run)
        over, front = overheads_of(x)
        model, grids = self._grids(run.setting, max(512, run.concurrent))
        held, blocks = self._memory(run.setting, run.prompt + run.generated)
        each = 2 * (run.prompt + run.generated) // BLOCK
        memory = Memory(held, BLOCK, min(max(blocks, each), run.concurrent * each), 0)
        limits = Limits(
            run.concurrent, max(run.step_tokens, 2 * run.concurrent),
            reading=READING[run.setting.stack], hold_steps=run.hold_steps,
            poll_steps=run.poll_steps,
        )  # fmt: skip
        steps = StackTimes(replace(model, overheads=over), grids, "measured elsewhere")
        record = Engine(requests, Scheduler(memory, steps, limits), 10**9).run()
        first, done = np.array(record.first_s), np.array(record.finished_s)
        each = (done - first) / np.maximum(requests.output_tokens - 1, 1)
        prompts = float(requests.prompt_tokens.mean())
        waited = _as_of_all(first - np.array(record.arrived_s), run)
        beside = float(front.seconds(prompts, each.mean(), run.concurrent))
        return waited + beside, float(each.mean()), prompts

    @functools.cache  # noqa: B019  (one simulator a process)
    def _grids(self, setting: Setting, sequences: int) -> tuple[ServingModel, StackGrids]:
        shape = shape_of(setting.model, self.configs)
        tables = ServingTables(self.folder, setting.system, setting.stack)
        model = ServingModel(
            tables, shape, setting.gpus, setting.matrices, setting.experts, setting.kv,
            setting.card.bandwidth_bytes_per_s, Overheads(), setting.expert_parallel,
        )  # fmt: skip
        return model, StackGrids(model, sequences, 40_000, 40_000)

    @functools.cache  # noqa: B019
    def _memory(self, setting: Setting, tokens: int) -> tuple[Footprint, int]:
        """Bytes of a sequence, and blocks that the cards' memory has for all."""
        shape = split_over(shape_of(setting.model, self.configs), setting.gpus)
        longest = int(1.2 * tokens)
        held = whole_footprint(shape, np.array([16, longest]), KV_BYTES[setting.kv])
        form = setting.matrices if shape.experts is None else setting.experts
        weights = shape.parameters * WEIGHT_BYTES.get(form, 0.56)
        left = 0.9 * setting.card.visible_bytes - weights - OTHER_BYTES
        return held, int(left / (BLOCK * held.token))


def drawn(run: Run) -> Requests:
    """The requests of a run; of many alike, fewer are simulated."""
    waves = PUBLIC_WAVES if run.public else WAVES[run.setting.stack]
    low, high = (0.8, 1.0) if run.public else (0.9, 1.1)
    count = max(2, min(waves * run.concurrent, max(MOST, 2 * run.concurrent)))
    random = np.random.default_rng(run.concurrent)
    prompts, outputs = (
        random.integers(int(low * n), int(high * n), count, endpoint=True)
        for n in (run.prompt, run.generated)
    )
    return Requests(np.zeros(count), prompts, outputs, at_once=run.concurrent)


def _as_of_all(waited: Parameters, run: Run) -> float:
    """The mean wait, with those that all came at the start counted as often as in the whole run."""
    waves = PUBLIC_WAVES if run.public else WAVES[run.setting.stack]
    start, later = waited[: run.concurrent], waited[run.concurrent :]
    if not len(later):
        return float(start.mean())
    return float(start.mean() + (waves - 1) * later.mean()) / waves


_SIMULATOR: list[Simulator] = []


def _begin(folder: Path, configs: Path) -> None:
    _SIMULATOR.append(Simulator(folder, configs))


def _simulated(run: Run, x: Parameters) -> tuple[float, float, float]:
    return _SIMULATOR[0].times(run, x)


class Pool:
    """Simulates many runs on several processors, those of one setting always on the same one."""

    def __init__(self, folder: Path, configs: Path, jobs: int) -> None:
        begin = {"initializer": _begin, "initargs": (folder, configs)}
        self._workers = [ProcessPoolExecutor(1, **begin) for _ in range(jobs)]  # type: ignore[arg-type]
        self._place: dict[Setting, int] = {}

    def times(self, runs: Sequence[Run], of: dict[Stack, Parameters]) -> Parameters:
        """First token, time a token, and tokens of a prompt, a row a run."""
        asked = [self._submit(run, of[run.setting.stack]) for run in runs]
        return np.array([each.result() for each in asked])

    def _submit(self, run: Run, x: Parameters) -> Future[tuple[float, float, float]]:
        place = self._place.setdefault(run.setting, len(self._place) % len(self._workers))
        return self._workers[place].submit(_simulated, run, x)


# --- the fit -----------------------------------------------------------------------------------


def slopes(pool: Pool, runs: Sequence[Run], base: Parameters) -> Parameters:
    """How the logarithms of both times change with each parameter: ``[runs, 2, parameters]``."""
    found = []
    for place, step in enumerate(0.5 * SPREAD):
        if place >= FRONT:  # added to first tokens alone
            moved = base[:, :2].copy()
            at_once = np.array([run.concurrent for run in runs], float)
            each = (np.ones(len(base)), base[:, 2], base[:, 1], at_once)
            moved[:, 0] += step * each[place - FRONT]
        else:
            of = {stack: np.array(prior) for stack, prior in PRIOR.items()}
            for x in of.values():
                x[place] += step
            moved = pool.times(runs, of)[:, :2]
        found.append((np.log(moved) - np.log(base[:, :2])) / step)
    return np.stack(found, axis=-1)


def fit(slope: Parameters, off: Parameters, spread: Parameters = SPREAD) -> Parameters:
    """The least absolute errors in the logarithms, held lightly at what was assumed."""
    moved, weight = np.zeros(slope.shape[1]), np.ones(len(off))
    for _ in range(25):
        normal = (slope * weight[:, None]).T @ slope + np.diag(spread**-2.0)
        moved = np.linalg.solve(normal, (slope * weight[:, None]).T @ off)
        weight = 1 / np.maximum(np.abs(off - slope @ moved), 0.03)
    return moved


def parameters_of(kept: Any, slope: Parameters, off: Parameters, stack: Stack) -> Parameters:
    """Parameters of a stack by some of its runs; both times count, first tokens half."""
    rows = np.concatenate([0.5 * slope[kept, 0], slope[kept, 1]])
    return np.array(PRIOR[stack]) + fit(rows, np.concatenate([0.5 * off[kept, 0], off[kept, 1]]))


# --- results ------------------------------------------------------------------------------


def summary(ratios: Any) -> dict[str, float]:
    """How far predictions are from what was measured, by the ratios of the two."""
    found = np.asarray(ratios)
    if not len(found):
        return {"count": 0}
    wrong = np.abs(found - 1)
    return {
        "count": len(found),
        "median_error": round(float(np.median(wrong)), 4),
        "within_10_percent": round(float(np.mean(wrong <= 0.1)), 4),
        "low": round(float(np.quantile(found, 0.1)), 3),
        "middle": round(float(np.median(found)), 3),
        "high": round(float(np.quantile(found, 0.9)), 3),
    }


def half_width(ratios: Any, groups: Any) -> float:
    """The logarithm within which 80 % of errors are; a group counts by the root of its size."""
    off, names = np.abs(np.log(ratios)), np.asarray(groups)
    sizes = dict(zip(*np.unique(names, return_counts=True), strict=True))
    weight = np.array([sizes[name] ** -0.5 for name in names])
    order = np.argsort(off)
    reached = np.cumsum(weight[order]) / weight.sum()
    return float(off[order][np.searchsorted(reached, 0.8)])


def told(ratios: Any, runs: Sequence[Run]) -> dict[str, Any]:
    """Errors of one time, by stack, by whether the run's script is public, and by group."""
    groups = np.array([run.setting.group for run in runs])
    stacks = np.array([run.setting.stack for run in runs])
    public = np.array([run.public for run in runs])
    inside = np.zeros(len(runs), bool)
    for group in np.unique(groups):
        own = groups == group
        inside[own] = np.abs(np.log(ratios[own])) <= half_width(ratios[~own], groups[~own])
    return {
        "all": summary(ratios),
        "inside_interval": round(float(inside.mean()), 3),
        "interval_factor": round(float(np.exp(half_width(ratios, groups))), 3),
        "script_public": summary(ratios[public]),
        "script_unknown": summary(ratios[~public]),
        "stacks": {stack: summary(ratios[stacks == stack]) for stack in np.unique(stacks)},
        "each": {group: summary(ratios[groups == group]) for group in np.unique(groups)},
    }


@dataclass(frozen=True)
class Fitted:
    """Runs, how the simulation meets them as assumed, and how it changes with each parameter.

    Args:
        runs: that were measured.
        base: times as assumed, a row a run.
        slope: ``[runs, 2, parameters]``.
    """

    runs: Sequence[Run]
    base: Parameters
    slope: Parameters

    @property
    def measured(self) -> Parameters:
        return np.array([[run.ttft, run.tpot] for run in self.runs])

    @property
    def stacks(self) -> Any:
        return np.array([run.setting.stack for run in self.runs])

    def parameters(self, kept: Any) -> dict[Stack, Parameters]:
        """Of each stack, by some of the runs; as assumed where none of them is the stack's."""
        off, stacks = np.log(self.measured) - np.log(self.base[:, :2]), self.stacks
        own = {stack: kept & (stacks == stack) for stack in STACKS}
        return {
            stack: parameters_of(rows, self.slope, off, stack)
            if rows.any() else np.array(PRIOR[stack])
            for stack, rows in own.items()
        }  # fmt: skip


def judged(pool: Pool, runs: Sequence[Run], unread: Sequence[Run]) -> dict[str, Any]:
    """Every group by parameters of all others of its stack; and blind, by those of other models."""
    base = pool.times(runs, {stack: np.array(prior) for stack, prior in PRIOR.items()})
    print("nothing fitted:", np.median(abs(base[:, 1] / [r.tpot for r in runs] - 1)), flush=True)
    known = Fitted(runs, base, slopes(pool, runs, base))
    blind = judged_blind(pool, known, unread)
    print("blind:", {name: each["tpot"]["all"] for name, each in blind.items()}, flush=True)
    groups = np.array([run.setting.group for run in runs])
    ratios = np.zeros_like(known.measured)
    for group in np.unique(groups):
        own = groups == group
        ratios[own] = ratios_of(pool, _where(runs, own), known.parameters(~own))
    assumed, of_all = base[:, :2] / known.measured, known.parameters(np.ones(len(runs), bool))
    return {
        "parameters": {
            stack: dict(zip(NAMES, [float(f"{v:.3g}") for v in x], strict=True))
            for stack, x in of_all.items()
        },
        "blind": blind,
        "tpot": told(ratios[:, 1], runs),
        "ttft": told(ratios[:, 0], runs),
        "nothing_fitted": {
            "tpot": summary(assumed[:, 1]), "ttft": summary(assumed[:, 0])
        },
    }  # fmt: skip


def judged_blind(pool: Pool, known: Fitted, unread: Sequence[Run]) -> dict[str, Any]:
    """Models that no choice was made by, predicted by parameters of others alone.

    ``half``: those of ``held_out_models``, by the others that had been read before. ``unread``:
    models whose rows were never read before they were judged here, by all that had been.
    """
    held = held_out_models(known.runs)
    out = np.array([run.setting.plain_model in held for run in known.runs])
    half, every = _where(known.runs, out), np.ones(len(known.runs), bool)
    asked = {"half": (half, ~out), "unread": (unread, every)}
    found = {}
    for name, (runs, kept) in asked.items():
        ratios = ratios_of(pool, runs, known.parameters(kept))
        found[name] = {
            "models": sorted({run.setting.plain_model for run in runs}),
            "tpot": told(ratios[:, 1], runs), "ttft": told(ratios[:, 0], runs),
        }  # fmt: skip
    return found


def held_out_models(runs: Sequence[Run]) -> set[str]:
    """A half of the models that had been read, drawn once: nothing new is chosen by their rows."""
    names = sorted({run.setting.plain_model for run in runs})
    return set(np.random.default_rng(0).permutation(names)[1::2].tolist())


def ratios_of(pool: Pool, runs: Sequence[Run], of: dict[Stack, Parameters]) -> Parameters:
    """Predicted over measured: first token and time a token, a row a run."""
    return pool.times(runs, of)[:, :2] / np.array([[run.ttft, run.tpot] for run in runs])


def _where(runs: Sequence[Run], chosen: Any) -> list[Run]:
    return [run for run, is_chosen in zip(runs, chosen, strict=True) if is_chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=Path, help="left out: the installed wheel's")
    parser.add_argument("--configs", type=Path)
    parser.add_argument("--every", type=int, default=1, help="one row of so many")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = given.systems or require_systems_folder()
    configs = given.configs or folder.parent / "model_configs"
    some, left = read_runs(folder, configs, given.every)
    runs = [run for run in some if run.setting.plain_model not in UNREAD]
    unread = [run for run in read_runs(folder, configs)[0] if run.setting.plain_model in UNREAD]
    report = {
        "tables": "aiconfigurator-core 0.12.0", "one_of": given.every,
        "used": len(runs), "left_out_for": left,
        **judged(Pool(folder, configs, given.jobs), runs, unread),
    }  # fmt: skip
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in ("tpot", "ttft"):
        print(name, report[name]["all"], "inside:", report[name]["inside_interval"])


if __name__ == "__main__":
    main()
