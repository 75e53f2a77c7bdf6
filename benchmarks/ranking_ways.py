"""Ways to rank policies of very different kinds by prediction, compared on recorded runs.

    python benchmarks/ranking_ways.py --out benchmarks/results/ranking-ways.json

Runs of ``predictions.py`` hold what 98 mixed policies lose live on six kinds of text, and what
several predictions say; the first of them knew ways that are no longer made. Each way is judged by
its rank correlation with the live loss, over all of them and over those that leave at least a third
of the full cache's right answers: where less is left, all that was asked for is lost, and the rest
of the order is noise that no plan is chosen by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from kvtune.common.files import write_json
from kvtune.simulator.quality.calibration import ASKED

Array = NDArray[np.float64]
RESULTS = Path(__file__).parent / "results"
RUNS = {
    "predictions-h200.json": "SmolLM2, 1,792 tokens, first run",
    "predictions-2-h200.json": "SmolLM2, 1,792 tokens",
    "predictions-middle-smollm2-h200.json": "SmolLM2, 896 tokens",
    "predictions-short-smollm2-h200.json": "SmolLM2, 384 tokens",
    "predictions-short-gemma-3-270m-h200.json": "Gemma-3-270M, 384 tokens",
}
BARE = "streaming_llm 3% bf16"
"""The policy that keeps least of the mixed ones: what it loses bounds what others may lose."""
LEFT = 1 / 3  # of the full cache's right answers


@dataclass(frozen=True)
class Mixed:
    """The mixed policies of a recorded run of ``predictions.py``."""

    data: dict[str, Any]

    @property
    def ids(self) -> list[str]:
        return list(self.data["mixed by sample"])

    @property
    def kinds(self) -> list[str]:
        return sorted({self.kind(each) for each in self.ids})

    def kind(self, sample: str) -> str:
        return str(self.data["samples"][sample]["kind"])

    def of(self, name: str, kinds: Sequence[str]) -> Array:
        """A figure of every policy, its mean over the samples of some kinds, ``[B]``."""
        rows = self.data["mixed by sample"]
        picked = [rows[each][name] for each in self.ids if self.kind(each) in kinds]
        return np.array(picked, float).mean(0)

    @property
    def evicting(self) -> NDArray[np.bool_]:
        return np.array([each["group"] != "quantised" for each in self.data["mixed"]])

    @property
    def leaves_answers(self) -> NDArray[np.bool_]:
        """Policies after which enough answers are still right."""
        asked = [each for each in self.ids if self.data["samples"][each]["answers"]]
        full = [self.data["mixed by sample"][each]["full right"] for each in asked]
        right = self.of("right", sorted({self.kind(each) for each in asked}))
        return np.asarray(right > LEFT * float(np.mean(full)))


def plain(name: str) -> Callable[[Mixed, Sequence[str]], Array]:
    """A recorded prediction as it is."""
    return lambda mixed, kinds: mixed.of(name, kinds)


def parts(probes: str, times: float) -> Callable[[Mixed, Sequence[str]], Array]:
    """Add eviction's loss, weighted by ``times``, to quantisation's, without cross terms."""

    def way(mixed: Mixed, kinds: Sequence[str]) -> Array:
        evicting = mixed.of(f"{probes}, evicting", kinds)
        return mixed.of(f"{probes}, quantising", kinds) + times * evicting

    return way


def bounded(name: str, times: float = 1.0) -> Callable[[Mixed, Sequence[str]], Array]:
    """As ``parts``, bounded by what a policy loses live on each text that keeps hardly anything."""

    def way(mixed: Mixed, kinds: Sequence[str]) -> Array:
        rows = mixed.data["mixed by sample"]
        bare = next(n for n, each in enumerate(mixed.data["mixed"]) if each["name"] == BARE)
        found = []
        for sample in (each for each in mixed.ids if mixed.kind(each) in kinds):
            row = {key: np.array(rows[sample][key], float) for key in ("live", f"{name}, all")}
            row |= {part: np.array(rows[sample][f"{name}, {part}"], float) for part in PARTS}
            loss = row["quantising"] + times * row["evicting"] if times > 1 else row[f"{name}, all"]
            most = row["live"][bare]
            found.append(most * -np.expm1(-loss / most))
        return np.asarray(np.mean(found, 0))

    return way


def evenly(name: str) -> Callable[[Mixed, Sequence[str]], Array]:
    """The geometric mean over samples, in which no text counts more because it loses more."""

    def way(mixed: Mixed, kinds: Sequence[str]) -> Array:
        rows = mixed.data["mixed by sample"]
        some = [rows[each][name] for each in mixed.ids if mixed.kind(each) in kinds]
        return np.asarray(np.exp(np.log(np.maximum(np.array(some, float), 1e-9)).mean(0)))

    return way


PARTS = ("quantising", "evicting")


def maps(name: str) -> Callable[[Mixed, Sequence[str]], Array]:
    """A rising map a regime and sort of text, fitted on the other kinds of that sort."""

    def way(mixed: Mixed, kinds: Sequence[str]) -> Array:
        found = np.zeros(len(mixed.data["mixed"]))
        for kind in kinds:
            alike = (k for k in mixed.kinds if (k in ASKED) == (kind in ASKED))
            others = [k for k in alike if k != kind]
            for regime in (mixed.evicting, ~mixed.evicting):
                x = np.concatenate([mixed.of(name, [k])[regime] for k in others])
                y = np.concatenate([mixed.of("live", [k])[regime] for k in others])
                found[regime] += mapped(x, y, mixed.of(name, [kind])[regime]) / len(kinds)
        return found

    return way


def mapped(x: Array, y: Array, new: Array) -> Array:
    """``new`` through the rising map that is nearest to the pairs, in logarithms."""
    order = np.argsort(x)
    fitted = isotonic_regression(np.log(y[order])).x
    return np.exp(np.interp(np.log(new), np.log(x[order]), fitted))


WAYS = {
    "probes, blocks of 16": plain("probes, all"),
    "probes, row by row": plain("probes, block 1"),
    "Fisher's probes": plain("fisher, all"),
    "log-odds at a reach of 2 nats": plain("reach 2, all"),
    "exact link of the log-odds": plain("link"),
    "evicted counts twice": parts("probes", 2.0),
    "Fisher's, evicted counts twice": parts("fisher", 2.0),
    "maps by regime": maps("probes, all"),
    "exact link, maps by regime": maps("link"),
    "bounded by what hardly any prompt loses": bounded("probes"),
    "the same, evicted counts twice": bounded("probes", 2.0),
    "geometric mean over texts": evenly("probes, all"),
    "bounded position by position, blocks of 16": plain("probes, saturated"),
    "bounded position by position, row by row": plain("probes, saturated rows"),
}
ANSWERS = {
    "answer rows": plain("probes, answers"),
    "answer rows, exact link": plain("link, answers"),
    "probes of answer rows": plain("answers, blocks"),
    "the whole sample": plain("probes, all"),
    "the whole sample, evicted counts twice": parts("probes", 2.0),
    "the whole sample, bounded, evicted counts twice": bounded("probes", 2.0),
    "answer rows, bounded": plain("probes, saturated answers"),
    "the whole sample, bounded position by position": plain("probes, saturated rows"),
}


def judged(
    mixed: Mixed,
    ways: dict[str, Callable[[Mixed, Sequence[str]], Array]],
    live: str,
    kinds: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Rank correlation of every way with a live loss: of all policies, of those that leave some.

    A way whose figures a run did not record is left out.
    """
    truth, some = mixed.of(live, kinds), mixed.leaves_answers
    found = {}
    for name, way in ways.items():
        try:
            ours = way(mixed, kinds)
        except KeyError:
            continue
        pairs = {"all": (ours, truth), "answers left": (ours[some], truth[some])}
        found[name] = {who: round(float(spearmanr(*p).statistic), 4) for who, p in pairs.items()}
    return found


def of_run(mixed: Mixed, label: str) -> dict[str, Any]:
    """Every way on one recorded run."""
    asked = [kind for kind in mixed.kinds if kind in ("retrieval", "recall")]
    return {
        "run": label,
        "policies": len(mixed.data["mixed"]),
        "that leave answers": int(mixed.leaves_answers.sum()),
        "all rows": judged(mixed, WAYS, "live", mixed.kinds),
        "answer rows": judged(mixed, ANSWERS, "live, answers", asked),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = {}
    for file, label in RUNS.items():
        if not (RESULTS / file).is_file():
            continue
        data = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        if data.get("mixed by sample"):  # a run that was cut short may hold plans alone
            found[file] = of_run(Mixed(data), label)
    write_json(arguments.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
