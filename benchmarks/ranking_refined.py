"""A refining run: live runs of mixed policies, few or short, refit what is predicted of all.

    python benchmarks/ranking_refined.py --device cuda --seconds 290 --records FOLDER --out FILE

98 mixed policies run live on texts of six kinds. What some of them, chosen by what is predicted
alone, lost on one set of texts, or all of them on a third set of short texts, moves what is
predicted of all of them, which are then ranked on the second set; no two sets share a document, and
policies that ran on neither are ranked by themselves too. Predictions are bounded by what hardly
any prompt leaves (``ranking_shapes.py``); what is learned is carried over by likeness
(``ranking_alike.py``) or by levels that are refitted. ``--records FOLDER`` keeps what was measured,
and what lies there is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from policies_mixed import mixed_policies
from predictions import KINDS
from predictions_pages import ON_SHORT
from ranking_alike import apart, cosines, moved, moves
from ranking_rows import Record, groups_of, record
from ranking_shapes import FREE, Shape, Texts, predictions, refined
from scipy.stats import rankdata
from torch import Tensor

from kvtune.common.files import write_json
from kvtune.traces.models import load_model
from kvtune.traces.probes import Probes
from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import Workload, build

SHORT, REFINING, TEST = "search", "select", "evaluate"
"""The splits that the three sets of texts are cut from."""
RUNS = (8, 16, 32)
"""Policies of a refining run, of 98."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        tokens: of a text, with the observed ones.
        observed: of those.
        each: texts a kind, of refining and of testing.
        kinds: of text.
        every: how many policies one is taken of.
        short: tokens and observed tokens of a short text.
        short_each: short texts a kind.
    """

    tokens: int
    observed: int
    each: int
    kinds: tuple[str, ...] = KINDS
    every: int = 1
    short: tuple[int, int] = (448, 64)
    short_each: int = 4

    def samples(self, tokenizer: Any, seed: int) -> list[Sample]:
        """Of all three sets by turns, so that any first part of them is balanced."""
        counts = dict.fromkeys(self.kinds, self.each)
        long = Workload(
            {REFINING: counts, TEST: counts}, tokens=self.tokens, observed=self.observed, seed=seed
        )
        short = {SHORT: dict.fromkeys(self.kinds, self.short_each)}
        tokens, observed = self.short
        few = replace(long, counts=short, tokens=tokens, observed=observed)
        return by_turns([*build(few, tokenizer), *build(long, tokenizer)])


SIZES = {
    "whole": Size(2048, 256, 2),
    "once": Size(2048, 256, 1, short_each=2),
    "middle": Size(1024, 128, 2),
    "short": Size(448, 64, 2, short_each=0),
    "few": Size(448, 64, 1, ("prose", "retrieval", "copy"), 2, short_each=0),
    "tiny": Size(448, 32, 1, ("retrieval",), 7, (384, 32), 1),
}
REDRAWN = 1000


@dataclass(frozen=True)
class Judged:
    """Rank correlations on the test texts.

    Args:
        test: what is predicted.
        rows: policies that count.
    """

    test: Texts
    rows: NDArray[np.int64]

    def of(self, losses: dict[str, Tensor]) -> dict[str, Any]:
        """Over all kinds of text, on each, and of answers alone, by their whole texts.

        Args:
            losses: predicted, of every policy by kind of text.
        """
        live = {kind: self.test.live(kind) for kind in losses}
        asked = self.test.asked
        found = {"all": self.rank(_over(losses), _over(live))}
        found |= {kind: self.rank(losses[kind], live[kind]) for kind in losses}
        if asked:
            seen = torch.stack([self.test.live(kind, answers=True) for kind in asked]).mean(0)
            found["answers"] = self.rank(_over({kind: losses[kind] for kind in asked}), seen)
        return found

    def rank(self, ours: Tensor, live: Tensor) -> dict[str, float]:
        """Spearman's correlation, with a 95 % interval over redrawn policies."""
        both = np.stack([each.double().numpy()[self.rows] for each in (ours, live)])
        at = np.random.default_rng(0).integers(both.shape[1], size=(REDRAWN, both.shape[1]))
        low, high = np.percentile(_spearman(both[:, at]), [2.5, 97.5])
        found = {"value": _spearman(both[:, None])[0], "low": low, "high": high}
        return {name: round(float(value), 4) for name, value in found.items()}


