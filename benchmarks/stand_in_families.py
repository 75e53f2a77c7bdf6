"""Which families of policies hold up on a model that was no source, live at equal bytes.

    python benchmarks/stand_in_families.py MODEL --out benchmarks/results/FILE.json

What a search on the packaged tables offers without the model's weights beside rules that decide at
run time from the prompt, and so need to know nothing of the model's heads: uniform ones, AdaKV, and
what has been published since. Every rule is tried in 4 and 3 bits with exact sinks and in 16 bits.
``offered`` is what a search chooses: the best of the menu's options for all heads (``option``), or
a rule that lost less on the source. Samples are short enough for layers with a window of 512
tokens. Written after every sample. Given an earlier results file in place of MODEL, it says by
those losses what would be offered today.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtune.common.files import write_json
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int3, Int4
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.baselines import FAMILIES, STRONG, candidates
from kvtune.tuner.curves import Row, rows_at
from kvtune.tuner.quality import mean_over_kinds, ratio_interval
from kvtune.tuner.solver import evicts
from kvtune.tuner.source_models import all_tables, packaged_calibration, packaged_tables
from kvtune.tuner.stand_in_rules import GROUPS
from kvtune.tuner.validate import union_of_needs

KINDS = ("prose", "code", "retrieval")
SHARES = (0.03, 0.045, 0.06, 0.09, 0.12, 0.18, 0.25, 0.35)
TRIED = ("uniform", "pyramid", "adakv", "kvzip", "expected_attention", "keydiff")
FORMS = (Bf16(), Int4(exact_first=4), Int3(exact_first=4))
OFFERED, OPTION = "offered", "option"
TOKENS, OBSERVED = 448, 64
ROWS = 18


def chosen(share: float, prompt: int, head_dim: int) -> tuple[Option, Row | None]:
    """At a share of the bytes the best option for all heads, and a rule that lost less, if one."""
    option, expected = _best_option(share, head_dim)
    rule = _best_rule(share, prompt)
    return option, rule if rule.loss.value < expected else None


def offered(
    shape: tuple[int, int, int, int], shares: Iterable[float]
) -> Iterator[tuple[float, str, Policy]]:
    """At every share the best option for all heads, and what a search chooses.

    Args:
        shape: prompt tokens, layers, KV heads and their dimension.
        shares: of the bf16 bytes.
    """
    prompt, layers, kv_heads, head_dim = shape
    for share in shares:
        option, rule = chosen(share, prompt, head_dim)
        alone = Policy.uniform(option, layers, kv_heads)
        yield share, OPTION, alone
        if rule is None:
            yield share, OFFERED, alone
            continue
        parts = rule.stored()
        assert parts is not None
        budget = int(share * 4 * np.prod(shape))
        made = candidates(rule.family, budget, *shape, {parts[1:]})
        yield from ((share, OFFERED, policy) for policy in made if policy.name == rule.name)


def _best_option(share: float, head_dim: int) -> tuple[Option, float]:
    """The packaged tables' best for all heads within a share of the bytes, and its loss."""
    tables = all_tables(1, 1, head_dim, "any")[0]
    judging, curves = tables.of_split("select"), packaged_calibration()
    kinds = [sample.kind for sample in judging.samples]
    tokens = tables.prompt_tokens
    taken = tables.footprints(tokens, head_dim) / (4 * head_dim * tokens)

    def loss(number: int) -> float:
        option = tables.options[number]
        return curves.mean(judging.by_sample(np.array([number])), kinds, evicts(option))

    best = min(np.flatnonzero(taken <= share), key=loss)
    return tables.options[best], loss(best)


def _best_rule(share: float, prompt: int) -> Row:
    """The rule that lost least on the source at a share of the bytes."""
    tables, about = packaged_tables()
    families = [family for group in GROUPS for family in group]
    rows = rows_at(about["baselines"], share, families, prompt / tables.prompt_tokens)
    return min(rows, key=lambda row: row.loss.value)


def entries(
    loaded: LoadedModel, prompt: int, shares: tuple[float, ...], families: tuple[str, ...]
) -> list[tuple[float, str, Policy]]:
    """Share, family and policy of all that is run."""
    geometry = loaded.geometry
    shape = prompt, geometry.layers, geometry.kv_heads, geometry.head_dim
    full = 4 * int(np.prod(shape))
    found = list(offered(shape, shares))
    for share in shares:
        for family in families:
            only = {(m, form) for _, m in (FAMILIES | STRONG)[family] for form in FORMS}
            found += [
                (share, family, policy)
                for policy in candidates(family, int(share * full), *shape, only)
            ]
    return found


