"""What papers claim of their eviction methods, measured on a small model: held or not held.

    python benchmarks/claims.py --samples 4
    python benchmarks/claims.py --device cuda --workers 6 --samples 16 --seconds 150 \
        --before benchmarks/results/claims-cpu.json
    python benchmarks/claims.py --measure compressed,cosine --out benchmarks/results/claims.json
    python benchmarks/claims.py --table benchmarks/results/claims.json

Every claim is that one policy beats another at equal budgets. A figure is the mean over samples of
the difference between the two, positive where the claim's favourite is better, with a 95 %
bootstrap interval; a claim is held where all of the interval is positive, not held where all of it
is negative, and not decided between. KL is in nats a token below the other's, digits are points of
answer digits right, cosine is that of masked with full attention. Not held is a result: models this
small have few retrieval heads. Parts of the list may be run one after another into one file.
Samples are taken by turns, so that a bound on time leaves all claims with as many; claims that a
result before did not decide come first.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import workers
from measures import KINDS_OF, NEEDLES, PLAIN, Measure, NamedPolicy
from papers import CLAIMS, Claim
from policy_pages import claims_table

from kvtune.common.errors import KvtuneError
from kvtune.traces.models import load_model
from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.quality import bootstrap


@dataclass(frozen=True)
class Job:
    """Some policies on one sample."""

    measure: Measure
    sample: Sample
    policies: tuple[NamedPolicy, ...]

    @property
    def id(self) -> str:
        return f"{self.measure.__name__} of {self.sample.id}"


Value = float | str
"""Of one policy on one sample; where it cannot be run, why not."""


def jobs_of(claims: Sequence[Claim], samples: Sequence[Sample]) -> list[Job]:
    """Every measure of the claims on every sample that it is for, samples by turns."""
    policies: dict[Measure, dict[NamedPolicy, None]] = {}
    for claim in claims:
        policies.setdefault(claim.measure, {}).update({claim.better: None, claim.worse: None})
    return [
        Job(measure, sample, tuple(own))
        for sample in by_turns(samples)
        for measure, own in policies.items()
        if sample.kind in KINDS_OF[measure]
    ]


def done(job: Job) -> list[Value]:
    """Every policy's value, all at once if that works."""
    try:
        return list(job.measure(workers.loaded(), job.sample, job.policies))
    except KvtuneError as error:
        if len(job.policies) == 1:
            return [str(error)]
    return [done(replace(job, policies=(policy,)))[0] for policy in job.policies]


@dataclass
class Found:
    """Values of policies by measure and sample, as they come."""

    values: dict[tuple[Measure, NamedPolicy], dict[str, Value]] = field(default_factory=dict)

    def add(self, job: Job, values: Sequence[Value]) -> None:
        for policy, value in zip(job.policies, values, strict=True):
            self.values.setdefault((job.measure, policy), {})[job.sample.id] = value

    def pairs(self, claim: Claim) -> list[tuple[Value, Value]]:
        """What both of a claim got, sample by sample."""
        better = self.values.get((claim.measure, claim.better), {})
        worse = self.values.get((claim.measure, claim.worse), {})
        return [(better[name], worse[name]) for name in sorted({*better} & {*worse})]


NOT_DECIDED = "not decided"
FEWEST = 3  # samples: of fewer an interval says nothing


def judge(claim: Claim, pairs: Sequence[tuple[Value, Value]]) -> dict[str, Any]:
    """One claim's figure."""
    for value in (value for pair in pairs for value in pair):
        if isinstance(value, str):
            return {"claim": claim.text, "skipped": value}
    better, worse = np.array(pairs, float).T
    gain = better - worse
    low, high = np.percentile(bootstrap(gain, ["all"] * len(gain)), [2.5, 97.5])
    return {
        "claim": claim.text,
        "measure": claim.measure.__name__,
        "verdict": verdict(low, high) if len(gain) >= FEWEST else NOT_DECIDED,
        "gain": float(gain.mean()),
        "interval": [float(low), float(high)],
        "better": float(better.mean()),
        "worse": float(worse.mean()),
        "samples": len(gain),
    }


