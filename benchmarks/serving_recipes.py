"""Whole serving runs that others measured, with how each was started.

``silicon_sample.csv`` of NVIDIA's ``aiconfigurator-core`` has times of runs, hardly how they were
made. For most, the scripts are public (github.com/SemiAnalysisAI/InferenceX, which the rows' dates
lead to): what they say of formats, of tokens a step and of the requests is in
data/serving_recipes.csv, one line a recipe, the first that fits a row.
"""

from __future__ import annotations

import csv
import functools
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import SYSTEM_OF_CARD, Stack
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.models import ModelShape, shape_from_config
from kvtune.simulator.latency.stacks import KvFormat

CARDS = {system: find_gpu(slug) for slug, system in SYSTEM_OF_CARD.items()}
RECIPES = Path(__file__).parent / "data" / "serving_recipes.csv"

_PUBLISHED = {
    "Qwen3-32B": "Qwen/Qwen3-32B", "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "DeepSeek-R1": "deepseek-ai/DeepSeek-R1", "DeepSeek-V3": "deepseek-ai/DeepSeek-V3",
}  # fmt: skip

Row = dict[str, str]


@dataclass(frozen=True)
class Setting:
    """A model as it was served.

    Args:
        model, system, stack: whose run.
        gpus: that share each layer.
        matrices, experts, kv: number formats, as the tables name them.
        expert_parallel: groups of GPUs that have routed experts of their own.
    """

    model: str
    system: str
    stack: Stack
    gpus: int
    matrices: str
    experts: str
    kv: KvFormat
    expert_parallel: int = 1

    @property
    def card(self) -> GpuProfile:
        return CARDS[self.system]

    @property
    def plain_model(self) -> str:
        """The model, in whichever format its publisher or another stored it."""
        known = (model for name, model in _PUBLISHED.items() if name in self.model)
        return next(known, self.model)

    @property
    def group(self) -> str:
        """What is left out together: a model on a system with a stack."""
        return f"{self.stack} {self.model} {self.system}"


@dataclass(frozen=True)
class Run:
    """One serving run that others measured: what was asked of which machine, and its times.

    Args:
        setting: model and machine.
        concurrent: requests at once.
        prompt, generated: the most tokens of each.
        public: whether the run's script is.
        step_tokens: new tokens of a step, at most.
        hold_steps: for which prompts may be held back.
        poll_steps: between which the server does not look for new requests.
        ttft, tpot: seconds, means over the requests.
    """

    setting: Setting
    concurrent: int
    prompt: int
    generated: int
    public: bool
    step_tokens: int
    hold_steps: int
    ttft: float
    tpot: float
    poll_steps: int = 1


def read_runs(folder: Path, configs: Path, every: int = 1) -> tuple[list[Run], dict[str, int]]:
    """Runs with aggregated serving that the model can answer, and why others are left out.

    Args:
        folder: the tables.
        configs: the models' configurations.
        every: take one row of so many, drawn by its number.
    """
    found: dict[Run, None] = {}
    left: dict[str, int] = defaultdict(int)
    with (folder / "silicon_sample.csv").open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if number * 7919 % every:
                continue
            try:
                run = _run(row, configs)
                left["the same measurement twice"] += run in found
                found[run] = None
            except KvtuneError as error:
                left[error.message.split(":")[0]] += 1
    return list(found), dict(left)


def _run(row: Row, configs: Path) -> Run:
    gpus, groups = _number(row, "tp_size"), _number(row, "moe_ep_size")
    plain = all(_number(row, n) == 1 for n in ("attention_dp_size", "pp_size"))
    if row["mode"] != "agg" or not plain or gpus > 8:
        raise KvtuneError("disaggregated, attention or layers dealt out, or more than 8 GPUs")
    shape = shape_of(row["model_path"], configs)
    if shape.experts and row["moe_tp_size"] and _number(row, "moe_tp_size") * groups != gpus:
        raise KvtuneError("experts on another number of GPUs than attention")
    recipe, concurrent = _recipe(row), _concurrent(row)
    prompt, generated = int(row["isl"]), int(row["osl"])
    return Run(
        setting=Setting(
            row["model_path"], row["system"], row["backend"], gpus,  # type: ignore[arg-type]
            recipe["matrices"] or row["gemm_quant_mode"] or "bfloat16",
            recipe["experts"] or row["moe_quant_mode"] or "bfloat16",
            recipe["kv"], groups,  # type: ignore[arg-type]
        ),
        concurrent=concurrent, prompt=prompt, generated=generated,
        public="gap-analysis" not in row["silicon_data_source"],
        step_tokens=_step_tokens(recipe["step_tokens"], prompt, concurrent),
        hold_steps=_hold_steps(recipe, prompt, generated, gpus, concurrent),
        ttft=float(row["silicon_ttft_ms"]) / 1e3, tpot=float(row["silicon_tpot_ms"]) / 1e3,
        poll_steps=_poll_steps(recipe["poll_steps"], concurrent),
    )  # fmt: skip


def _step_tokens(told: str, prompt: int, concurrent: int) -> int:
    """``8192``; ``2x`` for two prompts; ``1x`` for one and all answers, ``1x, 8192`` at least."""
    if told == "2x":
        return 2 * prompt
    if not told.startswith("1x"):
        return int(told)
    one = (prompt + concurrent + 127) // 64 * 64
    return max(one, int(told.removeprefix("1x").removeprefix(", ") or 0))


def _hold_steps(recipe: Row, prompt: int, generated: int, gpus: int, concurrent: int) -> int:
    """Prompts are held back where both lengths are 1024, under a recipe's own condition."""
    held = {"gpus<8": gpus < 8, "concurrent>=64": concurrent >= 64}.get(recipe["hold"], False)
    return int(recipe["hold_steps"]) if held and prompt == generated == 1024 else 0


def _poll_steps(told: str, concurrent: int) -> int:
    """``10``, or ``10, 30 from 16`` requests at once on."""
    few, _, many = told.partition(", ")
    steps, _, least = many.partition(" from ")
    return int(steps if steps and concurrent >= int(least) else few or 1)


def _number(row: Row, name: str) -> int:
    return int(float(row[name] or 1)) or 1


def _concurrent(row: Row) -> int:
    told = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
    return int(told[1]) if told else _number(row, "batch_size")


@functools.cache
def _recipes() -> list[Row]:
    with RECIPES.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _recipe(row: Row) -> Row:
    """The first that fits; an empty field of a recipe fits every row."""
    told = re.search(r"measured=(\d{4}-\d\d-\d\d)", row["silicon_data_source"])
    measured = told[1] if told else ""
    names = {
        "model": "model_path",
        "system": "system",
        "stack": "backend",
        "precision": "precision",
        "gpus": "tp_size",
    }
    for recipe in _recipes():
        fits = all(recipe[name] in ("", row[column]) for name, column in names.items())
        if fits and (not recipe["until"] or measured < recipe["until"]):
            return recipe
    raise ValueError("the last recipe fits every row")


_SAME = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "nvidia/Qwen3-32B-NVFP4": "Qwen/Qwen3-32B",
    "moonshotai/Kimi-K2.5": "moonshotai/Kimi-K2-Instruct",  # its text model
}


@functools.cache
def shape_of(model: str, configs: Path) -> ModelShape:
    """The model's shape by its configuration in the wheel."""
    path = configs / f"{_SAME.get(model, model).replace('/', '--')}_config.json"
    if not path.is_file() or "Qwen3.5" in model or "GLM" in model:
        raise KvtuneError(f"{model} is of a kind that the tables are not read for")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(path.read_text())
        return replace(shape_from_config(Path(folder)), name=model)
