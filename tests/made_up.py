"""A made-up study on disk, plausible and always the same, and a search to make one of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.common.estimate import BAND, Estimate
from kvtune.common.progress import Silent
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument, write_policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.model_config import shape_from_config
from kvtune.profiles.models import find_model
from kvtune.simulator.memory.plan import memory_plan
from kvtune.traces.workloads import Workload
from kvtune.tuner.explore import PLANS_FILE
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.explore.plans import Plan, write_line
from kvtune.tuner.options import SMALL
from kvtune.tuner.request import SearchRequest


class Notes(Silent):
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


KINDS = ("code", "prose", "retrieval")
CONTEXT = 8192


def facts(**changes: Any) -> Facts:
    """Llama-3.1-8B on a 4090 in 16 GB, with SmolLM2's options."""
    asked: dict[str, Any] = {
        "study": "made-up",
        "kvtune": "0.1.0",
        "shape": find_model("llama-8b"),
        "gpu": "rtx-4090",
        "memory_bytes": 16 * 10**9,
        "weights": "fp8",
        "generated_tokens": 256,
        "largest_kl": 0.02,
        "trials": 60,
        "seed": 0,
        "source": "stand-in",
        "stand_in": "smollm2-135m",
        "kinds": KINDS,
        "selection_samples": 9,
        "held_out_samples": 24,
        "measured_tokens": 1792,
        "options": SMALL.options(),
    }
    return Facts(**asked | changes)


def plans(count: int, about: Facts, seed: int = 0) -> list[Plan]:
    """Plans of falling bytes and rising loss, some better than others."""
    rng = np.random.default_rng(seed)
    sizes = _footprints(about)
    return [_plan(trial, count, about, sizes, rng) for trial in range(count)]


def _footprints(about: Facts) -> Any:
    """Bytes of each option, ``[O]``."""
    head_dim = about.shape.head_dim
    return np.array(
        [o.footprint(o.budget.resolve(CONTEXT), CONTEXT, head_dim) for o in about.options]
    )


def _plan(trial: int, count: int, about: Facts, sizes: Any, rng: np.random.Generator) -> Plan:
    depth = (trial * 7 % max(count, 1)) / max(count - 1, 1)
    heads = _heads(depth, about, sizes, rng)
    size = int(sizes[heads].sum())
    loss = 0.0004 * np.exp(6.5 * depth) * rng.lognormal(0.15, 0.25) * (trial > 0)
    kinds = tuple(float(loss * f) for f in rng.uniform(0.7, 1.3, len(about.kinds)))
    return Plan(
        trial=trial,
        context_tokens=CONTEXT,
        sequences=int(5_000_000_000 // (size + 33_554_432)),
        prompt_bytes=int(size) + 4 * len(heads),
        kl=_estimate(float(loss)),
        held_out=_estimate(float(np.mean(kinds))),
        by_kind=kinds,
        heads=heads,
        parameters={
            "h2o": True,
            "snapkv": bool(trial % 2),
            "least_bits": 2,
            "split": "heads" if trial % 3 else "layers",
            "shrinkage": round(0.4 + trial % 5 / 100, 2),
            "context": CONTEXT,
            "trial": trial,
        },
    )


def _estimate(loss: float) -> Estimate:
    return Estimate(loss, 0.6 * loss, 1.7 * loss, "nats/token", BAND)


def _heads(depth: float, about: Facts, sizes: Any, rng: np.random.Generator) -> Any:
    """Option numbers whose bytes fall as ``depth`` goes from 0 to 1."""
    shape = about.shape
    order = np.argsort(sizes, kind="stable")[::-1]
    place = depth * (len(order) - 1) + rng.normal(0, 4, shape.layers * shape.kv_heads)
    return order[np.clip(place.round().astype(int), 0, len(order) - 1)].astype(np.uint16)


def write_study(
    folder: Path,
    count: int = 60,
    finished: bool = True,
    live: bool = False,
    live_kinds: bool = False,
    **changes: Any,
) -> Path:
    """A run directory with that many plans."""
    folder.mkdir(parents=True, exist_ok=True)
    about = facts(**changes)
    made = plans(count, about)
    lines = [json.dumps(about.as_plain()) + "\n", *map(write_line, made)]
    (folder / PLANS_FILE).write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"model": about.shape.name}))
    if finished and made:
        _finish(folder, about, made, live)
    if live_kinds:
        _add_live_kinds(folder / "result.json")
    return folder


