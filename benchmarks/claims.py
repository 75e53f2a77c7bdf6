"""What papers claim of their eviction methods, measured on a small model: held or not held.

    python benchmarks/claims.py --samples 4
    python benchmarks/claims.py --measure compressed,cosine --out benchmarks/results/claims.json
    python benchmarks/claims.py --table benchmarks/results/claims.json

Every claim is that one policy beats another at equal budgets. A figure is the mean over samples of
the difference between the two, positive where the claim's favourite is better, with a 95 %
bootstrap interval; a claim is held where all of the interval is positive, not held where all of it
is negative, and not decided between. KL is in nats a token below the other's, digits are points of
answer digits right, cosine is that of masked with full attention. Not held is a result: models this
small have few retrieval heads. Parts of the list may be run one after another into one file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.allocators.cake_layers import CakeLayers
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.method import Method, find_method
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import ALL_QUERIES, Needs
from kvtune.runtime.contenders import Contender
from kvtune.runtime.generate import Generation, prompt_signals
from kvtune.runtime.live import run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.decode_replay import replay_decoding
from kvtune.simulator.replay import LayerReplay
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.quality import bootstrap


@dataclass(frozen=True)
class Entrant:
    """A policy by names, so that one whose method is missing is skipped alone."""

    method: str
    share: float = 0.0
    tokens: int | None = None
    parameters: tuple[tuple[str, Any], ...] = ()
    allocator: Allocator = AsGiven()

    def made(self) -> Method:
        return find_method(self.method)(**dict(self.parameters))

    def policy(self, loaded: LoadedModel, whole: int) -> Policy:
        """Its share is of ``whole`` tokens."""
        tokens = self.tokens or round(self.share * whole)
        shape = loaded.geometry.layers, loaded.geometry.kv_heads
        option = Option(self.made(), Budget(tokens=tokens))
        return Policy.uniform(option, *shape, allocator=self.allocator)


Measure = Callable[["Setting", Sequence[Entrant]], list[list[float]]]


@dataclass(frozen=True)
class Setting:
    """What all claims are measured on."""

    loaded: LoadedModel
    plain: list[Sample]
    needles: list[Sample]


@dataclass(frozen=True)
class Claim:
    """That ``better`` does better than ``worse``."""

    text: str
    measure: Measure
    better: Entrant
    worse: Entrant


def generated(setting: Setting, entrants: Sequence[Entrant]) -> list[list[float]]:
    """Less KL a token while the full cache generates as many tokens as a sample observes."""
    found: list[list[float]] = [[] for _ in entrants]
    for sample in setting.plain:
        room = sample.observed
        policies = [entrant.policy(setting.loaded, len(sample.token_ids)) for entrant in entrants]
        contenders = [Contender(policy) for policy in policies]
        prompt = sample.token_ids[: sample.prompt]
        generation = Generation(
            setting.loaded, prompt, contenders, room=room, temperature=1.0, seed=1
        )
        generation.advance(room)
        for own, run in zip(found, generation.results(), strict=True):
            own.append(-float(run.kl.mean()))
    return found


def cosine(setting: Setting, entrants: Sequence[Entrant]) -> list[list[float]]:
    """Cosine of the masked with the full attention, replayed on a sample's observed tokens."""
    found: list[list[float]] = [[] for _ in entrants]
    for sample in setting.plain:
        layers = list(replayable(setting.loaded, sample))
        budgets = np.ones((1, setting.loaded.geometry.kv_heads), np.int64)
        for own, entrant in zip(found, entrants, strict=True):
            method, tokens = entrant.made(), round(entrant.share * len(sample.token_ids))
            assert isinstance(method, DecodeMethod)
            runs = (replay_decoding(layer, method, tokens * budgets) for layer in layers)
            own.append(float(np.mean([float(run.cosine.mean()) for run in runs])))
    return found


def replayable(loaded: LoadedModel, sample: Sample) -> Iterator[LayerReplay]:
    """The layers of a whole sample, split where its observed tokens begin; without probes."""
    whole = prompt_signals(loaded, (*sample.token_ids, sample.next_token), Needs(ALL_QUERIES))
    for layer in range(loaded.geometry.layers):
        signals, at = whole(layer), sample.prompt
        prompt = replace(
            signals,
            queries=signals.queries[:, :at],
            keys=signals.keys[:, :at],
            values=signals.values[:, :at],
            _memo={},
        )
        queries = signals.queries[:, at:].unflatten(0, (signals.keys.shape[0], -1))
        rest = signals.keys[:, at:], signals.values[:, at:]
        yield LayerReplay(prompt, queries, *rest, torch.empty(0))


