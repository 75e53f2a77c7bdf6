"""What a stand-in offers at equal bytes, live on a model that was no source, and what is best.

    python benchmarks/stand_in_live.py MODEL NAME.safetensors --out benchmarks/results/FILE.json

NAME.safetensors are the model's own tables (``second_source.py``). At every share of the bf16 bytes
run: the option that the source's losses choose, those that the model's own tables put first, and
policies that decide at run time from the prompt, filled to the same bytes. ``times`` is a policy's
loss over that of the best option for all heads, which is known only afterwards and is picked on the
very samples shown; its 95 % interval is of the same samples, pair by pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recorded_parts import say
from stand_in_tables import losses

from kvtune.common.files import write_json
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.policy import Policy
from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.quality.tables import Tables, head_exchangeable
from kvtune.simulator.quality.tables_file import load_tables
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.baselines import candidates
from kvtune.tuner.quality import mean_over_kinds, ratio_interval
from kvtune.tuner.source_models import packaged_tables
from kvtune.tuner.validate import union_of_needs

SHARES = (0.06, 0.12, 0.25, 0.03)
KINDS = ("prose", "code", "retrieval")
FORM = Int4(exact_first=4)
FAMILIES = {
    "kvzip": (KVzip(), FORM),
    "adakv": (H2O(), FORM),
    "expected_attention": (ExpectedAttention(), FORM),
}
_TOGETHER = 5


def mean_losses(tables: Tables) -> np.ndarray:
    """Loss of each option on held-out samples, nats/token."""
    return np.array([mean_over_kinds(*each) for each in losses(tables)])


class Bench:
    """The model, the samples, and what runs at a share of the bytes."""

    def __init__(self, loaded: LoadedModel, own: Tables, texts: int, tokens: int) -> None:
        packaged = packaged_tables()[0]
        self.loaded, self.source = loaded, head_exchangeable(packaged, "any", 1, 1, 1)
        self.by_source, self.by_own = mean_losses(self.source), mean_losses(own)
        plan = Workload({"evaluate": dict.fromkeys(KINDS, texts)}, tokens=tokens, observed=64)
        self.samples = build(plan, loaded.tokenizer)
        self.prompt = tokens - 64

    def policies(self, share: float, first: int) -> dict[str, list[Policy]]:
        """By what they are there for: offered, best by the own tables, deciding at run time."""
        geometry = self.loaded.geometry
        shape = geometry.layers, geometry.kv_heads
        options = self.source.options
        bytes_each = self.source.footprints(self.prompt, geometry.head_dim)
        fits = bytes_each <= share * 4 * geometry.head_dim * self.prompt

        def ranked(by: np.ndarray, count: int) -> list[Policy]:
            order = np.argsort(np.where(fits, by, np.inf))[:count]
            return [Policy.uniform(options[o], *shape) for o in order if fits[o]]

        budget = int(share * 4 * self.prompt * geometry.head_dim * shape[0] * shape[1])
        sizes = (budget, self.prompt, *shape, geometry.head_dim)
        return {
            "offered": ranked(self.by_source, 1),
            "uniform": ranked(self.by_own, first),
            "at run time": [
                policy
                for family, stored in FAMILIES.items()
                for policy in candidates(family, *sizes, only=[stored])
            ],
        }

    def live(self, policies: Sequence[Policy]) -> Iterator[list[float]]:
        """Losses of all policies on one sample after another, nats/token."""
        needs = union_of_needs(policies)
        for sample in self.samples:
            prompt = fresh_prompt(self.loaded, sample, needs)
            full = full_cache(self.loaded, sample, prompt)
            batches = (policies[at : at + _TOGETHER] for at in range(0, len(policies), _TOGETHER))
            yield [
                float(run.kl.mean())
                for batch in batches
                for run in run_live(self.loaded, sample, prompt, batch, full)
            ]

    def rows(self, groups: dict[str, list[Policy]], columns: np.ndarray) -> list[dict[str, Any]]:
        """A row a policy of a share, of what each lost, ``[policies, samples]``."""
        kinds = [sample.kind for sample in self.samples]
        named = [(group, policy) for group, each in groups.items() for policy in each]
        means = [mean_over_kinds(each, kinds) for each in columns]
        alike = [at for at, (group, _) in enumerate(named) if group != "at run time"]
        best = min(alike, key=lambda at: means[at])
        found = []
        for at, (group, policy) in enumerate(named):
            value, low, high = ratio_interval(columns[at], columns[best], kinds)
            times = {"value": value, "interval": [low, high]}
            row = {"policy": policy.name, "group": group, "live": means[at], "times": times}
            found.append(row | {"by sample": columns[at].tolist()})
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=2, help="of a kind")
    parser.add_argument("--first", type=int, default=4, help="options by the model's own tables")
    parser.add_argument("--tokens", type=int, default=448)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    own = load_tables(arguments.tables)[0]
    bench = Bench(loaded, own, arguments.texts, arguments.tokens)
    groups = {share: bench.policies(share, arguments.first) for share in SHARES}
    everything = [policy for each in groups.values() for some in each.values() for policy in some]
    lost: list[list[float]] = []
    for each in bench.live(everything):
        lost.append(each)
        columns, at = np.array(lost).T, 0
        if len(lost) < len(bench.samples):
            say(len(lost), "of", len(bench.samples), "samples")
            continue
        found: dict[str, Any] = {"model": Path(arguments.model).stem, "prompt": bench.prompt}
        for share, some in groups.items():
            count = sum(len(policies) for policies in some.values())
            found[f"{share:.0%}"] = bench.rows(some, columns[at : at + count])
            at += count
        write_json(arguments.out, found)
        for share in SHARES:
            for row in found[f"{share:.0%}"]:
                say(f"{share:.0%}", row["group"], row["policy"], row["live"], row["times"])


if __name__ == "__main__":
    main()
