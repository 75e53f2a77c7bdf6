"""Predicted beside live, for tuned plans and mixed policies, on six kinds of text.

    python benchmarks/predictions.py --device cuda --out benchmarks/results/predictions-h200.json

Plans are solved on search samples with several kinds of probes, at shares of the bf16 bytes from
2 to 35 %. Plans run live and are predicted on selection and evaluation samples, mixed policies on
some of the latter. Every number is kept a policy and a sample, over all rows and over the rows
whose target is an answer, so that calibrations can be fitted and judged afterwards without a GPU:
``predictions_judged.py`` does it. ``saturated`` predictions are bounded by what is lost, position
by position, when hardly anything of the prompt is left, which one more live run says. Baselines run
last, live alone. Arithmetic is float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from policies_mixed import mixed_policies
from torch import Tensor

from kvtune.common.files import atomic
from kvtune.policies.apply import apply_together
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import Prompt, fresh_prompt
from kvtune.simulator.quality.build import DEFAULT_BLOCK, layer_features
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.simulator.quality.tables import SampleFacts, Tables
from kvtune.traces.calibration import find_calibration
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.probes import Drawn, Probes
from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.baselines import FAMILIES, STRONG, candidates
from kvtune.tuner.options import LAPTOP, Menu
from kvtune.tuner.solver import evicts, policy_of
from kvtune.tuner.validate import union_of_needs

SHARES = (0.02, 0.03, 0.045, 0.06, 0.09, 0.12, 0.18, 0.25, 0.35)
KINDS = ("prose", "code", "retrieval", "recall", "chat", "copy")
SHRINKAGES = (0.0, 0.4)
ROWS = 18  # policies a batch


@dataclass(frozen=True)
class Fisher(Probes):
    """Labels drawn from the model's own predictions: Fisher's probes, the second order."""

    def draw(self, log_p: Tensor, sample_id: str) -> Drawn:
        """Nothing is said of the likeliest token; all tokens are the others."""
        drawn, p = super().draw(log_p, sample_id), log_p.exp()
        generator = torch.Generator().manual_seed(self.seed + 1)
        labels = torch.multinomial(p.cpu(), self.count, replacement=True, generator=generator)
        return Drawn(
            top=drawn.top,
            others=p,
            rest=torch.ones_like(drawn.rest),
            labels=labels.T.to(p.device),
            margins=torch.zeros_like(drawn.margins),
        )


@dataclass(frozen=True)
class Joint(Probes):
    """All families in one pass, one behind the other."""

    parts: tuple[Probes, ...] = ()

    def draw(self, log_p: Tensor, sample_id: str) -> Any:
        return _Several([part.draw(log_p, sample_id) for part in self.parts])


class _Several:
    """Draws of several families, asked for as if they were one."""

    def __init__(self, parts: Sequence[Drawn]) -> None:
        self.parts = parts
        self.labels = [label for part in parts for label in part.labels]

    def slopes(self, first: int, count: int) -> Tensor:
        """Directions of the logits, as of one family."""
        return torch.cat([part.slopes(*some) for part, some in self._within(first, count)])

    def before(self, weight: Tensor, first: int, count: int) -> Tensor:
        """The same before the output head."""
        return torch.cat([part.before(weight, *some) for part, some in self._within(first, count)])

    def _within(self, first: int, count: int) -> Iterator[tuple[Drawn, tuple[int, int]]]:
        """The families that some of all probes belong to, and which of each family's they are."""
        for part in self.parts:
            low, high = max(first, 0), min(first + count, len(part.labels))
            if low < high:
                yield part, (low, high - low)
            first -= len(part.labels)


FAMILIES_OF_PROBES: dict[str, type[Probes]] = {"fisher": Fisher, "probes": Probes}
"""By name; plans are searched with each."""