def _spearman(both: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of pairs of rows, ``[2, n, B]``: the correlation of ranks, ``[n]``."""
    ranks = rankdata(both, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    product = (ranks[0] * ranks[1]).sum(-1)
    return np.asarray(product / np.sqrt((ranks**2).sum(-1).prod(0)))


def _over(losses: dict[str, Tensor]) -> Tensor:
    """The mean over kinds."""
    return torch.stack(list(losses.values())).mean(0)


def compared(texts: dict[str, Texts], say: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every way, and what a set of texts says of another by its live losses alone."""
    seen, test = texts[REFINING], texts[TEST]
    every = np.arange(len(test.groups))
    whole = Judged(test, every)
    yield "tables, nothing refined", whole.of({kind: test.in_blocks(kind) for kind in test.kinds})
    yield "live on the other texts, all 98", whole.of({k: seen.live(k) for k in test.kinds})

    def told(
        name: str, losses: dict[str, Tensor], rows: Tensor, shape: Shape | None = None
    ) -> tuple[str, dict[str, Any]]:
        unseen = Judged(test, np.setdiff1d(every, rows.numpy()))
        short = len(every) if name.startswith(ON_SHORT) else 0
        found: dict[str, Any] = {"by": name, "live runs": len(rows), "on short texts": short}
        if shape:
            found["shape"] = {k: np.round(v.tolist(), 3).tolist() for k, v in vars(shape).items()}
        found["ranks"] = whole.of(losses)
        if len(unseen.rows) and not short:
            found["ranks of policies that did not run"] = unseen.of(losses)
        found["live over predicted, median"] = _levels(test, losses)
        say(f"{name}, {len(rows)}: {found['ranks']['all']}")
        return f"{name}, {short + len(rows)} live runs", found

    none, all_ = torch.arange(0), torch.arange(len(every))
    start, known = Shape.start(), Shape.known()
    before, after = predictions(seen, start), predictions(test, start)
    yield told("bounded by row", after, none)
    yield told("as two short texts had it", predictions(test, known), none, known)
    alike = cosines(seen)
    chosen = [apart(_over(before), seen.groups, count) for count in RUNS]
    for rows in chosen:
        by = moves(seen, before, rows, alike)
        yield told("bounded by row, alike", moved(after, by), rows)
    if texts[SHORT].records:
        short = texts[SHORT]
        first = moves(short, predictions(short, start), all_, cosines(short))
        before, after = moved(before, first), moved(after, first)
        yield told(f"{ON_SHORT}, alike", after, none)
        for rows in chosen:
            by = moves(seen, before, rows, alike)
            yield told(f"{ON_SHORT}, and alike", moved(after, by), rows)
    for name, free in FREE.items():
        for rows in chosen:
            shape = refined(seen, rows, free)
            yield told(name, predictions(test, shape), rows, shape)


def _levels(test: Texts, losses: dict[str, Tensor]) -> dict[str, float]:
    """Live over predicted: the median over policies, by kind of text."""
    ratio = {k: (test.live(k) / ours.clamp(min=1e-9)) for k, ours in losses.items()}
    return {kind: round(float(each.median()), 4) for kind, each in ratio.items()}


def measured(arguments: argparse.Namespace, say: Any) -> tuple[dict[str, Texts], dict[str, Any]]:
    """Records of both splits, those that lie in the folder or new ones."""
    size = SIZES[arguments.size]
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    geometry = loaded.geometry
    policies = [p for _, p in mixed_policies(geometry.layers, geometry.kv_heads)]
    policies = policies[:: size.every]
    found: dict[str, dict[str, tuple[str, Record]]] = {SHORT: {}, REFINING: {}, TEST: {}}
    left_out, deadline = [], time.monotonic() + arguments.seconds * 0.8  # the rest judges
    for sample in size.samples(loaded.tokenizer, arguments.seed):
        kept = arguments.records / f"{sample.id}.safetensors" if arguments.records else None
        if kept and kept.is_file():
            one = Record.load(kept)
        elif time.monotonic() > deadline:
            left_out.append(sample.id)
            continue
        else:
            try:
                one = record(loaded, sample, policies, Probes(arguments.probes))
            except Exception as error:  # one text must not lose the others
                left_out.append(f"{sample.id}: {error!r}"[:300])
                continue
            if kept:
                one.save(kept)
        found[sample.split][sample.id] = sample.kind, one
        say(sample.id)
    about = {
        "device": torch.cuda.get_device_name() if loaded.device != "cpu" else "cpu",
        "model": loaded.name,
        "size": vars(size),
        "seed": arguments.seed,
        "texts": {split: len(some) for split, some in found.items()},
        "policies": len(policies),
        "probes": arguments.probes,
        "left out": left_out,
    }
    groups = groups_of(policies)
    return {split: Texts(some, groups, geometry.layers) for split, some in found.items()}, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="whole")
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other texts")
    parser.add_argument(
        "--seconds", type=float, default=400.0, help="no text is begun after 0.8 of it"
    )
    parser.add_argument("--records", type=Path, help="a folder to keep what was measured in")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.records:
        arguments.records.mkdir(parents=True, exist_ok=True)

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {what}", file=sys.stderr, flush=True)

    texts, found = measured(arguments, say)
    found["ways"] = {}
    for name, outcome in compared(texts, say):
        found["ways"][name] = outcome
        found["seconds"] = round(time.monotonic() - started, 1)
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