def _live(
    setting: Setting, entrants: Sequence[Entrant], samples: Sequence[Sample], digits: bool
) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in entrants]
    for sample in samples:
        policies = [entrant.policy(setting.loaded, sample.prompt) for entrant in entrants]
        needs = Needs()
        for policy in policies:
            needs |= policy.needs
        prompt = fresh_prompt(setting.loaded, sample, needs)
        asked = np.array(sample.answer_mask)
        runs = run_live(setting.loaded, sample, prompt, policies)
        for own, run in zip(found, runs, strict=True):
            value = 100 * run.correct[asked].mean() if digits else -run.kl.mean()
            own.append(float(value))
    return found


def compressed(setting: Setting, entrants: Sequence[Entrant]) -> list[list[float]]:
    """Less KL a token over the observed tokens of all samples, of a prompt compressed once."""
    return _live(setting, entrants, [*setting.plain, *setting.needles], digits=False)


def asked_later(setting: Setting, entrants: Sequence[Entrant]) -> list[list[float]]:
    """More answer digits right, the questions coming after the prompt has been compressed."""
    return _live(setting, entrants, setting.needles, digits=True)


def asked_before(setting: Setting, entrants: Sequence[Entrant]) -> list[list[float]]:
    """More answer digits right, the first question being the prompt's end."""
    return _live(setting, entrants, [first_question(s) for s in setting.needles], digits=True)


def first_question(sample: Sample) -> Sample:
    """The sample cut off after its first answer, all before that answer being the prompt."""
    first = next(needle for needle in sample.needle_of_row if needle >= 0)
    rows = [t for t, needle in enumerate(sample.needle_of_row) if needle == first]
    end = sample.prompt + rows[-1] + 1
    return replace(
        sample,
        token_ids=sample.token_ids[:end],
        next_token=sample.targets[rows[-1]],
        observed=end - sample.prompt - rows[0],
        needle_of_row=sample.needle_of_row[rows[0] : rows[-1] + 1],
    )


def _against(method: str, share: float, **parameters: Any) -> Entrant:
    return Entrant(method, share, parameters=tuple(parameters.items()))


WINDOW = {"sinks": 0}
PYRAMID = Pyramid(window=32)  # SnapKV's: without it the last layers would starve
CLAIMS = (
    Claim(
        "H2O beats a window at 20 %",
        generated, _against("h2o", 0.2), _against("streaming_llm", 0.2, **WINDOW),
    ),
    Claim(
        "sinks beat a plain window at 20 %",
        generated, _against("streaming_llm", 0.2), _against("streaming_llm", 0.2, **WINDOW),
    ),
    Claim("A2SF's attention is nearer than H2O's at 20 %",
          cosine, _against("a2sf", 0.2), _against("h2o", 0.2)),
    Claim("Ada-KV beats even budgets at 10 %",
          compressed, Entrant("snapkv", 0.1, allocator=AdaKV()), _against("snapkv", 0.1)),
    Claim("SnapKV beats H2O at 10 % where it has seen the question",
          asked_before, _against("snapkv", 0.1), _against("h2o", 0.1)),
    Claim("KVzip beats SnapKV at 10 % where the question comes later",
          asked_later, _against("kvzip", 0.1), _against("snapkv", 0.1)),
    Claim("a pyramid beats even budgets at 64 tokens",
          compressed, Entrant("snapkv", tokens=64, allocator=PYRAMID),
          Entrant("snapkv", tokens=64)),
    Claim("even budgets are no worse than a pyramid at 256 tokens",
          compressed, Entrant("snapkv", tokens=256),
          Entrant("snapkv", tokens=256, allocator=PYRAMID)),
    Claim("TOVA beats H2O at 12.5 %",
          generated, _against("tova", 0.125), _against("h2o", 0.125)),
    Claim("LazyEviction beats H2O at 50 % (plain text, not chains of thought)",
          generated, _against("lazy_eviction", 0.5, window=25), _against("h2o", 0.5)),
    Claim("LazyEviction beats TOVA at 50 % (plain text, not chains of thought)",
          generated, _against("lazy_eviction", 0.5, window=25), _against("tova", 0.5)),
    Claim("retrieval heads choose better than all heads at 10 % (CompressKV)",
          compressed, _against("compresskv", 0.1), _against("compresskv", 0.1, voters=10_000)),
    Claim("CAKE beats a SnapKV pyramid at 10 %",
          compressed, Entrant("cake", 0.1, allocator=CakeLayers()),
          Entrant("snapkv", 0.1, allocator=PYRAMID)),
    Claim("SnapKV beats KeyDiff at 10 % where the prompt is scored whole",
          compressed, _against("snapkv", 0.1), _against("keydiff", 0.1)),
    Claim("KeyDiff beats a window at 10 % where the prompt comes in blocks",
          compressed, _against("keydiff_blockwise", 0.1), _against("streaming_llm", 0.1, **WINDOW)),
    *(
        Claim(f"Keyformer beats H2O at 20 %, seed {seed}",
              generated, _against("keyformer", 0.2, seed=seed), _against("h2o", 0.2))
        for seed in range(3)
    ),
    Claim("Keyformer with noise beats none at 20 %",
          generated, _against("keyformer", 0.2), _against("keyformer", 0.2, noise=0.0)),
    Claim("merging beats evicting at 5 % (EMS reconstructed: ours, not the paper's)",
          compressed, _against("ems_reconstruction", 0.05),
          _against("ems_reconstruction", 0.05, threshold=2.0)),
)  # fmt: skip


