"""Every reader through the paged cache, token by token, beside what a live run says of it.

    python benchmarks/readers_paged.py --out benchmarks/results/readers-paged-h200.json
    python benchmarks/readers_paged.py --device cpu --tiny --out FILE     # that it runs

SmolLM2 on a held-out needle sample, a quarter of its tokens read at a step. ``live`` is the mean KL
from the full cache over some observed tokens as validation runs them, all at once; ``paged`` the
same through ``load_cache``, one token after another; ``step_ms`` what such a token takes, and
``full_step_ms`` one under the uncompressed cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from recorded_parts import attempt, say

from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import Method
from kvtune.policies.methods.actqkv import ActQKV
from kvtune.policies.methods.infllm import InfLLM
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.recycled import Recycled
from kvtune.policies.methods.retrieval_attention import RetrievalAttention
from kvtune.policies.methods.sentencekv import SentenceKV
from kvtune.policies.methods.shadowkv import ShadowKV
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build

LISTS = RetrievalAttention(sinks=4, recent=32, joins="lists", scanned=0.2)
METHODS: tuple[Method, ...] = (
    Quest(block=64),
    Quest(block=16),
    Landmark(block=16),
    TokenSelect(sinks=4, recent=16),
    InfLLM(block=16, sinks=4, recent=32),
    ActQKV(block=16, sinks=4, recent=32),
    ShadowKV(),
    Recycled(stride=8),
    SentenceKV(),
    LISTS,
)


def options() -> Sequence[Option]:
    """Of every reader; an index on the host, and one reader in four bits."""
    each = [Option(method, Budget(share=0.25)) for method in METHODS]
    four = replace(each[1], keys=Int4(), values=Int4())
    return [*each, replace(each[-1], tier="host"), four]


class Bench:
    """The model, a sample and its full cache."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.loaded: LoadedModel = load_model("smollm2-135m", device=device, dtype="float32")
        plan = Workload(
            {"evaluate": {"retrieval": 1}},
            tokens=320 if tiny else 1024,
            observed=64 if tiny else 128,
        )
        self.sample: Sample = build(plan, self.loaded.tokenizer)[0]
        self.steps = 4 if tiny else 32
        geometry = self.loaded.geometry
        self.shape = geometry.layers, geometry.kv_heads
        whole = Policy.uniform(Option(), *self.shape)
        prompt = fresh_prompt(self.loaded, self.sample, whole.needs)
        self.full = full_cache(self.loaded, self.sample, prompt)[: self.steps]
        self.through(whole)  # the first call of all pays for what is loaded then
        self.full_step = self.through(whole)[1]

    def measured(self, option: Option) -> dict[str, Any]:
        policy = Policy.uniform(option, *self.shape, name=option.label)
        prompt = fresh_prompt(self.loaded, self.sample, policy.needs)
        live = run_live(self.loaded, self.sample, prompt, [policy])[0].kl[: self.steps]
        found, step = self.through(policy)
        paged = (self.full.exp() * (self.full - found)).sum(-1)
        answer = {
            "live": float(live.mean()),
            "paged": float(paged.mean()),
            "largest_difference": float((paged.cpu() - torch.from_numpy(live)).abs().max()),
            "step_ms": 1e3 * step,
            "full_step_ms": 1e3 * self.full_step,
        }
        say(option.label, answer)
        return answer

    @torch.no_grad()
    def through(self, policy: Policy) -> tuple[torch.Tensor, float]:
        """Log-probabilities ``[steps, vocabulary]`` of the observed tokens, and seconds a step."""
        model, ids = self.loaded.model, torch.tensor([self.sample.token_ids])
        ids, rows = ids.to(self.loaded.device), []
        first = self.sample.prompt
        tokenizer = self.loaded.tokenizer
        with load_cache(policy, model, new_tokens=self.steps, tokenizer=tokenizer) as cache:
            model(input_ids=ids[:, :first], past_key_values=cache, use_cache=True)
            self._wait()
            begun = time.monotonic()
            for at in range(first, first + self.steps):
                given = {"input_ids": ids[:, at : at + 1], "past_key_values": cache}
                rows.append(model(**given, use_cache=True).logits[0, -1])
            self._wait()
            taken = time.monotonic() - begun
        return torch.stack(rows).float().log_softmax(-1), taken / self.steps

    def _wait(self) -> None:
        if self.loaded.device.startswith("cuda"):
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=90, help="begin no reader after so many")
    parser.add_argument("--only", default="", help="options whose name holds one of these: a,b")
    given = parser.parse_args()
    begun = time.monotonic()
    bench = Bench(given.device, given.tiny)
    found: dict[str, Any] = {"torch": torch.__version__, "device": bench.loaded.device}

    def record(name: str, part: Any) -> None:
        found[name] = part
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    wanted = given.only.split(",")
    for option in (each for each in options() if any(name in each.label for name in wanted)):
        if time.monotonic() - begun > given.seconds:
            say("out of time before", option.label)
            continue
        attempt(record, option.label, lambda each=option: bench.measured(each))


if __name__ == "__main__":
    main()
