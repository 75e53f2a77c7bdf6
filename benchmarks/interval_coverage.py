"""How often intervals of a mean loss hold the true mean, by simulation, with few samples a kind.

    python benchmarks/interval_coverage.py --out benchmarks/results/interval-coverage.json

Documents are what is drawn: a text's loss is one number. Losses of three kinds of text, whose means
differ by as much as kinds do, are drawn from four laws and from what was recorded live (each
plan's loss on a text over its mean on that kind, of ``--recorded`` runs of ``predictions.py``).
Compared are what kvtune prints (Student's t in logarithms with Welch's degrees of freedom), the
same without logarithms, the bootstrap's percentiles, and the bootstrap corrected for bias and skew
(BCa; Efron 1987). The asked level is 95 %.

Of a kind of text alone, whose few texts say little of how they differ, are compared what kvtune
prints (a t moderated by what other kinds' texts differ by), the kind's own t in logarithms, and
BCa; there is a law more, in which one kind scatters four times as much as another.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as students

from kvtune.common.files import write_json
from kvtune.tuner.quality import estimate_by_kind, mean_interval

Array = NDArray[np.float64]
Interval = Callable[[Array, np.random.Generator], tuple[float, float]]
LEVEL = 0.95
KIND_MEANS = (1.0, 1.6, 2.5)
SIZES = (2, 3, 4, 8, 16)
REDRAWN = 400
SMALL_SPREAD, LARGE_SPREAD = 0.3, 0.8  # of logarithms
UNLIKE_SPREADS = (0.2, 0.4, 0.8)  # of three kinds


def laws(recorded: Array | None) -> dict[str, Callable[[np.random.Generator, Any], Array]]:
    """Losses over their mean, by the name of their law."""

    def lognormal(spread: float) -> Callable[[np.random.Generator, Any], Array]:
        return lambda rng, size: rng.lognormal(-(spread**2) / 2, spread, size)

    found = {
        "log-normal, little spread": lognormal(SMALL_SPREAD),
        "log-normal, much spread": lognormal(LARGE_SPREAD),
        "exponential": lambda rng, size: rng.exponential(1.0, size),
        "gamma, shape 4": lambda rng, size: rng.gamma(4.0, 1 / 4, size),
    }
    if recorded is not None:
        found["recorded live"] = lambda rng, size: rng.choice(recorded, size)
    return found


def recorded_ratios(files: list[Path]) -> Array:
    """Every plan's live loss on a text over its mean on texts of that kind, of all runs; mean 1.

    With n texts of a kind, deviations from their own mean are made wider by sqrt(n / (n - 1)).
    """
    ratios: list[float] = []
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows, about = found["plans by sample"], found["samples"]
        for kind in sorted({each["kind"] for each in about.values()}):
            lives = np.array(
                [row["live"] for id_, row in rows.items() if about[id_]["kind"] == kind]
            )
            wider = np.sqrt(len(lives) / (len(lives) - 1))
            deviations = (lives / lives.mean(0) - 1) * wider
            ratios += np.maximum(1 + deviations, 0.01).ravel().tolist()
    pooled = np.array(ratios)
    return np.asarray(pooled / pooled.mean())


def printed(losses: Array, _: np.random.Generator) -> tuple[float, float]:
    """What kvtune prints."""
    kinds = np.repeat([str(kind) for kind in range(len(losses))], losses.shape[1])
    return mean_interval(losses.ravel(), kinds.tolist(), LEVEL)


def welch(losses: Array, _: np.random.Generator) -> tuple[float, float]:
    """Student's t with Welch's degrees of freedom."""
    squares = losses.var(1, ddof=1) / losses.shape[1] / len(losses) ** 2
    freedom = squares.sum() ** 2 / (squares**2 / (losses.shape[1] - 1)).sum()
    reach = students.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(squares.sum())
    return float(losses.mean() - reach), float(losses.mean() + reach)


def redrawn(losses: Array, rng: np.random.Generator) -> Array:
    """Means over texts redrawn within each kind."""
    at = rng.integers(losses.shape[1], size=(REDRAWN, *losses.shape))
    return np.asarray(np.take_along_axis(losses[None], at, 2).mean((1, 2)))


def percentiles(losses: Array, rng: np.random.Generator) -> tuple[float, float]:
    """The bootstrap's percentiles."""
    low, high = np.percentile(redrawn(losses, rng), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def corrected(losses: Array, rng: np.random.Generator) -> tuple[float, float]:
    """BCa: percentiles moved by the bias of the redrawn means and by their skew."""
    means = redrawn(losses, rng)
    bias = norm.ppf(np.clip((means < losses.mean()).mean(), 1 / REDRAWN, 1 - 1 / REDRAWN))
    away = (losses - losses.mean(1, keepdims=True)).ravel()  # a text's influence on the mean
    spread = (away**2).sum() ** 1.5
    skew = (away**3).sum() / (6 * spread) if spread else 0.0
    ends = bias + norm.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.quantile(means, norm.cdf(bias + ends / (1 - skew * ends)))
    return float(low), float(high)


INTERVALS: dict[str, Interval] = {
    "printed": printed,
    "Student's t": welch,
    "bootstrap, percentiles": percentiles,
    "bootstrap, BCa": corrected,
}


def coverage(files: list[Path], draws: int) -> Iterator[dict[str, Any]]:
    """One row for each law and number of texts a kind."""
    means = np.array(KIND_MEANS)[:, None]
    for law, draw in laws(recorded_ratios(files) if files else None).items():
        for size in SIZES:
            rng = np.random.default_rng(0)
            held = dict.fromkeys(INTERVALS, 0)
            for _ in range(draws):
                losses = means * draw(rng, (len(means), size))
                for name, interval in INTERVALS.items():
                    low, high = interval(losses, rng)
                    held[name] += low <= means.mean() <= high
            shares = {name: round(count / draws, 4) for name, count in held.items()}
            yield {"law": law, "texts of a kind": size, "holds the mean": shares}


def moderated(losses: Array, _: np.random.Generator) -> Array:
    """What kvtune prints of each kind alone, ``[kinds, 2]``."""
    kinds = np.repeat([str(kind) for kind in range(len(losses))], losses.shape[1]).tolist()
    found = estimate_by_kind(losses.ravel(), kinds, "live").values()
    return np.array([(each.low, each.high) for each in found])


def each_alone(interval: Interval) -> Callable[[Array, np.random.Generator], Array]:
    """An interval of a mean over kinds, of each kind by itself."""
    return lambda losses, rng: np.array([interval(row[None], rng) for row in losses])


BY_KIND = {
    "printed": moderated,
    "its own t in logarithms": each_alone(printed),
    "its own bootstrap, BCa": each_alone(corrected),
}


def coverage_by_kind(files: list[Path], draws: int) -> Iterator[dict[str, Any]]:
    """The same of single kinds: on average, and of the kind that is held least often."""
    means = np.array(KIND_MEANS)[:, None]
    spreads = np.array(UNLIKE_SPREADS)[:, None]
    unlike = {
        "log-normal, unlike kinds": lambda rng, size: rng.lognormal(
            -(spreads**2) / 2, spreads, size
        )
    }
    for law, draw in (laws(recorded_ratios(files) if files else None) | unlike).items():
        for size in SIZES[:-1]:
            rng = np.random.default_rng(0)
            held = {name: np.zeros(len(means)) for name in BY_KIND}
            wide: dict[str, list[float]] = {name: [] for name in BY_KIND}
            for _ in range(draws):
                losses = means * draw(rng, (len(means), size))
                for name, interval in BY_KIND.items():
                    ends = interval(losses, rng)
                    held[name] += (ends[:, :1] <= means).ravel() & (means <= ends[:, 1:]).ravel()
                    wide[name].append(float(np.median(ends[:, 1] / losses.mean(1))))
            yield {
                "law": law,
                "texts of a kind": size,
                "holds a kind's mean": {
                    n: round(float(h.mean()) / draws, 4) for n, h in held.items()
                },
                "of the kind held least": {
                    n: round(float(h.min()) / draws, 4) for n, h in held.items()
                },
                "upper end over the mean": {
                    n: round(float(np.median(w)), 3) for n, w in wide.items()
                },
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recorded", type=Path, nargs="*", default=[])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for row in coverage(arguments.recorded, arguments.draws):
        rows.append(row)
        print(row["law"], row["texts of a kind"], row["holds the mean"], flush=True)
    alone = []
    for row in coverage_by_kind(arguments.recorded, arguments.draws):
        alone.append(row)
        print(row["law"], row["texts of a kind"], row["holds a kind's mean"], flush=True)
    setting = {"kinds": KIND_MEANS, "level": LEVEL, "draws": arguments.draws, "redrawn": REDRAWN}
    recorded = [file.name for file in arguments.recorded]
    write_json(arguments.out, {**setting, "recorded": recorded, "coverage": rows, "by kind": alone})


if __name__ == "__main__":
    main()
