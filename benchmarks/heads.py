"""Whether the heads that are found are the heads that are needed, on SmolLM2.

    python benchmarks/heads.py --out benchmarks/results/heads-2-h200.json [--heads HEADS]
    python benchmarks/heads.py --out FILE --heads HEADS --only-overlap  # of these, no model

``masked`` answers held-out 8-needle samples with the top 5 % of retrieval heads silenced, in the
prompt and after it, and with as many others drawn at random, five times. ``overlap`` holds every
head score against the bytes that our own tuner gives each KV head at 6 and 12 %: rank correlation,
and how many of the top tenth are the same. The scores of --heads, learned gates, are held against
it too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recorded_parts import attempt, say
from scipy.stats import spearmanr
from torch import Tensor

from kvtune.policies.head_plans import most
from kvtune.policies.head_scores import HeadScores, read_heads, write_heads
from kvtune.runtime.head_detectors import detect
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.seam import attending, causal_attention
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.source_models import packaged_tables

DRAWS, SHARE = 5, 0.05


@torch.no_grad()
def right(loaded: LoadedModel, sample: Sample, silent: np.ndarray) -> tuple[int, int]:
    """Digits right and asked, with the heads of ``silent`` ``[L, Hq]`` giving nothing."""
    mask = torch.from_numpy(silent).to(loaded.device)

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        output = causal_attention(q, k, v, scale, window)
        return output.masked_fill(mask[layer][None, :, None, None], 0)

    ids = torch.tensor([list(sample.token_ids)], device=loaded.device)
    with attending(handler):
        logits = loaded.model(
            input_ids=ids, use_cache=False, logits_to_keep=sample.observed
        ).logits[0]
    asked = torch.tensor(sample.answer_mask)
    hits = logits.argmax(-1).cpu() == torch.tensor(sample.targets)
    return int((hits & asked).sum()), int(asked.sum())


def accuracy(loaded: LoadedModel, samples: Sequence[Sample], silent: np.ndarray) -> float:
    counts = np.array([right(loaded, sample, silent) for sample in samples])
    return float(counts[:, 0].sum() / counts[:, 1].sum())


def masked(
    loaded: LoadedModel, heads: HeadScores, samples: Sequence[Sample], draws_of_others: int
) -> dict[str, Any]:
    """Accuracy in full, without the top heads of each score, and without random ones."""
    scores = heads.score("retrieval")
    found: dict[str, Any] = {"full": accuracy(loaded, samples, np.zeros(scores.shape, bool))}
    for name in ("retrieval", "semantic", "induction", "echo"):
        found[name] = accuracy(loaded, samples, most(heads.score(name), SHARE))
        say("without", name, found[name])
    top = most(scores, SHARE)
    others = np.flatnonzero(~top)
    draws = []
    for draw in range(draws_of_others):
        silent = np.zeros(scores.size, bool)
        picked = np.random.default_rng(draw).choice(others, int(top.sum()), replace=False)
        silent[picked] = True
        draws.append(accuracy(loaded, samples, silent.reshape(scores.shape)))
        say("without random", draws[-1])
    found |= {"heads": int(top.sum()), "random": draws, "goal_points": 30}
    found["points_more_than_random"] = 100 * (float(np.mean(draws)) - found["retrieval"])
    return found


def overlap(heads: HeadScores) -> dict[str, Any]:
    """Every score against the bytes of our own plan, KV head by KV head."""
    tables, _ = packaged_tables()
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    problem = Problem.of(tables.of_split("search"), footprint)
    found: dict[str, Any] = {}
    for share in (0.06, 0.12):
        budget = int(share * 4 * tables.prompt_tokens * tables.head_dim * tables.heads)
        given = footprint[solve(problem, budget)].reshape(tables.layers, tables.kv_heads)
        protected = most(given.astype(np.float32), 0.1)
        for name in sorted(heads.scores):
            score = heads.of_kv_heads(name, tables.kv_heads)
            top = most(score, 0.1)
            found[f"{name} at {100 * share:g} %"] = {
                "spearman": float(spearmanr(score.ravel(), given.ravel()).statistic),
                "of_top_tenth": float((top & protected).sum() / top.sum()),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--heads", type=Path, help="more head scores, such as learned gates")
    parser.add_argument("--tiny", action="store_true", help="that it runs, in a minute")
    parser.add_argument("--only-overlap", action="store_true", help="of the scores of --heads")
    arguments = parser.parse_args()
    if arguments.only_overlap:
        given = read_heads(arguments.heads)
        held = {"model": given.model, "overlap": overlap(given)}
        arguments.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        return
    loaded = load_model("smollm2-135m", device=arguments.device, dtype="float32")
    tokens, count, block = (640, 1, 64) if arguments.tiny else (2048, 16, 2500)
    observed = 128 if arguments.tiny else 256
    search = Workload({"search": {"retrieval": min(count, 8)}}, tokens=tokens, observed=observed)
    held_out = Workload({"evaluate": {"retrieval": count}}, tokens=tokens, observed=observed)
    repeats = 3 if not arguments.tiny else 4  # 7500 tokens: SmolLM2 reads 8192
    heads = detect(loaded, build(search, loaded.tokenizer), block=block, repeats=repeats, seed=0)
    samples = build(held_out, loaded.tokenizer)
    write_heads(heads, arguments.out.with_suffix(".safetensors"))
    found: dict[str, Any] = {
        "model": loaded.name,
        "device": loaded.device,
        "torch": torch.__version__,
        "samples": len(samples),
        "data": {name: vars(about) for name, about in heads.about.items()},
        "above_0.1": {n: float((s > 0.1).mean()) for n, s in sorted(heads.scores.items())},
    }
    record = found.__setitem__
    attempt(
        record,
        "masked",
        lambda: masked(loaded, heads, samples, 1 if arguments.tiny else DRAWS),
    )
    if arguments.heads:
        more = read_heads(arguments.heads)
        heads = replace(
            heads, scores={**heads.scores, **more.scores}, about={**heads.about, **more.about}
        )
    attempt(record, "overlap", lambda: overlap(heads))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    say(json.dumps(found["masked"]))


if __name__ == "__main__":
    main()
