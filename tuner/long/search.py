"""The search for a long generation, first to last: trace, tables, plans, live rounds, files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import kvtune
from kvtune.common.estimate import Estimate
from kvtune.common.files import cache_dir, write_json, write_text
from kvtune.common.lock import locked
from kvtune.common.progress import Progress, Silent
from kvtune.common.units import format_bytes
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy_file.document import PolicyDocument, Serving, write_policy
from kvtune.simulator.model_facts import model_facts
from kvtune.tuner.long.bound import mean_full_bytes
from kvtune.tuner.long.menu import LongMenu
from kvtune.tuner.long.plans import Generated, LongPlan, candidates, choose
from kvtune.tuner.quality import estimate, ratio_interval
from kvtune.tuner.request import SearchRequest

OBSERVED = 1024
LIVE_TOKENS = {"cpu": 256, "cuda": 1024}
"""Of each generation in which plans are tried, at most."""
PLAN_FILE = "policy.yaml"


@dataclass(frozen=True)
class LongResult:
    """What a search for a long generation has found.

    Args:
        asked: the generation.
        plan: the chosen one.
        full_mean_bytes: of the uncompressed cache, mean over steps.
        live_rounds: what the finalists lost on the selection prompts, nats/token.
        live: loss of the plan on held-out prompts, nats/token.
        uniform: the uniform option that replay thinks best; None where none fits.
        uniform_live: its loss on the same prompts.
        times_the_plan: the ratio of the two losses with its 95 % interval.
        peak_bytes: most that the plan held in any of those generations.
        page_bytes: of the pages that hold a sequence under the plan, at its end.
        generated: tokens of each of them.
        prompts: how many.
    """

    asked: Generated
    plan: LongPlan
    full_mean_bytes: float
    live_rounds: dict[str, float]
    live: Estimate
    uniform: str | None
    uniform_live: Estimate | None
    times_the_plan: tuple[float, float, float] | None
    peak_bytes: float
    page_bytes: int
    generated: int
    prompts: int

    @property
    def notes(self) -> tuple[str, ...]:
        """How the plan is run in pages."""
        return (
            f"in pages: load_cache({PLAN_FILE!r}, model, new_tokens={self.asked.tokens}, "
            f"evicts=True, residual={self.asked.menu.residual}) takes "
            f"{format_bytes(self.page_bytes)} a sequence; exported serving stacks do not evict "
            "while they generate.",
        )

    def as_dict(self) -> dict[str, Any]:
        """The form that goes into ``result.json``."""
        uniform = None if self.uniform_live is None else self.uniform_live.as_dict()
        times = self.times_the_plan
        return {
            "prompt_tokens": self.asked.prompt_tokens,
            "generated_tokens": self.asked.tokens,
            "bound_bytes": self.asked.bound_bytes,
            "residual_tokens": self.asked.menu.residual,
            "full_mean_bytes": self.full_mean_bytes,
            "plan": self.plan.name,
            "policy": PLAN_FILE,
            "most_bytes": self.plan.most_bytes,
            "predicted_kl": self.plan.predicted,
            "live_rounds": self.live_rounds,
            "live_kl": self.live.as_dict(),
            "uniform": self.uniform,
            "uniform_live_kl": uniform,
            "times_the_plan": times and [each if isfinite(each) else None for each in times],
            "peak_bytes": self.peak_bytes,
            "page_bytes": self.page_bytes,
            "generated_live": self.generated,
            "held_out_prompts": self.prompts,
            "notes": list(self.notes),
        }


def run_long_search(
    request: SearchRequest,
    bound_bytes: int,
    menu: LongMenu | None = None,
    progress: Progress | None = None,
) -> LongResult:
    """Find the plan that loses least live within the bound, and write it to the run directory.

    Args:
        request: model, prompt and generated tokens, samples, seed and folder.
        bound_bytes: that all heads of a sequence together may hold at any moment.
        menu: what heads may be given.
        progress: told of every step.

    Raises:
        KvtuneError: the weights are not at hand, or no plan keeps to the bound.
    """
    from kvtune.simulator.quality.decoding import build_decode_tables
    from kvtune.traces.models import best_device, load_model
    from kvtune.tuner.long.live import capture_long, live_rounds

    menu, progress = menu or LongMenu(), progress or Silent()
    asked = Generated(request.context_tokens, request.generated_tokens, bound_bytes, menu)
    with locked(request.run_dir):
        device = request.device or best_device()
        loaded = load_model(request.model, device=device, dtype="float32", progress=progress)
        samples = _samples(request, loaded.tokenizer)
        traced = [sample for sample in samples if sample.split != "evaluate"]
        folder = cache_dir() / "traces" / f"{request.shape.name}-long-{_key(loaded, traced, menu)}"
        trace = capture_long(loaded, traced, folder, menu, progress)
        options = menu.options(len(traced[0].token_ids))
        tables = build_decode_tables(
            trace, options, residual=menu.residual, device=device, progress=progress
        )
        found = candidates(tables, asked)
        select = [sample for sample in samples if sample.split == "select"]
        ahead = LIVE_TOKENS[device.partition(":")[0]]
        plan, rounds = choose(found, live_rounds(loaded, select, asked, ahead, progress))
        result = _judged(loaded, samples, asked, plan, rounds, found, progress)
        _write(request, result)
    return result


def _samples(request: SearchRequest, tokenizer: Any) -> list[Any]:
    """Of each split as many as the workload has, with a long observed part after the prompt."""
    from kvtune.traces.workloads import build, named_workload

    workload = named_workload(request.workload, request.seed, request.texts)
    observed = min(OBSERVED, request.generated_tokens)
    kinds = {split: _written(each) for split, each in workload.counts.items()}
    tokens = request.context_tokens + observed
    return build(replace(workload, counts=kinds, tokens=tokens, observed=observed), tokenizer)


def _written(counts: Any) -> dict[str, int]:
    """Texts that go on by themselves; nothing is asked in a generation."""
    return {kind: count for kind, count in counts.items() if kind in ("prose", "code", "user")}


def _key(loaded: Any, samples: Sequence[Any], menu: LongMenu) -> str:
    from kvtune.traces.samples import content_hash

    parts = [loaded.fingerprint, content_hash(samples), repr(menu.needs), loaded.dtype]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _judged(
    loaded: Any,
    samples: Sequence[Any],
    asked: Generated,
    plan: LongPlan,
    rounds: dict[str, float],
    found: Sequence[LongPlan],
    progress: Progress,
) -> LongResult:
    """The plan and the best uniform option, on prompts that took no part in the choice."""
    from kvtune.tuner.long.live import in_batches, live_policy

    uniform = next((each for each in found if each.is_uniform), None)
    beside = [plan, *([uniform] if uniform and uniform is not plan else [])]
    held_out = [sample for sample in samples if sample.split == "evaluate"]
    both = [live_policy(each.policy, asked) for each in beside]
    runs = in_batches(loaded, held_out, both, asked.prompt_tokens, asked.tokens, progress)
    kinds = [sample.kind for sample in held_out]
    losses = [[float(run[row].kl.mean()) for run in runs] for row in range(len(beside))]
    baseline = losses[1] if len(losses) > 1 else None
    geometry = loaded.geometry
    heads = geometry.layers * geometry.kv_heads
    return LongResult(
        asked=asked,
        plan=plan,
        full_mean_bytes=mean_full_bytes(
            asked.prompt_tokens, asked.tokens, heads, geometry.head_dim
        ),
        live_rounds=rounds,
        live=estimate(losses[0], kinds, "live"),
        uniform=None if baseline is None else beside[1].name,
        uniform_live=None if baseline is None else estimate(baseline, kinds, "live"),
        times_the_plan=None if baseline is None else ratio_interval(baseline, losses[0], kinds),
        peak_bytes=max(run[0].peak_bytes for run in runs),
        page_bytes=sequence_bytes(
            plan.policy,
            asked.prompt_tokens,
            geometry.head_dim,
            Growth(asked.tokens, evicts=True, residual=asked.menu.residual),
        ),
        generated=len(runs[0][0].kl),
        prompts=len(runs),
    )


def _write(request: SearchRequest, result: LongResult) -> None:
    asked = result.asked
    document = PolicyDocument(
        policy=result.plan.policy,
        model=model_facts(request.shape),
        serving=Serving(
            weights=request.weights,
            context_tokens=asked.prompt_tokens,
            generated_tokens=asked.tokens,
            batch=1,
            gpu=request.gpu.slug,
            cache_bytes=asked.bound_bytes,
        ),
    )
    write_text(Path(request.run_dir) / PLAN_FILE, write_policy(document))
    plain = {"model": request.shape.name, "kvtune": kvtune.__version__} | result.as_dict()
    write_json(Path(request.run_dir) / "result.json", plain)