def losses(loaded: LoadedModel, sample: Sample, policies: list[Policy]) -> list[float]:
    """What every policy loses live on a sample, nats/token."""
    prompt = fresh_prompt(loaded, sample, union_of_needs(policies))
    full = full_cache(loaded, sample, prompt)
    found = []
    for at in range(0, len(policies), ROWS):
        some = policies[at : at + ROWS]
        found += [float(run.kl.mean()) for run in run_live(loaded, sample, prompt, some, full)]
    return found


def judged(rows: list[dict[str, Any]], kinds: list[str]) -> dict[str, Any]:
    """At every share the best of each family, over the best uniform rule; an interval with it."""
    found: dict[str, Any] = {}
    for share in dict.fromkeys(row["share"] for row in rows):
        best: dict[str, dict[str, Any]] = {}
        for row in (row for row in rows if row["share"] == share):
            loss = mean_over_kinds(row["losses"], kinds)
            if row["family"] not in best or loss < best[row["family"]]["loss"]:
                best[row["family"]] = {
                    "policy": row["policy"], "loss": loss, "losses": row["losses"]
                }  # fmt: skip
        uniform = best["uniform"]["losses"]
        for each in best.values():
            ratio, low, high = ratio_interval(each.pop("losses"), uniform, kinds)
            each |= {"times the best uniform": ratio, "interval": [low, high]}
        found[f"{100 * share:g}%"] = best
    return found


def judged_again(earlier: dict[str, Any]) -> dict[str, Any]:
    """An earlier file with what would be offered today, by the losses of the same policies."""
    named = {OFFERED: OPTION} if all(row["family"] != OPTION for row in earlier["rows"]) else {}
    rows = [
        {**row, "family": named.get(row["family"], row["family"])}
        for row in earlier["rows"]
        if named or row["family"] != OFFERED
    ]
    ran = {(row["share"], row["policy"]): row["losses"] for row in rows}
    for share in dict.fromkeys(row["share"] for row in rows):
        option, rule = chosen(share, TOKENS - OBSERVED, earlier.get("head_dim", 256))  # Gemma's
        name = rule.name if rule else option.label
        losses = ran[share, name]
        rows.append({"share": share, "family": OFFERED, "policy": name, "losses": losses})
    return {**earlier, "best": judged(rows, earlier["kinds"]), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="weights, or a results file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--each", type=int, default=4, help="samples of a kind of text")
    parser.add_argument("--seconds", type=float, default=600.0, help="no sample is begun after")
    parser.add_argument("--tiny", action="store_true", help="one share, two families, one sample")
    arguments = parser.parse_args()
    if arguments.model.endswith(".json"):
        earlier = json.loads(Path(arguments.model).read_text(encoding="utf-8"))
        write_json(arguments.out, judged_again(earlier))
        return
    started = time.monotonic()
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    each = 1 if arguments.tiny else arguments.each
    shares, families = (SHARES[4:5], TRIED[::3]) if arguments.tiny else (SHARES, TRIED)
    workload = Workload({"evaluate": dict.fromkeys(KINDS, each)}, tokens=TOKENS, observed=OBSERVED)
    samples = by_turns(build(workload, loaded.tokenizer))
    everyone = entries(loaded, samples[0].prompt, shares, families)
    rows: list[dict[str, Any]] = [
        {"share": share, "family": family, "policy": policy.name, "losses": []}
        for share, family, policy in everyone
    ]
    found: dict[str, Any] = {
        "model": Path(loaded.name).name,
        "head_dim": loaded.geometry.head_dim,
        "device": torch.cuda.get_device_name() if loaded.device != "cpu" else "cpu",
        "samples": workload.describe(),
        "no needle in the last": UNASKED_END,
    }
    kinds: list[str] = []
    for sample in samples:
        if time.monotonic() - started > arguments.seconds:
            found.setdefault("left out", []).append(sample.id)
            continue
        policies = [policy for _, _, policy in everyone]
        for row, loss in zip(rows, losses(loaded, sample, policies), strict=True):
            row["losses"].append(loss)
        kinds.append(sample.kind)
        if set(kinds) == set(KINDS):
            found |= {"kinds": kinds, "best": judged(rows, kinds), "rows": rows}
            write_json(arguments.out, found)
        print(f"[{time.monotonic() - started:6.1f} s] {sample.id}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
