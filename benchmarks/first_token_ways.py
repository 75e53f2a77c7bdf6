"""Ways to predict first tokens better, chosen on half of the models and judged on the other half.

    python -m kvtune.benchmarks.first_token_ways --every 5 --out results/first-token-ways.json

Each way is one more term of a first token, fitted beside the others of ``hardware_runs.py``. Models
are halved as there (``held_out_models``), before any way was tried: a way is chosen by the errors
of the first half, each model and system left out of its own fit; the second half is predicted by
parameters of the first alone. The simulation is taken to be straight in its parameters here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.benchmarks import hardware_runs
from kvtune.benchmarks.hardware_runs import (
    NAMES,
    PRIOR,
    SPREAD,
    UNREAD,
    Fitted,
    Parameters,
    Pool,
    held_out_models,
    slopes,
)
from kvtune.benchmarks.serving_recipes import Run, read_runs, shape_of
from kvtune.profiles.elsewhere import require_systems_folder

Way = Callable[[Run, Parameters, bool], float]
"""Seconds of a first token by its run, its base times, and whether the model is a mixture."""


def _reading(base: Parameters) -> float:
    """What of a first token is no front end."""
    return float(max(base[0] - 0.02, 0.0))


WAYS: dict[str, Way] = {
    "server's work for others (taken)": lambda run, base, mixture: 0.3e-3 * run.concurrent,
    "queue of the first burst": lambda run, base, mixture: 0.05e-3 * run.concurrent,
    "prompts of mixtures read slower": lambda run, base, mixture: 0.1 * _reading(base) * mixture,
    "those on Hopper": lambda run, base, mixture: (
        0.1 * _reading(base) * (mixture and run.setting.system.startswith("h"))
    ),
    "waits by the root of the requests": lambda run, base, mixture: float(
        0.2 * base[1] * np.sqrt(run.concurrent)
    ),
    "a time a chunk": lambda run, base, mixture: float(
        5e-3 * np.ceil(run.prompt / run.step_tokens)
    ),
    "a time a GPU": lambda run, base, mixture: 5e-3 * run.setting.gpus,
    "half a step more": lambda run, base, mixture: float(0.5 * base[1]),
    "tokeniser beyond proportion": lambda run, base, mixture: 20e-3 * (run.prompt / 8192) ** 2,
}
OLD = len(NAMES) - 1  # the last parameter is what was taken of these ways


def without_taken(known: Fitted) -> Fitted:
    """The runs as they would be met without the way that was taken."""
    own = np.array([PRIOR[run.setting.stack][OLD] * run.concurrent for run in known.runs])
    base, slope = known.base.copy(), known.slope.copy()
    base[:, 0] -= own
    slope[:, 0] *= (known.base[:, 0] / base[:, 0])[:, None]
    return Fitted(known.runs, base, slope)


def errors(known: Fitted, terms: Parameters | None, kept: Any, asked: Any) -> Parameters:
    """Logarithms of predicted over measured first tokens of some runs, by parameters of others."""
    off = np.log(known.measured) - np.log(known.base[:, :2])
    slope, spread = known.slope[:, :, :OLD], SPREAD[:OLD]
    if terms is not None:
        more = np.stack([terms / known.base[:, 0], np.zeros(len(terms))], axis=1)
        slope, spread = np.concatenate([slope, more[:, :, None]], axis=2), np.append(spread, 1.0)
    found = np.zeros(len(off))
    for stack in PRIOR:
        own = kept & (known.stacks == stack)
        moved = np.zeros(len(spread))
        if own.any():
            rows = np.concatenate([0.5 * slope[own, 0], slope[own, 1]])
            ends = np.concatenate([0.5 * off[own, 0], off[own, 1]])
            moved = hardware_runs.fit(rows, ends, spread)
        mine = asked & (known.stacks == stack)
        found[mine] = slope[mine, 0] @ moved - off[mine, 0]
    return found[asked]


def judged(known: Fitted, terms: Parameters | None) -> dict[str, float]:
    """The median error on the half that ways are chosen by, and on the one held out."""
    held = held_out_models(known.runs)
    out = np.array([run.setting.plain_model in held for run in known.runs])
    groups = np.array([run.setting.group for run in known.runs])
    chosen = [
        errors(known, terms, ~out & (groups != group), groups == group)
        for group in np.unique(groups[~out])
    ]
    of_groups = [np.median(np.abs(np.exp(each) - 1)) for each in chosen]
    return {
        "chosen_half": round(float(np.median(np.abs(np.exp(np.concatenate(chosen)) - 1))), 4),
        "chosen_half_mean_of_groups": round(float(np.mean(of_groups)), 4),
        "held_out_half": round(
            float(np.median(np.abs(np.exp(errors(known, terms, ~out, out)) - 1))), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="one row of so many")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = require_systems_folder()
    configs = folder.parent / "model_configs"
    some, _ = read_runs(folder, configs, given.every)
    runs = [run for run in some if run.setting.plain_model not in UNREAD]
    pool = Pool(folder, configs, given.jobs)
    base = pool.times(runs, {stack: np.array(prior) for stack, prior in PRIOR.items()})
    known = without_taken(Fitted(runs, base, slopes(pool, runs, base)))
    mixtures = [shape_of(run.setting.model, configs).experts is not None for run in runs]
    report: dict[str, Any] = {"runs": len(runs), "as before": judged(known, None)}
    for name, way in WAYS.items():
        terms = np.array([way(*each) for each in zip(runs, known.base, mixtures, strict=True)])
        report[name] = judged(known, terms)
        print(name, report[name], flush=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
