"""A policy that evicts in few bits: pages beside the slots of live generation, on the same tokens.

    python benchmarks/long_pages.py --device cuda --seconds 90 \
        --out benchmarks/results/long-pages-h200.json
    python benchmarks/long_pages.py --device cpu --tiny --out /tmp/long-pages.json

The full cache generates; both read its tokens. Of each policy: KL from the full cache, the bytes
that slots count and that the pool of pages takes, whether a pool one byte smaller is refused before
the prompt, and seconds a step. The policies are the uniform option that ``long_plans.py`` finds at
a tenth of the mean bytes, in four and in three bits and without a residual window, and in 16 bits
with as many entries.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from kvtune.common.errors import KvtuneError
from kvtune.common.files import write_json
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.rotated import RotatedInt3, RotatedInt4
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.generate import Generation
from kvtune.runtime.live_policies import LivePolicy
from kvtune.traces.models import load_model
from kvtune.traces.workloads import Workload, build

CASES: tuple[tuple[str, Format, int], ...] = (
    ("rotated_int4, window 16", RotatedInt4(), 16),
    ("rotated_int3, window 16", RotatedInt3(), 16),
    ("int4 by token, no window", Int4(keys_by="token"), 0),
    ("bf16", Bf16(), 0),
)


def by_slots(loaded: Any, prompt: list[int], live: LivePolicy, tokens: int) -> dict[str, Any]:
    """Generate from the full cache beside the policy; its tokens are in ``tokens``."""
    generation = Generation(loaded, prompt, [live], room=tokens, temperature=1.0)
    generation.advance(1)
    started = now(loaded.device)
    generation.advance(tokens - 1)
    seconds = now(loaded.device) - started
    note(f"{live.name}: slots have generated {tokens} tokens in {seconds:.1f} s")
    run = generation.results()[0]
    return {
        "kl": float(run.kl.mean()), "kl_by_step": run.kl, "peak_bytes": run.peak_bytes,
        "seconds_a_step": seconds / (tokens - 1), "evicted": int(run.evicted.sum()),
        "tokens": generation.tokens_of(0),
    }  # fmt: skip


@torch.no_grad()
def full_logits(loaded: Any, prompt: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Of the uncompressed cache at every generated token but the last, ``[T, vocabulary]``."""
    ids = torch.cat([torch.tensor(prompt[:-1], device=tokens.device), tokens[:-1]])
    logits: torch.Tensor = loaded.model(ids[None], logits_to_keep=len(tokens) - 1).logits[0]
    return logits.log_softmax(-1)


@torch.no_grad()
def by_pages(
    loaded: Any,
    prompt: list[int],
    live: LivePolicy,
    full: torch.Tensor,
    tokens: torch.Tensor,
    stop: float,
) -> dict[str, Any]:
    """Read the same tokens from pages, as far as there is time."""
    read = {"new_tokens": len(full), "evicts": True, "residual": live.residual}
    model, ids = loaded.model, torch.tensor([prompt[:-1]], device=tokens.device)
    losses, most = [], 0
    with load_cache(live.policy, model, **read) as cache:
        model(ids, past_key_values=cache)
        pool, started = cache.pool.memory.numel(), now(loaded.device)
        note(f"{live.name}: the prompt is in pages")
        for at, wanted in enumerate(full):
            logits = model(tokens[at].view(1, 1), past_key_values=cache).logits[0, -1]
            if at == 1:  # what had to be compiled has been
                note(f"{live.name}: two tokens in {now(loaded.device) - started:.1f} s")
                started = now(loaded.device)
            ours = logits.float().log_softmax(-1)
            losses.append((wanted.exp() * (wanted - ours)).sum())
            most = max(most, cache.page_bytes())
            if at > 2 and time.monotonic() > stop:
                break
        seconds = now(loaded.device) - started
        grew, evicted = cache.pool.memory.numel() - pool, sum(map(sum, cache.evicted()))
    refused = False
    with load_cache(live.policy, model, **read, limit_bytes=pool - 1) as tight:
        try:
            model(ids, past_key_values=tight)
        except KvtuneError:
            refused = True
    kl = torch.stack(losses)
    return {
        "kl": float(kl.mean()), "kl_by_step": kl.cpu().numpy(), "pool_bytes": pool,
        "pool_grew_bytes": grew, "most_page_bytes": most, "a_byte_less_is_refused": refused,
        "seconds_a_step": seconds / (len(losses) - 2), "evicted": evicted, "tokens": len(losses),
    }  # fmt: skip


def compared(
    loaded: Any, prompt: list[int], case: tuple[str, Format, int], arguments: Any, stop: float
) -> dict[str, Any]:
    """Both of one policy, and how far their losses lie apart."""
    name, form, residual = case
    geometry = loaded.geometry
    option = Option(Tova(unit="kv_head"), Budget(tokens=arguments.budget), form, form)
    policy = Policy.uniform(option, geometry.layers, geometry.kv_heads, name=name)
    live = LivePolicy(policy, residual=residual)
    slots = by_slots(loaded, prompt, live, arguments.tokens)
    tokens = slots.pop("tokens")
    pages = by_pages(loaded, prompt, live, full_logits(loaded, prompt, tokens), tokens, stop)
    theirs, ours = slots.pop("kl_by_step"), pages.pop("kl_by_step")
    slots["kl_of_as_many"] = float(theirs[: len(ours)].mean())
    apart = float(abs(ours - theirs[: len(ours)]).max())
    return {"slots": slots, "pages": pages, "largest_kl_difference_of_a_step": apart}


def note(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def now(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    if "cuda" in device:
        torch.cuda.synchronize()
    return time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--budget", type=int, default=1009)
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many")
    parser.add_argument("--tiny", action="store_true", help="few tokens, for a CPU")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/long-pages-h200.json"))
    arguments = parser.parse_args()
    if arguments.tiny:
        vars(arguments).update({"prompt_tokens": 80, "tokens": 12, "budget": 70})
    stop = time.monotonic() + arguments.seconds
    out: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k != "out"}
    out |= {"cases": {}, "faults": []}
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    workload = Workload({"evaluate": {"prose": 1}}, tokens=arguments.prompt_tokens, observed=1)
    prompt = [int(x) for x in build(workload, loaded.tokenizer)[0].token_ids]
    for case in CASES[: arguments.cases]:
        if time.monotonic() > stop:
            break
        try:
            out["cases"][case[0]] = compared(loaded, prompt, case, arguments, stop)
        except Exception:
            out["faults"].append(f"{case[0]}: {traceback.format_exc()}")
        note(f"{case[0]}: {json.dumps(out['cases'].get(case[0]))}")
        write_json(arguments.out, out)


if __name__ == "__main__":
    main()
