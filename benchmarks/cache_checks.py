"""The paged cache through the kernels beside plain torch, token by token; checks only, no times.

    python benchmarks/cache_checks.py --out cache-checks.json [--tokens 150]
    python benchmarks/cache_checks.py --control --out cache-checks-control.json

On a GPU the kernels themselves, else Triton's interpreter (``TRITON_INTERPRET=1``), where fp8 is
rounded wrongly. Small random models answer a forced text from both caches: all methods that evict
while decoding, old tokens taking their head's format, sliding windows. At each step both also
answer from the very same pages. On a GPU the captured loop is then set beside ``model.generate``.

Two caches that round differently come to hold different entries where scores nearly tie, and then
answer differently. ``--control`` says how far that goes: plain torch beside plain torch whose
outputs are each moved by up to half a unit of bf16's last place. It needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.testing.decode import decode_methods
from kvtune.runtime import load_cache
from kvtune.runtime.cache import policy_cache as caches
from kvtune.runtime.cache.backend import AttentionSeen
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.graph import generate
from kvtune.runtime.kernels.launch import Paged, Scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, KV_HEADS = 2, 4
FIELDS = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": KV_HEADS, "head_dim": 64,
    "max_position_embeddings": 4096, "initializer_range": 0.1,
    "pad_token_id": None, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A policy on a model; ``options`` are ``load_cache``'s."""

    family: str
    policy: Policy
    options: dict[str, Any]


def cases() -> dict[str, Case]:
    """By name, the captured ones last."""
    found = {}
    for kind in decode_methods().values():
        bounded = Policy.uniform(Option(kind(), Budget(tokens=100)), LAYERS, KV_HEADS)
        found[f"evicts: {kind.name}"] = Case("llama", bounded, {"evicts": True})
    few = Policy.uniform(Option(SnapKV(), Budget(tokens=50)), LAYERS, KV_HEADS)
    found["slides, fifty tokens kept"] = Case("gemma", few, {})
    full = Policy.uniform(Option(), LAYERS, KV_HEADS)
    found["slides"] = Case("gemma", full, {})
    found["settles"] = Case("llama", mixed(), {"residual": 16})
    return found


def mixed() -> Policy:
    """Every format beside 16 bits."""
    four = Option(Full(), ALL, Int4(exact_first=4), Int4(exact_first=4))
    two, eight = Option(Full(), ALL, Int4(), Int2()), Option(Full(), ALL, Fp8(), Fp8())
    some = Option(SnapKV(), Budget(tokens=64))
    return Policy("mixed", ((four, two, eight, Option()), (two, two, some, four)))


def models() -> dict[str, Any]:
    """Small, random, in bf16."""
    kinds = ["sliding_attention", "full_attention"]
    configs = {
        "llama": LlamaConfig(**FIELDS),
        "gemma": Gemma3TextConfig(**FIELDS, sliding_window=128, layer_types=kinds),
    }
    found = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        found[name] = model.to(DEVICE).eval()
    return found