@dataclass
class Run:
    """One run: what it measured so far, written after every step."""

    out: Path
    loaded: LoadedModel
    probes: dict[str, Probes]
    deadline: float
    started: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.found["seconds"] = round(self.seconds, 1)
        with atomic(self.out) as temporary:  # a run may be ended at any time
            temporary.write_text(json.dumps(self.found) + "\n", encoding="utf-8")
        print(f"[{self.seconds:6.1f} s] {name}", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def columns(self, name: str) -> slice:
        """Where a family's probes stand among all of them."""
        at = list(self.probes).index(name)
        before = sum(p.count for p in list(self.probes.values())[:at])
        return slice(before, before + self.probes[name].count)

    def prompt(self, sample: Sample, needs: Needs) -> Prompt:
        """A sample's prompt with the probes of all families."""
        parts = tuple(self.probes.values())
        joint = Joint(sum(part.count for part in parts), parts=parts)
        wanted = needs | Needs(future=True, probes=True)
        return fresh_prompt(self.loaded, sample, wanted, probes=joint)


def tables_of(run: Run, samples: Sequence[Sample], menu: Menu) -> dict[str, Tables]:
    """Tables of the search samples by each family of probes that plans are searched with."""
    options, rows = menu.options(), []
    geometry = run.loaded.geometry
    needs = menu.needs | Needs(column_sums=True)
    for sample in samples:
        prompt = run.prompt(sample, needs)
        layers = [
            layer_features(LayerReplay.of_signals(prompt(layer)), options, DEFAULT_BLOCK)
            for layer in range(geometry.layers)
        ]
        rows.append(np.concatenate(layers))  # [I, O, S * blocks]
        print(f"[{run.seconds:6.1f} s] tables {sample.id}", file=sys.stderr, flush=True)
    factors = np.stack(rows)
    total = sum(probes.count for probes in run.probes.values())
    each = factors.reshape(*factors.shape[:3], total, -1)
    found = {}
    for name in run.probes:
        columns = run.columns(name)
        count = columns.stop - columns.start
        mine = each[..., columns, :] * np.sqrt(total / count)
        factor = np.ascontiguousarray(mine.reshape(*factors.shape[:3], -1), np.float32)
        found[name] = Tables(
            model=run.loaded.name,
            layers=geometry.layers,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            prompt_tokens=samples[0].prompt,
            options=options,
            samples=tuple(SampleFacts(s.id, s.split, s.kind) for s in samples),
            loss=(factor**2).sum(-1),
            factor=factor,
            group=np.arange(len(samples)),
        )
    return found


@dataclass(frozen=True)
class Entry:
    """A policy and what it is: a plan of a family, or one of the mixed ones."""

    policy: Policy
    facts: dict[str, Any]


def plans(
    tables: dict[str, Tables], shares: Sequence[float], shrinkages: Sequence[float]
) -> Iterator[Entry]:
    """Plans at every share, by every family's tables and all weights of the cross terms."""
    for name, table in tables.items():
        footprint = table.footprints(table.prompt_tokens, table.head_dim)
        problem = Problem.of(table, footprint)
        full = 4 * table.heads * table.head_dim * table.prompt_tokens
        for share, shrinkage in product(shares, shrinkages):
            room = int(share * full) - 4 * table.heads
            choice = solve(problem.shrunk(shrinkage), room)
            weights = table.sample_weights()
            facts = {
                "group": "plan",
                "searched with": name,
                "share": share,
                "shrinkage": shrinkage,
                "loss on search": float(weights @ table.by_sample(choice)),
            }
            yield Entry(policy_of(table, choice, f"plan at {share:.1%}"), facts)


def baselines(loaded: LoadedModel, prompt: int, shares: Sequence[float]) -> list[Entry]:
    """What a plan has to beat at equal bytes, in 4 bits with and without exact sinks."""
    geometry = loaded.geometry
    shape = (geometry.layers, geometry.kv_heads, geometry.head_dim)
    full = 4 * geometry.layers * geometry.kv_heads * geometry.head_dim * prompt
    calibrated = find_calibration(loaded.fingerprint) is not None
    forms = {Int4(), Int4(exact_first=4)}
    return [
        Entry(policy, {"group": "rival", "family": family, "share": share})
        for share, family in product(shares, (*FAMILIES, *STRONG))
        for policy in candidates(family, int(share * full), prompt, *shape)
        if policy.heads[0][0].keys in forms and policy.heads[0][0].method not in LEFT_OUT
        if calibrated or not policy.needs.calibration
    ]


LEFT_OUT = (StreamingLLM(), Full(), H2O(recent_share=0.1))  # weak, no family's own, a variant


@torch.no_grad()
def responses(prompt: Prompt, sample: Sample, policies: Sequence[Policy]) -> dict[str, Tensor]:
    """How the probes respond at every position, ``[B, S, C]``: in all and where nothing is evicted.

    The exact link needs positions, and a block's sum can be had of them.
    """
    budgets = [policy.settle(sample.prompt, prompt) for policy in policies]
    total: Any = 0.0
    whole: Any = 0.0
    for layer in range(policies[0].layers):
        replay = LayerReplay.of_signals(prompt(layer))
        planned = [budget[layer].tolist() for budget in budgets]
        part = apply_together(policies, layer, planned, replay.signals)
        found = replay.response(part, 1)  # [B, H, S, C]
        keeps = [[not evicts(option) for option in policy.heads[layer]] for policy in policies]
        mask = torch.tensor(keeps, device=found.device).to(found)[..., None, None]
        total, whole = total + found.sum(1), whole + (found * mask).sum(1)
    return {"all": total, "quantising": whole, "evicting": total - whole}


def most_lost(loaded: LoadedModel, sample: Sample, prompt: Prompt, full: Tensor) -> Tensor:
    """What is lost at every position with 1 % of the prompt left, its ends alone, ``[C]`` nats."""
    geometry = loaded.geometry
    option = Option(StreamingLLM(), Budget(share=0.01))
    policy = Policy.uniform(option, geometry.layers, geometry.kv_heads)
    return torch.from_numpy(run_live(loaded, sample, prompt, [policy], full)[0].kl).clamp(min=1e-6)


def saturated(losses: Tensor, most: Tensor) -> Tensor:
    """Losses that approach what can be lost at most, as many small steps on the way there would."""
    return most * -torch.expm1(-losses / most)


def predicted(
    run: Run, sample: Sample, found: dict[str, Tensor], most: Tensor
) -> dict[str, list[list[float]]]:
    """Predictions of every policy, ``[B]`` each by name: over all rows and over answers alone."""
    answers = torch.tensor(sample.answer_mask, device=found["all"].device)
    most = most.to(found["all"])
    losses: dict[str, Tensor] = {}
    for name in run.probes:
        for part, responses_ in found.items():
            mine = responses_[:, run.columns(name)]
            losses[f"{name}, {part}"] = by_block(mine).sum(-1) / sample.observed
        by_row = (found["all"][:, run.columns(name)] ** 2).mean(1) / 2
        losses[f"{name}, block 1"] = by_row.mean(-1)
        losses[f"{name}, answers"] = by_row[:, answers].mean(-1)
        together = by_block(found["all"][:, run.columns(name)])
        bounded = saturated(together, most.unflatten(-1, (-1, DEFAULT_BLOCK)).sum(-1))
        losses[f"{name}, saturated"] = bounded.sum(-1) / sample.observed
        rows = saturated(by_row, most)
        losses[f"{name}, saturated rows"] = rows.mean(-1)
        losses[f"{name}, saturated answers"] = rows[:, answers].mean(-1)
    return {name: rounded(loss) for name, loss in losses.items()}


def by_block(responses_: Tensor) -> Tensor:
    """What blocks of positions lose together, ``[B, blocks]`` nats, of responses ``[B, S, C]``."""
    blocks = responses_.unflatten(-1, (-1, DEFAULT_BLOCK)).sum(-1)
    return (blocks**2).mean(1) / 2


def rounded(values: Any) -> list[Any]:
    return [float(f"{float(x):.5g}") if np.isfinite(float(x)) else None for x in values]


def compare(
    run: Run, sample: Sample, entries: Sequence[Entry], *, live_alone: bool
) -> dict[str, Any]:
    """One sample: live and predicted, of every policy."""
    policies = [entry.policy for entry in entries]
    needs = union_of_needs(policies)
    prompt = fresh_prompt(run.loaded, sample, needs) if live_alone else run.prompt(sample, needs)
    full = full_cache(run.loaded, sample, prompt)
    answers = np.array(sample.answer_mask)
    most = None if live_alone else most_lost(run.loaded, sample, prompt, full)
    row: dict[str, Any] = {"live": [], "live, answers": [], "right": [], "full right": []}
    for at in range(0, len(policies), ROWS):
        some = policies[at : at + ROWS]
        runs = run_live(run.loaded, sample, prompt, some, full)
        row["live"] += rounded(one.kl.mean() for one in runs)
        if answers.any():
            row["live, answers"] += rounded(one.kl[answers].mean() for one in runs)
            row["right"] += rounded(one.correct[answers].mean() for one in runs)
            row["full right"] = float(runs[0].full_correct[answers].mean())
        if most is None:
            continue
        found = responses(prompt, sample, some)
        for name, losses in predicted(run, sample, found, most).items():
            row.setdefault(name, []).extend(losses)
    return row


def measure(run: Run, samples: Sequence[Sample], size: Size) -> None:
    """Measure every group of policies on one sample, the most needed first."""
    search = [s for s in samples if s.split == "search"]
    rest = by_turns([s for s in samples if s.split != "search"])
    run.found["samples"] = {
        s.id: {"split": s.split, "kind": s.kind, "answers": sum(s.answer_mask)} for s in samples
    }
    tables = tables_of(run, search, size.menu)
    made = list(plans(tables, size.shares, size.shrinkages))
    geometry = run.loaded.geometry
    mixed = [
        Entry(policy, {"group": kind})
        for kind, policy in mixed_policies(geometry.layers, geometry.kv_heads)
    ]
    run.found["plans"] = [entry.facts | {"name": entry.policy.name} for entry in made]
    others = baselines(run.loaded, search[0].prompt, size.baseline_shares)
    run.found["rivals"] = [entry.facts | {"name": entry.policy.name} for entry in others]
    run.found["mixed"] = [entry.facts | {"name": entry.policy.name} for entry in mixed]
    run.record("tables and plans", round(run.seconds, 1))
    evaluate = [s for s in rest if s.split == "evaluate"]
    some_of_each = evaluate[: size.mixed_each * len(size.kinds)]
    groups = (("plans", made, rest), ("mixed", mixed, some_of_each), ("rivals", others, evaluate))
    for name, entries, some in groups:
        rows: dict[str, Any] = {}
        for sample in some if entries else ():
            if time.monotonic() > run.deadline:
                run.found.setdefault("left out", []).append(f"{name} on {sample.id}")
                continue
            try:
                rows[sample.id] = compare(run, sample, entries, live_alone=name == "rivals")
            except Exception as error:  # one case must not lose the others
                run.found.setdefault("failed", []).append(f"{sample.id}: {error!r}"[:300])
            run.record(f"{name} by sample", rows)


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Args:
        menu: what a head may be given.
        kinds: of text.
        counts: samples a kind, by split.
        mixed_each: samples a kind that mixed policies run on.
        tokens: N.
        observed: C.
        probes: S of the larger families.
        shares: of the bf16 bytes, of the plans.
        families: of probes.
        shrinkages: weights of the cross terms.
    """

    menu: Menu = LAPTOP
    kinds: tuple[str, ...] = KINDS
    counts: tuple[int, int, int] = (2, 2, 3)
    mixed_each: int = 2
    tokens: int = 2048
    observed: int = 256
    probes: int = 16
    shares: tuple[float, ...] = SHARES
    baseline_shares: tuple[float, ...] = (0.03, 0.06, 0.12, 0.25)
    families: tuple[str, ...] = tuple(FAMILIES_OF_PROBES)
    shrinkages: tuple[float, ...] = SHRINKAGES

    @property
    def workload(self) -> Workload:
        """The workload whose samples are measured."""
        counts = zip(("search", "select", "evaluate"), self.counts, strict=True)
        each = {split: dict.fromkeys(self.kinds, count) for split, count in counts}
        return Workload(each, tokens=self.tokens, observed=self.observed)


TINY = Size(
    menu=replace(LAPTOP, methods=LAPTOP.methods[:1], shares=(1 / 16, 1 / 4)),
    kinds=("retrieval",),
    counts=(1, 1, 1),
    mixed_each=1,
    tokens=448,
    observed=64,
    probes=2,
    shares=(0.06, 0.25),
    baseline_shares=(0.12,),
)


SHORT = Size(tokens=448, observed=64)
"""Samples that layers with a window of 512 tokens see whole: Gemma-3's can all be compressed."""

MIDDLE = Size(tokens=1024, observed=128, baseline_shares=())
"""Samples as long as those that a search captures by itself."""

LEVELS = Size(
    counts=(2, 4, 6),
    mixed_each=0,
    shares=(0.03, 0.06, 0.12, 0.25),
    baseline_shares=(),
    families=("probes",),
    shrinkages=(0.0, 0.2, 0.4, 0.8),
)
"""Twice the texts, so that a kind's level differs visibly from its texts'; no other policies."""

LEVELS_SHORT = replace(LEVELS, tokens=SHORT.tokens, observed=SHORT.observed)
LEVELS_MIDDLE = replace(LEVELS, tokens=MIDDLE.tokens, observed=MIDDLE.observed)
LEVELS_LONG = replace(LEVELS, tokens=4096)
"""As many texts at other lengths, so that intervals are judged where they were not fitted."""

CPU = replace(
    SHORT,
    kinds=("prose", "code", "retrieval"),
    counts=(1, 1, 1),
    mixed_each=0,
    probes=4,
    shares=(0.06, 0.12, 0.25),
    baseline_shares=(),
)
"""What two cores measure of a small model in a quarter of an hour."""

SIZES = {
    "whole": Size(),
    "levels": LEVELS,
    "levels-short": LEVELS_SHORT,
    "levels-middle": LEVELS_MIDDLE,
    "levels-long": LEVELS_LONG,
    "middle": MIDDLE,
    "short": SHORT,
    "cpu": CPU,
    "tiny": TINY,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=270.0, help="no sample is begun after")
    parser.add_argument("--size", choices=SIZES, default="whole", help="tiny does it all once")
    arguments = parser.parse_args()
    started, size = time.monotonic(), SIZES[arguments.size]
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    samples = build(size.workload, loaded.tokenizer)
    deadline = started + arguments.seconds
    probes = {name: FAMILIES_OF_PROBES[name](size.probes) for name in size.families}
    run = Run(arguments.out, loaded, probes, deadline, started)
    run.found |= {
        "device": torch.cuda.get_device_name() if loaded.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "workload": size.workload.describe(),
        "no needle in the last": UNASKED_END,
        "probes": {name: probes.count for name, probes in run.probes.items()},
        "options": len(size.menu.options()),
    }
    run.record("samples ready after", round(run.seconds, 1))
    measure(run, samples, size)


if __name__ == "__main__":
    main()
