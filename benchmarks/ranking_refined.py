"""A refining run: a handful of live runs of mixed policies refits how heads' losses add up.

    python benchmarks/ranking_refined.py --device cuda --seconds 400 --out FILE

98 mixed policies run live on two sets of texts of six kinds that share no document. Predictions of
a few of them, chosen by what is predicted alone, are refitted to what these lost live on the first
set; all of them are then ranked on the second, which the fit has not seen, and those that it has
not seen on either are ranked by themselves. A prediction puts heads together as

    response = sum over heads of  weight(what it does, its depth) x bounded(response of the head)
    loss of a position = most x (1 - exp(-(half the mean square of the response / most)^power))

with ``most`` what the position loses where hardly anything of the prompt is left, which one live
run a text says. Each way leaves some of these free, or takes them as two short texts, that are
among neither set, had them. The last ways believe besides that policies which err alike are off
alike: what the few that ran were off by is carried over to the others by a Gaussian process, whose
kernel is how much the probes' responses to two policies point the same way. ``--records FOLDER``
keeps what was measured, and what lies there is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from policies_mixed import mixed_policies
from predictions import KINDS, by_block
from ranking_rows import GROUPS, Record, groups_of, record
from scipy.stats import rankdata
from torch import Tensor

from kvtune.common.files import write_json
from kvtune.traces.models import load_model
from kvtune.traces.probes import Probes
from kvtune.traces.samples import by_turns
from kvtune.traces.workloads import Workload, build

REFINING, TEST = "select", "evaluate"
RUNS = (8, 16, 32)
"""Policies of a refining run, of 98."""
FREE: dict[str, tuple[str, ...]] = {
    "levels by what is done": ("levels",),
    "levels, and depth": ("levels", "depth"),
    "levels, and heads that saturate": ("levels", "cap"),
    "levels, and power": ("levels", "power"),
}


@dataclass(frozen=True)
class Size:
    """How much is measured: samples a kind and split, and every how many of the policies."""

    tokens: int
    observed: int
    each: int
    kinds: tuple[str, ...] = KINDS
    every: int = 1


SIZES = {
    "whole": Size(2048, 256, 2),
    "once": Size(2048, 256, 1),
    "middle": Size(1024, 128, 2),
    "short": Size(448, 64, 2),
    "few": Size(448, 64, 1, ("prose", "retrieval", "copy"), 2),
    "tiny": Size(448, 32, 1, ("retrieval",), 7),
}
REDRAWN = 1000
STIFF = 0.02
"""Of the prior that nothing need be refitted, beside one squared logarithm."""
NO_CAP = 3.0
ALIKE, AMPLITUDE, NOISE, SLOPE = 0.3, 0.5, 0.1, 0.1
"""Of the Gaussian process: one minus the cosine at which policies are little alike, and the spread
of logarithms that they share, that they do not, and that a rising loss has."""


@dataclass
class Shape:
    """What a refining run fits: logarithms, all but the depth's slope."""

    levels: Tensor
    depth: Tensor
    cap: Tensor
    power: Tensor

    @staticmethod
    def start(free: Sequence[str] = ()) -> Shape:
        """Heads add up as they are; a cap that is free begins where it can be felt."""
        cap = torch.tensor(0.0 if "cap" in free else NO_CAP)
        return Shape(torch.zeros(len(GROUPS)), torch.tensor(0.0), cap, torch.tensor(0.0))

    @staticmethod
    def known() -> Shape:
        """As a text of prose and one of retrieval of 384 tokens had it, 49 policies each."""
        levels, depth = torch.tensor([0.0, 0.5]), torch.tensor(-1.0)
        return Shape(levels, depth, torch.tensor(NO_CAP), torch.tensor(0.0))

    def moved(self) -> Tensor:
        """How far it lies from where it began, squared."""
        return sum(  # type: ignore[return-value]
            ((mine - first) ** 2).sum()
            for mine, first in zip(vars(self).values(), vars(Shape.start()).values(), strict=True)
        )

    def losses(self, each: Record, groups: Tensor, layers: int) -> Tensor:
        """Of every policy at every position, ``[B, C]``."""
        depth = torch.arange(groups.shape[1]) * layers // groups.shape[1] / layers - 0.5
        weight = (self.levels[groups] + self.depth * depth).exp()  # [B, I]
        heads = each.responses.float()
        size = (heads**2).mean(2, keepdim=True)
        cap, power = (each.to(heads.device).exp() for each in (self.cap, self.power))
        bounded = heads * (1 + size / cap**2).rsqrt()
        response = (bounded * weight.to(heads.device)[..., None, None]).sum(1)
        row = (response**2).mean(1) / 2
        most = each.most.to(row)
        return most * -torch.expm1(-(((row + 1e-9) / most) ** power))


