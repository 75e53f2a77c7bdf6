"""The tokens that our methods keep of SmolLM2's prompts are those that kvpress keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.kept import ask
from kvtune.policies.method import Method
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.keydiff import KeyDiff, KeyDiffBlockwise
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import ALL_QUERIES, Needs
from kvtune.tests.tiers import first

pytestmark = pytest.mark.real_model

GOLDEN = json.loads((Path(__file__).parent / "golden" / "kvpress.json").read_text())
KVPRESS_SNAPKV = SnapKV(window=8, kernel=5, pooling="mean")

SETTINGS: dict[str, tuple[Method, Allocator, float]] = {
    "snapkv-64-5": (SnapKV(window=64, kernel=5, pooling="mean"), AsGiven(), 0.5),
    "snapkv-8-5": (KVPRESS_SNAPKV, AsGiven(), 0.25),
    "pyramid-too-small": (KVPRESS_SNAPKV, Pyramid(beta=20, window=8, floor="required"), 0.25),
    "tova": (Tova(), AsGiven(), 0.25),
    "expected_attention": (ExpectedAttention(), AsGiven(), 0.25),
    "expected_attention-mean": (
        ExpectedAttention(ahead=64, covariance=False, value_norm=False), AsGiven(), 0.25
    ),
    "keydiff": (KeyDiff(), AsGiven(), 0.25),
    "keydiff_blockwise": (KeyDiffBlockwise(block=32), AsGiven(), 0.25),
    "streaming_llm": (StreamingLLM(), AsGiven(), 0.25),
    "adakv": (KVPRESS_SNAPKV, AdaKV(rule="floor"), 0.25),
    "kvzip": (KVzip(), ModelWide(), 0.25),
    "kvzip-layers": (KVzip(), AdaKV(safeguard=0.0), 0.25),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    from kvtune.traces.models import load_model

    return load_model("smollm2-135m", dtype="float32")


def sample_of(number: int) -> Any:
    from kvtune.traces.samples import Sample

    token_ids = (*GOLDEN["prompts"][number], 2)
    return Sample(f"prompt-{number}", "evaluate", "prose", token_ids, 2, 1, (-1,))


Prompts = Callable[[int], Any]


@pytest.fixture(scope="module")
def prompts(model: Any) -> Prompts:
    """Prompts by their number, each run through the model when it is first asked for."""
    from kvtune.runtime.prompts import fresh_prompt

    needs = Needs(window=ALL_QUERIES, column_sums=True, query_moments=True, reconstruction=True)
    return cache(lambda number: fresh_prompt(model, sample_of(number), needs))


def kept_by(policy: Policy, prompt: Any, every: int = 1) -> list[list[set[int]]]:
    """Tokens that each head keeps, of every so many layers."""
    budgets = policy.settle(prompt(0).prompt_tokens, prompt).tolist()
    found = []
    for layer in range(0, len(budgets), every):
        signals = prompt(layer)
        final = policy.split(layer, budgets[layer], signals)
        kept = ask([policy.heads[layer]], [final], signals)
        found.append([set(row.tolist()) for row in kept.tokens])
    return found


def tokens_of(number: int) -> int:
    return len(GOLDEN["prompts"][number])


def theirs(name: str, number: int) -> list[list[set[int] | None]]:
    rows = GOLDEN["kept"][name][number]
    return [[None if text is None else tokens_in(text) for text in row] for row in rows]


def tokens_in(text: str) -> set[int]:
    number = int(text, 16)
    return {at for at in range(number.bit_length()) if number >> at & 1}


def uniform(method: Method, allocator: Allocator, share: float) -> Policy:
    return Policy.uniform(Option(method, Budget(share=share)), 30, 3, allocator=allocator)


def differences(ours: list[list[set[int]]], golden: list[list[set[int] | None]]) -> list[str]:
    return [
        f"layer {layer} head {head}: {sorted(mine - other)} instead of {sorted(other - mine)}"
        for layer, (row, wanted) in enumerate(zip(ours, golden, strict=True))
        for head, (mine, other) in enumerate(zip(row, wanted, strict=True))
        if other is not None and mine != other
    ]


@pytest.mark.parametrize("asked", first([(0, 4), (0, 1), (1, 1)]))
@pytest.mark.parametrize("name", SETTINGS)
def test_kept_tokens_are_those_of_kvpress(
    prompts: Prompts, name: str, asked: tuple[int, int]
) -> None:
    """Of a prompt by its number, in every so many layers."""
    number, every = asked
    golden = theirs(name, number)
    compared = sum(tokens is not None for row in golden for tokens in row)
    assert compared > 60, "too many ties were left out"
    kept = kept_by(uniform(*SETTINGS[name]), prompts(number), every)
    assert differences(kept, golden[::every]) == []


@pytest.mark.parametrize("number", first(range(len(GOLDEN["prompts"]))))
def test_pyramid_budgets_differ_from_kvpress_by_rounding_alone(
    prompts: Prompts, number: int
) -> None:
    """kvpress rounds every layer for itself; ours hand out exactly the total."""
    golden = theirs("pyramid", number)
    method = KVPRESS_SNAPKV
    budgets = uniform(method, Pyramid(beta=4, window=8, floor="required"), 0.25).budgets(
        tokens_of(number)
    )
    assert budgets.sum() == 30 * 3 * (tokens_of(number) // 4)
    for layer, row in enumerate(golden):
        for head, tokens in enumerate(row):
            if tokens is not None:
                assert abs(len(tokens) - budgets[layer, head]) <= 1
                kept = method.keep(prompts(number)(layer), len(tokens))[head]
                assert set(kept.tolist()) == tokens


@pytest.mark.parametrize("number", first(range(len(GOLDEN["prompts"]))))
def test_kvzip_in_chunks_is_kvpress_in_chunks(model: Any, prompts: Prompts, number: int) -> None:
    from dataclasses import replace

    from kvtune.traces.passes import prompt_cache
    from kvtune.traces.reconstruction import reconstruction

    ids = GOLDEN["prompts"][number]
    scores = reconstruction(model, ids, prompt_cache(model, ids), chunk=64)

    def chunked(layer: int) -> Any:
        return replace(prompts(number)(layer), reconstruction=scores[layer], _memo={})

    ours = kept_by(uniform(KVzip(), ModelWide(), 0.25), chunked)
    assert differences(ours, theirs("kvzip-chunks", number)) == []