def verdict(low: float, high: float) -> str:
    """What an interval of the gain says of the claim."""
    if low <= 0 <= high:
        return NOT_DECIDED
    return "held" if low > 0 else "not held"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=4, help="of each kind")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--observed", type=int, default=128)
    parser.add_argument("--only", default="", help="claims whose text contains this")
    parser.add_argument("--measure", default="", help="claims measured so: compressed,cosine")
    parser.add_argument("--table", type=Path, help="print a result as a Markdown table, no more")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="be done by then")
    parser.add_argument("--before", type=Path, help="a result whose undecided claims come first")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/claims.json"))
    arguments = parser.parse_args()
    if arguments.table:
        print(claims_table(json.loads(arguments.table.read_text())["claims"]))
    else:
        run(arguments, time.monotonic() + arguments.seconds)


def run(arguments: argparse.Namespace, until: float) -> None:
    """Judge the claims that are wanted; the result is written again with every sample."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    place = workers.Place(arguments.model, arguments.device, arguments.out.parent)
    with workers.Crew(place, arguments.workers) as crew:
        tokenizer = load_model(arguments.model, dtype="float32").tokenizer
        crew.model_is_stored()
        wanted = [claim for claim in CLAIMS if is_wanted(claim, arguments)]
        report = {name: getattr(arguments, name) for name in ("model", "device", *SIZES)}
        judged = judged_before(arguments.out, report)
        found, samples = Found(), samples_of(arguments, tokenizer)
        jobs = [job for part in by_need(wanted, arguments.before) for job in jobs_of(part, samples)]
        for job, values in crew.until(until - LEFT_OVER_S, done, jobs):
            found.add(job, values)
            judged |= {c.text: judge(c, p) for c in wanted if (p := found.pairs(c))}
            listed = [judged[claim.text] for claim in CLAIMS if claim.text in judged]
            arguments.out.write_text(json.dumps({**report, "claims": listed}, indent=1) + "\n")
        print("\n".join([*map(line, judged.values()), *crew.failures]))


def samples_of(arguments: argparse.Namespace, tokenizer: Any) -> list[Sample]:
    kinds = dict.fromkeys((*PLAIN, *NEEDLES), arguments.samples)
    workload = Workload({"evaluate": kinds}, tokens=arguments.tokens, observed=arguments.observed)
    return build(workload, tokenizer)


def is_wanted(claim: Claim, arguments: argparse.Namespace) -> bool:
    measures = (arguments.measure or claim.measure.__name__).split(",")
    return arguments.only.lower() in claim.text.lower() and claim.measure.__name__ in measures


def by_need(claims: Iterable[Claim], before: Path | None) -> tuple[list[Claim], list[Claim]]:
    """Claims that a result before did not decide, and the others."""
    known = json.loads(before.read_text())["claims"] if before else []
    decided = {row["claim"] for row in known if row.get("verdict", "") in ("held", "not held")}
    claims = list(claims)
    open_ = [claim for claim in claims if claim.text not in decided]
    return open_, [claim for claim in claims if claim.text in decided]


def judged_before(out: Path, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file holds already, if it was measured alike."""
    found = json.loads(out.read_text()) if out.exists() else {}
    alike = {name: found.get(name) for name in report} == report
    return {judged["claim"]: judged for judged in found["claims"]} if alike else {}


SIZES = ("samples", "tokens", "observed")
LEFT_OVER_S = 5.0  # of the time there is: processes end, Python began before it was counted


def line(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"skipped     {found['claim']}: {found['skipped']}"
    low, high = found["interval"]
    gain = f"{found['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"{found['verdict']:11} {found['claim']}: {gain}"


if __name__ == "__main__":
    main()