@dataclass(frozen=True)
class Texts:
    """Records of one split, and what was asked in each."""

    records: dict[str, tuple[str, Record]]
    groups: Tensor
    layers: int

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for kind, _ in self.records.values()})

    def live(self, kind: str, *, answers: bool = False) -> Tensor:
        """Mean over a kind's texts, ``[B]``."""
        return torch.stack([_mean(r.live, r, answers) for r in self.of(kind)]).mean(0)

    def predicted(self, shape: Shape, kind: str, rows: Tensor, *, answers: bool = False) -> Tensor:
        """The same of some policies, as a shape says it."""
        found = []
        for each in self.of(kind):
            some = Record(each.live[rows], each.most, each.answers, each.responses[rows])
            losses = shape.losses(some, self.groups[rows], self.layers)
            found.append(_mean(losses, each, answers))
        return torch.stack(found).mean(0).cpu()

    def in_blocks(self, kind: str) -> Tensor:
        """What a search's tables say, ``[B]``."""
        found = [
            by_block(r.responses.float().sum(1)).sum(-1) / r.live.shape[1] for r in self.of(kind)
        ]
        return torch.stack(found).mean(0).cpu()

    def of(self, kind: str) -> list[Record]:
        """Records of a kind's texts."""
        return [record_ for of, record_ in self.records.values() if of == kind]


def _mean(losses: Tensor, each: Record, answers: bool) -> Tensor:
    return losses[:, each.answers.to(losses.device)].mean(1) if answers else losses.mean(1)


def refined(texts: Texts, rows: Tensor, free: Sequence[str]) -> Shape:
    """The shape that fits some policies' live losses on the refining texts best, in logarithms."""
    shape = Shape.start(free)
    fitted = [getattr(shape, name).requires_grad_() for name in free]
    if not fitted:
        return shape
    truth = {kind: texts.live(kind)[rows].clamp(min=1e-6).log() for kind in texts.kinds}
    optimiser = torch.optim.LBFGS(fitted, max_iter=25, line_search_fn="strong_wolfe")

    def error() -> Tensor:
        optimiser.zero_grad()
        total = STIFF * shape.moved()
        total.backward()  # type: ignore[no-untyped-call]
        for kind, seen in truth.items():  # one after the other, for the card's memory
            off = texts.predicted(shape, kind, rows).clamp(min=1e-6).log() - seen
            part = off.abs().mean() / len(truth)
            part.backward()  # type: ignore[no-untyped-call]
            total = total + part
        return total.detach()

    optimiser.step(error)  # type: ignore[arg-type]
    return Shape(*(each.detach() for each in vars(shape).values()))


def cosines(texts: Texts, kind: str) -> NDArray[np.float64]:
    """How much responses to two policies point the same way, the mean over texts, ``[B, B]``."""
    found = []
    for each in texts.of(kind):
        row = each.responses.float().sum(1).flatten(1)
        row = row / row.norm(dim=1, keepdim=True).clamp(min=1e-12)
        found.append((row @ row.T).double().cpu().numpy())
    return np.asarray(np.mean(found, 0))