def measured(
    measure: Measure, setting: Setting, entrants: Sequence[Entrant]
) -> dict[Entrant, list[float] | str]:
    """Every entrant's values, all at once if that works; where it cannot be run, why not."""
    try:
        return dict(zip(entrants, measure(setting, entrants), strict=True))
    except KvtuneError as error:
        if len(entrants) == 1:
            return {entrants[0]: str(error)}
    found: dict[Entrant, list[float] | str] = {}
    for entrant in entrants:
        found |= measured(measure, setting, [entrant])
    return found


def judge(claim: Claim, found: dict[Entrant, list[float] | str]) -> dict[str, Any]:
    """One claim's figure."""
    pair = found[claim.better], found[claim.worse]
    for values in pair:
        if isinstance(values, str):
            return {"claim": claim.text, "skipped": values}
    better, worse = (np.array(values) for values in pair)
    gain = better - worse
    low, high = np.percentile(bootstrap(gain, ["all"] * len(gain)), [2.5, 97.5])
    return {
        "claim": claim.text,
        "measure": claim.measure.__name__,
        "verdict": verdict(low, high),
        "gain": float(gain.mean()),
        "interval": [float(low), float(high)],
        "better": float(better.mean()),
        "worse": float(worse.mean()),
        "samples": len(gain),
    }


def verdict(low: float, high: float) -> str:
    """What an interval of the gain says of the claim."""
    if low <= 0 <= high:
        return "not decided"
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
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/claims.json"))
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())["claims"]))
    else:
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Judge the claims that are wanted, measure by measure; each is written when it is done."""
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    kinds = dict.fromkeys(("prose", "code", "retrieval"), arguments.samples)
    workload = Workload({"evaluate": kinds}, tokens=arguments.tokens, observed=arguments.observed)
    samples = build(workload, loaded.tokenizer)
    plain = [sample for sample in samples if sample.kind != "retrieval"]
    setting = Setting(loaded, plain, [s for s in samples if s.kind == "retrieval"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {name: getattr(arguments, name) for name in ("model", "device", *SIZES)}
    judged = judged_before(arguments.out, report)
    wanted = [
        claim
        for claim in CLAIMS
        if arguments.only.lower() in claim.text.lower()
        and claim.measure.__name__ in (arguments.measure or claim.measure.__name__).split(",")
    ]
    for measure in dict.fromkeys(claim.measure for claim in wanted):
        claims = [claim for claim in wanted if claim.measure is measure]
        entrants = list(dict.fromkeys(e for claim in claims for e in (claim.better, claim.worse)))
        found = measured(measure, setting, entrants)
        for claim in claims:
            judged[claim.text] = judge(claim, found)
            print(line(judged[claim.text]), flush=True)
        listed = [judged[claim.text] for claim in CLAIMS if claim.text in judged]
        arguments.out.write_text(json.dumps({**report, "claims": listed}, indent=1) + "\n")


def judged_before(out: Path, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file holds already, if it was measured alike."""
    found = json.loads(out.read_text()) if out.exists() else {}
    alike = {name: found.get(name) for name in report} == report
    return {judged["claim"]: judged for judged in found["claims"]} if alike else {}


SIZES = ("samples", "tokens", "observed")


def line(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"skipped     {found['claim']}: {found['skipped']}"
    low, high = found["interval"]
    gain = f"{found['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"{found['verdict']:11} {found['claim']}: {gain}"


UNITS = {"cosine": "cosine", "asked_later": "points", "asked_before": "points"}


def table(judged: Sequence[dict[str, Any]]) -> str:
    """Claims with their verdicts and figures, as Markdown."""
    lines = ["| claim | verdict | gain | samples |", "|---|---|---|---|"]
    for found in judged:
        if "skipped" in found:
            lines.append(f"| {found['claim']} | skipped: {found['skipped']} | - | - |")
            continue
        low, high = found["interval"]
        gain = f"{found['gain']:+.3g} [{low:+.2g}, {high:+.2g}]"
        gain += f" {UNITS.get(found['measure'], 'nats/token')}"
        lines.append(f"| {found['claim']} | {found['verdict']} | {gain} | {found['samples']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