def _add_live_kinds(path: Path) -> None:
    """As searches have written them since: of the plan and the best uniform policy."""
    result = json.loads(path.read_text())
    for baseline in result["baselines"][::2]:
        loss = baseline["live"]["value"]
        baseline["live_by_kind"] = {kind: _loss(loss, "live") for kind in KINDS}
    path.write_text(json.dumps(result))


def _finish(folder: Path, about: Facts, made: list[Plan], live: bool) -> None:
    within = [p for p in made if p.kl.value <= about.largest_kl] or made[:1]
    chosen = max(within, key=lambda p: p.sequences)
    greedy = _policy(about, chosen.heads[::-1], "greedy per head")
    (folder / "baselines").mkdir(exist_ok=True)
    document = PolicyDocument(
        greedy,
        ModelFacts(
            about.shape.name, about.shape.layers, about.shape.kv_heads, about.shape.head_dim
        ),
    )
    (folder / "baselines" / "greedy.yaml").write_text(write_policy(document))
    value = chosen.kl.value
    baselines = [
        _baseline("kvtune plan", "kvtune", 1.1 * value, chosen, "policy.yaml", live),
        _baseline("greedy per head", "greedy", 1.3 * value, chosen, "baselines/greedy.yaml", live),
        _baseline("uniform h2o int3+4", "uniform", 9 * value, chosen, None, live),
        _baseline("adakv snapkv int4", "adakv", 10 * value, chosen, None, live),
    ]
    quality = baselines[0]["live"] or baselines[0]["predicted"]
    rate, second = _figure(900.0, "tokens/s", "datasheet"), _figure(0.05, "s", "datasheet")
    point = {
        "kl": value, "context_tokens": chosen.context_tokens, "sequences": chosen.sequences,
        "prompt_bytes": chosen.prompt_bytes, "share": 0.1, "time_per_token": second,
        "tokens_per_second": rate, "parameters": chosen.parameters, "weights": "fp8",
        "chosen": True, "band": None,
    }  # fmt: skip
    result = {
        "kvtune": about.kvtune,
        "model": about.shape.name,
        "gpu": "h100-sxm",
        "policy": "policy.yaml",
        "budget": {},
        "front": [point],
        "baselines": baselines,
        "quality": _quality(quality),
        "predicted_quality": _quality(baselines[0]["predicted"]),
        "memory": _figure(9e9, "B", "assumed"),
        "latency": second,
        "prefill": second,
        "compression": second,
        "context_tokens": chosen.context_tokens,
        "sequences": chosen.sequences,
        "sequence_bytes": chosen.prompt_bytes + 2**24,
        "prompt_bytes": chosen.prompt_bytes,
        "share": 0.1,
        "full_cache_sequences": 5,
        "full_cache_accuracy": _share(0.96) if live else None,
        "notes": ["weights: fp8 weights, the widest that leave room for a cache."],
        "counters": {"tokens_kept": 51200} if live else {},
        "provenance": {"study": about.study, "kvtune": about.kvtune, "seed": 0, "trace": "c0ffee"},
    }
    (folder / "result.json").write_text(json.dumps(result))


def _quality(figure: dict[str, Any]) -> dict[str, Any]:
    kl = {key: figure[key] for key in ("interval", "tier")}
    return {"kl_nats_per_token": figure["value"], **kl, "source": "own trace"}


def _policy(about: Facts, heads: Any, name: str) -> Policy:
    rows = np.asarray(heads).reshape(-1, about.shape.kv_heads)
    options: tuple[Option, ...] = about.options
    return Policy(name, tuple(tuple(options[o] for o in row) for row in rows))