def carried(
    off: NDArray[np.float64], said: NDArray[np.float64], alike: NDArray[np.float64], rows: Any
) -> NDArray[np.float64]:
    """What all policies are off by, ``[B]``, of what a few of them are, by likeness and size.

    Args:
        off: logarithms of live over predicted of those few.
        said: logarithms of what is predicted, ``[B]``.
        alike: cosines, ``[B, B]``.
        rows: which the few are.
    """
    size = said - said[rows].mean()
    kernel = 1 + SLOPE * np.outer(size, size) + AMPLITUDE**2 * np.exp(-(1 - alike) / ALIKE)
    seen = kernel[np.ix_(rows, rows)] + NOISE**2 * np.eye(len(rows))
    return np.asarray(kernel[:, rows] @ np.linalg.solve(seen, off))


@torch.no_grad()
def by_likeness(
    seen: Texts, test: Texts, shape: Shape, rows: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Predictions on the test texts, moved by what some policies were off by on the others.

    Answers are moved by what these lost there, from what their whole texts are predicted to lose.
    """
    before, after = predictions(seen, shape)[0], predictions(test, shape)[0]
    few = rows.numpy()

    def moved(kinds: Sequence[str], live: Tensor) -> Tensor:
        first, then = (
            torch.stack([each[kind] for kind in kinds]).mean(0).double().clamp(min=1e-9).log()
            for each in (before, after)
        )
        alike = np.mean([cosines(seen, kind) for kind in kinds], 0)
        off = live.double().clamp(min=1e-9).log()[rows] - first[rows]
        return (then + torch.from_numpy(carried(off.numpy(), first.numpy(), alike, few))).exp()

    losses = {kind: moved([kind], seen.live(kind)) for kind in test.kinds}
    asked = Judged(test, few).asked
    if not asked:
        return losses, None
    answers = torch.stack([seen.live(kind, answers=True) for kind in asked]).mean(0)
    return losses, moved(asked, answers)


def apart(losses: Tensor, groups: Tensor, count: int) -> Tensor:
    """Policies evenly over what is predicted, of every sort: a design that has seen no live run."""
    sort = groups.float().mean(1)
    order = sorted(range(len(losses)), key=lambda i: (round(float(sort[i])), float(losses[i])))
    at = np.linspace(0, len(order) - 1, count).round().astype(int)
    return torch.tensor(sorted({order[i] for i in at}))


@dataclass(frozen=True)
class Judged:
    """Rank correlations on the test texts.

    Args:
        test: what is predicted.
        rows: policies that count.
    """

    test: Texts
    rows: NDArray[np.int64]

    def of(self, losses: dict[str, Tensor], answers: Tensor | None) -> dict[str, Any]:
        """Over all kinds of text, on each, and of answers alone.

        Args:
            losses: predicted, of every policy by kind of text.
            answers: the same of answers, over kinds that ask for some; None counts whole texts.
        """
        live = {kind: self.test.live(kind) for kind in losses}
        asked = self.asked
        found = {"all": self.rank(_over(losses), _over(live))}
        found |= {kind: self.rank(losses[kind], live[kind]) for kind in losses}
        if asked:
            seen = torch.stack([self.test.live(kind, answers=True) for kind in asked]).mean(0)
            ours = _over({kind: losses[kind] for kind in asked}) if answers is None else answers
            found["answers"] = self.rank(ours, seen)
        return found

    @cached_property
    def asked(self) -> list[str]:
        """Kinds all of whose texts hold answers."""
        records = self.test.records.values()
        return [
            k for k in self.test.kinds if all(bool(r.answers.any()) for of, r in records if of == k)
        ]

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


def _short(value: Any) -> float:
    return round(float(value), 4)


def _over(losses: dict[str, Tensor]) -> Tensor:
    """The mean over kinds."""
    return torch.stack(list(losses.values())).mean(0)


@torch.no_grad()
def predictions(texts: Texts, shape: Shape) -> tuple[dict[str, Tensor], Tensor | None]:
    """Of every policy, by kind of text and of answers."""
    rows = [torch.arange(len(texts.groups))[at : at + 16] for at in range(0, len(texts.groups), 16)]

    def all_of(kind: str, answers: bool) -> Tensor:
        return torch.cat([texts.predicted(shape, kind, some, answers=answers) for some in rows])

    asked = Judged(texts, np.arange(0)).asked
    answers = torch.stack([all_of(kind, True) for kind in asked]).mean(0) if asked else None
    return {kind: all_of(kind, False) for kind in texts.kinds}, answers


def compared(texts: dict[str, Texts], say: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every way, and what a set of texts says of another by its live losses alone."""
    seen, test = texts[REFINING], texts[TEST]
    every = np.arange(len(test.groups))
    whole = Judged(test, every)
    blocks = {kind: test.in_blocks(kind) for kind in test.kinds}
    yield "tables, nothing refined", whole.of(blocks, None)
    live = {kind: seen.live(kind) for kind in test.kinds}
    yield "live on the other texts, all 98", whole.of(live, None)
    before = _over(predictions(seen, Shape.start())[0])

    def told(name: str, rows: Tensor, shape: Shape, alike: bool) -> tuple[str, dict[str, Any]]:
        made = by_likeness(seen, test, shape, rows) if alike else predictions(test, shape)
        losses, answers = made
        unseen = Judged(test, np.setdiff1d(every, rows.numpy()))
        found: dict[str, Any] = {"by": name, "live runs": len(rows)}
        found["shape"] = {k: np.round(v.tolist(), 3).tolist() for k, v in vars(shape).items()}
        found["ranks"] = whole.of(losses, None)
        found["answers by themselves"] = whole.of(losses, answers).get("answers")
        found["ranks of policies that did not run"] = unseen.of(losses, None)
        found["live over predicted, median"] = _levels(test, losses)
        say(f"{name}, {len(rows)}: {found['ranks']['all']}")
        return f"{name}, {len(rows)} live runs", found

    none = torch.arange(0)
    yield told("bounded by row", none, Shape.start(), alike=False)
    yield told("as two short texts had it", none, Shape.known(), alike=False)
    chosen = [apart(before, seen.groups, count) for count in RUNS]
    for rows in chosen:
        yield told("bounded by row, alike", rows, Shape.start(), alike=True)
        yield told("as two short texts had it, alike", rows, Shape.known(), alike=True)
    for name, free in FREE.items():
        for rows in chosen:
            yield told(name, rows, refined(seen, rows, free), alike=False)


def _levels(test: Texts, losses: dict[str, Tensor]) -> dict[str, float]:
    """Live over predicted: the median over policies, by kind of text."""
    ratio = {k: (test.live(k) / ours.clamp(min=1e-9)) for k, ours in losses.items()}
    return {kind: _short(each.median()) for kind, each in ratio.items()}


def measured(arguments: argparse.Namespace, say: Any) -> tuple[dict[str, Texts], dict[str, Any]]:
    """Records of both splits, those that lie in the folder or new ones."""
    size = SIZES[arguments.size]
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    counts = dict.fromkeys(size.kinds, size.each)
    each = {REFINING: counts, TEST: counts}
    workload = Workload(each, tokens=size.tokens, observed=size.observed)
    geometry = loaded.geometry
    policies = [p for _, p in mixed_policies(geometry.layers, geometry.kv_heads)]
    policies = policies[:: size.every]
    found: dict[str, dict[str, tuple[str, Record]]] = {REFINING: {}, TEST: {}}
    left_out, deadline = [], time.monotonic() + arguments.seconds * 0.8  # the rest judges
    for sample in by_turns(build(workload, loaded.tokenizer)):
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
        "workload": workload.describe(),
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