@dataclass(frozen=True)
class Prompts:
    """Two of different lengths, and what follows them: ``[2, P]``, ``[2, P]``, ``[2, n]``."""

    ids: Tensor
    mask: Tensor
    text: Tensor

    @staticmethod
    def drawn(prompt: int, tokens: int) -> Prompts:
        """Two prompts of random tokens, of which the second is padded on the left."""
        seeded = torch.Generator().manual_seed(1)
        ids = torch.randint(2, 500, (2, prompt + tokens), generator=seeded).to(DEVICE)
        mask = torch.ones_like(ids[:, :prompt])
        mask[1, : prompt // 8] = 0
        return Prompts(ids[:, :prompt] * mask, mask, ids[:, prompt:])


class Beside(TritonBackend):
    """The kernels, each answer of which is compared with plain torch's from the same pages."""

    def __init__(self) -> None:
        self.apart = {"output": 0.0, "logits": 0.0, "lse": 0.0}

    def attend(
        self,
        q: Tensor,
        layer: Paged,
        scratch: Scratch,
        scale: float,
        seen: AttentionSeen | None = None,
    ) -> Tensor:
        """The kernels' answer."""
        ours, theirs = super().attend(q, layer, scratch, scale, seen), None
        if seen is not None:
            logits = None if seen.logits is None else torch.full_like(seen.logits, torch.nan)
            theirs = AttentionSeen(torch.empty_like(seen.lse), logits)
        plain = PlainBackend().attend(q, layer, scratch, scale, theirs).float()
        self._note("output", (ours.float() - plain).norm() / plain.norm())
        if seen is not None and theirs is not None:
            if seen.logits is not None and theirs.logits is not None:
                apart = (seen.logits - theirs.logits).nan_to_num(0)
                self._note("logits", apart.abs().max())
            self._note("lse", (seen.lse - theirs.lse).abs().max())
        return ours

    def _note(self, name: str, apart: Tensor) -> None:
        self.apart[name] = max(self.apart[name], float(apart))


class RoundedOtherwise(PlainBackend):
    """Plain torch, each output moved by up to half a unit of its last place before it is cast."""

    def attend(
        self,
        q: Tensor,
        layer: Paged,
        scratch: Scratch,
        scale: float,
        seen: AttentionSeen | None = None,
    ) -> Tensor:
        """Attention by plain torch, with an error of the size that half precision has."""
        exact = super().attend(q.float(), layer, scratch, scale, seen)
        return (exact * (1 + 2**-9 * (2 * torch.rand_like(exact) - 1))).to(q.dtype)


@torch.no_grad()
def answered(model: Any, case: Case, prompts: Prompts, backend: Callable[[], Any]) -> Any:
    """Logits ``[n + 1, 2, V]`` of the forced text, and what evicting heads hold at its end."""
    chosen, caches.backend_for = caches.backend_for, lambda _: backend()
    try:
        cache = load_cache(case.policy, model, new_tokens=prompts.text.shape[1], **case.options)
        places = (prompts.mask.cumsum(1) - 1).clamp_min(0)
        given = {"attention_mask": prompts.mask, "position_ids": places, "logits_to_keep": 1}
        logits = [model(prompts.ids, past_key_values=cache, **given).logits[:, -1]]
        for n, token in enumerate(prompts.text.unbind(1)):
            at = places[:, -1:] + 1 + n
            said = model(token[:, None], position_ids=at, past_key_values=cache)
            logits.append(said.logits[:, -1])
    finally:
        caches.backend_for = chosen
    cache.pool.check_integrity()
    held = [kept for layer in cache.layers for each in layer.evictors for kept in _held(each)]
    return torch.stack(logits).float(), held


def _held(evictor: Any) -> list[frozenset[int]]:
    return [frozenset(kept) for _, kept in sorted(evictor.kept().items())]


def compared(
    model: Any, case: Case, prompts: Prompts, backend: Callable[[], Any]
) -> dict[str, float]:
    """Largest difference of logits over their spread; entries that both caches hold."""
    plain, theirs = answered(model, case, prompts, PlainBackend)
    ours, mine = answered(model, case, prompts, backend)
    apart = (ours - plain).abs().amax(-1) / plain.std()
    found = {"first 20 steps": float(apart[:20].max()), "all steps": float(apart.max())}
    if theirs:
        shared = sum(len(a & b) for a, b in zip(theirs, mine, strict=True))
        found["entries alike"] = shared / sum(map(len, theirs))
    return found


def compared_closely(model: Any, case: Case, prompts: Prompts) -> dict[str, Any]:
    """The same, and how far kernels and plain torch are apart on the same pages."""
    beside = Beside()
    found: dict[str, Any] = compared(model, case, prompts, lambda: beside)
    return found | {"on the same pages": beside.apart}


def alike(model: Any, case: Case, prompts: Prompts) -> dict[str, list[Any]]:
    """First tokens that the captured loop and ``model.generate`` say alike, of each sequence.

    ``gap there``: of the two likeliest logits where they part, over the logits' spread; None where
    they do not.
    """
    count = 2 * prompts.text.shape[1]
    room = {**case.options, "new_tokens": count}
    loop = load_cache(case.policy, model, **room)
    ours = generate(model, loop, prompts.ids, prompts.mask, new_tokens=count)
    said = model.generate(
        prompts.ids, attention_mask=prompts.mask, max_new_tokens=count, do_sample=False,
        past_key_values=load_cache(case.policy, model, **room),
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    theirs = said.sequences[:, prompts.ids.shape[1] :]
    until = (ours == theirs).int().cumprod(1).sum(1).tolist()
    scores = torch.stack(said.scores, 1).float()
    first, second = scores.topk(2, -1).values.unbind(-1)
    gaps = (first - second) / scores.std(-1)
    parted = [None if n == count else float(gaps[row, n]) for row, n in enumerate(until)]
    return {"alike until": until, "of": [count], "gap there": parted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--control", action="store_true", help="plain torch beside itself")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    prompts, all_models = Prompts.drawn(arguments.prompt, arguments.tokens), models()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    for name, case in cases().items():
        model = all_models[case.family]
        if arguments.control:
            found[name] = compared(model, case, prompts, RoundedOtherwise)
        else:
            found[name] = compared_closely(model, case, prompts)
        if DEVICE == "cuda" and not (arguments.control or case.options.get("evicts")):
            found[name] |= alike(model, case, prompts)
        print(name, json.dumps(found[name]), flush=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