def _baseline(
    name: str, family: str, loss: float, chosen: Plan, policy: str | None, live: bool
) -> dict[str, Any]:
    return {
        "name": name,
        "family": family,
        "predicted": _loss(loss, "table"),
        "live": _loss(1.2 * loss, "live") if live else None,
        "prompt_bytes": chosen.prompt_bytes,
        "perplexity_change": _figure(loss, "ratio - 1", "live") if live else None,
        "retrieval_accuracy": _share(0.96 - loss) if live else None,
        "by_kind": {kind: _loss(loss, "table") for kind in KINDS} if policy else {},
        "policy": policy,
    }


def _loss(value: float, tier: str) -> dict[str, Any]:
    return _figure(value, "nats/token", tier)


def _share(value: float) -> dict[str, Any]:
    return _figure(value, "share", "live")


def _figure(value: float, unit: str, tier: str) -> dict[str, Any]:
    return {"value": value, "interval": [0.8 * value, 1.3 * value], "unit": unit, "tier": tier}


def times(largest: bool = True, nvml: bool = True) -> Any:
    """What timing a plan on a GPU has found; those of the plan alone were predicted."""
    from kvtune.runtime.largest import Largest
    from kvtune.runtime.timing import Beside, Timing
    from kvtune.tuner.expected import Expected, ExpectedLargest
    from kvtune.tuner.timing import Most, Times

    def timing(scale: int, batch: int = 8) -> Timing:
        one = Estimate(0.004 * scale, 0.003 * scale, 0.005 * scale, "s", "measured")
        rate = Estimate(2000 / scale, 1600 / scale, 2500 / scale, "tokens/s", "measured")
        seen = (scale + 1) << 30 if nvml else None
        return Timing(batch, one, rate, scale << 30, seen, scale << 29, scale << 29, one)

    def near(value: float, unit: str) -> Estimate:
        return Estimate(value, 0.9 * value, 1.1 * value, unit, "fitted")

    guess = Expected(
        near(0.0031, "s"), near(0.0041, "s"), near(2010, "tokens/s"), near(2 << 30, "B"),
        near(2.1 * 2**30, "B"),
    )  # fmt: skip
    expected = {"plan": ExpectedLargest(near(40, "sequences"), near(2050, "tokens/s"))}
    most = Most(Largest(44, 45, 5, timing(1, 44)), Largest(10, None, 10, timing(2, 10)), expected)
    beside = Beside(4096, timing(1), timing(2))
    return Times("h100-sxm", beside, guess, None, most if largest else None)


def llama(run_dir: Path, **changes: Any) -> SearchRequest:
    """A search for Llama on a 4090 with 16 GB, whose weights are not at hand."""
    shape = find_model("llama-8b")
    asked = SearchRequest(
        shape.name, shape, find_gpu("4090"), 16 * 10**9, run_dir, largest_kl=0.1, trials=12
    )
    return replace(asked, **changes)


def little_workload() -> Workload:
    """Two samples of 80 prompt tokens in each split, in the place of the built-in texts."""
    each = {"prose": 1, "code": 1}
    return Workload(dict.fromkeys(("search", "select", "evaluate"), each), tokens=96, observed=16)


def of_own_weights(model: Path, run_dir: Path, sequences: int = 1, **asked: Any) -> SearchRequest:
    """A search on a tiny model's folder, with room for 90 tokens of all sequences in 16 bits.

    Of 80 prompt tokens and 4 generated ones, which do not quite fit: pages hold 16 each.
    """
    shape, gpu = shape_from_config(model), find_gpu("4090")
    sizes: dict[str, Any] = {"context_tokens": 80, "weights": "bf16"}
    used = memory_plan(shape, gpu, 10**10, batch=sequences, **sizes)
    limit = 10**10 - used.cache_bytes + shape.kv_bytes(90)
    more: dict[str, Any] = {"generated_tokens": 4, "largest_kl": 0.5, "trials": 10, "device": "cpu"}
    more["menu"] = "three"
    more |= asked
    if sequences > 1:
        more["sequences"] = sequences
    return SearchRequest(str(model), shape, gpu, limit, run_dir, **sizes, **more)
