"""Shares with a floor: of shorter prompts a head keeps as many tokens as where it was found."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.policies.export import exported_cache
from kvtune.policies.export.exporters.transformers import Transformers
from kvtune.policies.format import Format, formats
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fitted import Fitted
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import methods
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.paging import Growth, held_bytes
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    ModelFacts,
    PolicyDocument,
    read_policy,
    write_policy,
)
from kvtune.tuner.left_out import LEFT_OUT

FOUND = 896  # prompt tokens where the shares were chosen
SHARES = (1 / 64, 0.03, 1 / 8, 0.3, 1.0)


def lengths(count: int = 60) -> list[int]:
    drawn = random.Random(5)  # noqa: S311 - test data
    return sorted(
        {1, 2, FOUND - 1, FOUND, FOUND + 1, *(drawn.randint(1, 9000) for _ in range(count))}
    )


@pytest.mark.parametrize("share", SHARES)
def test_a_floor_keeps_of_shorter_prompts_as_many_tokens_as_there_are(share: float) -> None:
    alone, floored = Budget(share=share), Budget(share=share).with_floor(FOUND)
    there = alone.resolve(FOUND)
    for tokens in lengths():
        kept = floored.resolve(tokens)
        if tokens >= FOUND:
            assert kept == alone.resolve(tokens)
        else:
            assert kept == min(tokens, there)


@pytest.mark.parametrize("share", SHARES)
def test_longer_prompts_never_keep_fewer_tokens(share: float) -> None:
    kept = [Budget(share=share).with_floor(FOUND).resolve(tokens) for tokens in lengths()]
    assert kept == sorted(kept)


def test_budgets_in_tokens_and_whole_prompts_need_no_floor() -> None:
    assert Budget(tokens=64).with_floor(FOUND) == Budget(tokens=64)
    assert ALL.with_floor(FOUND) == ALL
    assert Budget(share=0.25).with_floor(FOUND) != Budget(share=0.25)


@pytest.mark.parametrize("name", sorted(set(methods()) - set(LEFT_OUT)))
def test_no_shorter_prompt_takes_more_bytes_than_where_the_share_was_found(name: str) -> None:
    option = Option(methods()[name](), Budget(share=0.125)).with_floor(FOUND)
    most = option.ledger(option.budget.resolve(FOUND), FOUND, 64).resident_bytes
    for tokens in lengths(20):
        if tokens < FOUND:
            held = option.ledger(option.budget.resolve(tokens), tokens, 64).resident_bytes
            assert held <= most, (name, tokens)


@pytest.mark.parametrize(
    "growth", [Growth(128), Growth(128, evicts=True), Growth(128, residual=64)]
)
@pytest.mark.parametrize("kind", [Bf16(), Int4(), Int4(exact_first=4), Fitted()])
@pytest.mark.parametrize("share", [1 / 64, 0.125, 0.3])
def test_no_shorter_prompt_takes_more_pages_than_where_the_share_was_found(
    share: float, kind: Format, growth: Growth
) -> None:
    floored = 0
    for name in sorted(set(methods()) - set(LEFT_OUT)):
        option = Option(methods()[name](), Budget(share=share), kind, kind).with_floor(FOUND)
        policy = Policy.uniform(option, 2, 3)
        most = held_bytes(policy, FOUND, 64, growth)
        floored += option.budget.floor > 0
        if option.budget.floor:
            for tokens in (1, 50, 111, 112, 113, 260, 268, 269, 448, FOUND - 1):
                assert held_bytes(policy, tokens, 64, growth) <= most, (name, tokens)
    assert floored > 15


@pytest.mark.parametrize("name", ["attention_matching", "cca"])
def test_methods_that_store_whole_prompts_otherwise_get_no_floor(name: str) -> None:
    """Of 112 tokens, all kept, they need more pages than of 896 tokens of which 112 are kept."""
    option = Option(methods()[name](), Budget(share=0.125), Int4(), Int4())
    assert option.with_floor(FOUND) == option
    floored = replace(option, budget=option.budget.with_floor(FOUND))
    whole, part = (
        held_bytes(Policy.uniform(floored, 2, 3), tokens, 64, Growth(128))
        for tokens in (112, FOUND)
    )
    assert whole > part
    assert held_bytes(Policy.uniform(option, 2, 3), 112, 64, Growth(128)) <= part


def test_a_floor_that_is_there_is_not_lowered() -> None:
    floored = Budget(share=0.125).with_floor(FOUND)
    assert floored.with_floor(448) == floored
    assert floored.with_floor(2 * FOUND) == Budget(share=0.125).with_floor(2 * FOUND)


def test_a_policys_bytes_are_those_of_each_heads_own_tokens() -> None:
    """Against a straight sum over heads with budgets that are written out in tokens."""
    drawn = random.Random(3)  # noqa: S311 - test data
    kinds = [form() for name, form in sorted(formats().items()) if name in ("bf16", "int4", "int8")]
    for tokens in lengths(12):
        heads = tuple(
            tuple(
                Option(SnapKV(), Budget(share=drawn.choice(SHARES)).with_floor(FOUND), form, form)
                for form in drawn.choices(kinds, k=2)
            )
            for _ in range(3)
        )
        policy = Policy("floors", heads)
        total = 4 * 6  # a length a head
        for option in policy.options():
            share = Budget(share=option.budget.share)
            kept = max(share.resolve(tokens), min(share.resolve(FOUND), tokens))
            written_out = replace(option, budget=Budget(tokens=kept))
            total += written_out.footprint(kept, tokens, 64)
        assert policy.footprint(tokens, 64) == total


def document(budget: Budget) -> PolicyDocument:
    options = (Option(SnapKV(), budget), Option(StreamingLLM(), Budget(share=0.5)))
    return PolicyDocument(Policy("p", (options,) * 2), ModelFacts("tiny", 2, 2, 64))


def test_a_policy_file_keeps_the_floor() -> None:
    written = document(Budget(share=0.125).with_floor(FOUND))
    text = write_policy(written)
    assert "budget: 12.5% but at least 112 tokens" in text
    assert "\nkvtune_policy: 2\n" in text  # an older kvtune is to say that it must be updated
    assert read_policy(text) == written
    assert read_policy(text).policy != document(Budget(share=0.125)).policy


def test_a_policy_file_without_floors_can_be_read_by_every_kvtune() -> None:
    written = document(Budget(share=0.125))
    text = write_policy(written)
    assert "\nkvtune_policy: 1\n" in text
    assert read_policy(text) == written


def test_a_floor_in_a_file_of_the_first_version_is_read() -> None:
    """Searches wrote them so before the second version was."""
    floored = document(Budget(share=0.125).with_floor(FOUND))
    text = write_policy(floored).replace("kvtune_policy: 2", "kvtune_policy: 1")
    assert read_policy(text) == floored


@pytest.mark.parametrize(
    "budget",
    ["12.5% but at least tokens", "12.5% at least 12 tokens", "12.5% but at least 0 tokens"],
)
def test_a_floor_that_is_written_otherwise_is_told_how(budget: str) -> None:
    with pytest.raises(KvtuneError) as error:
        read_policy(f"kvtune_policy: 1\npolicy: {{method: snapkv, budget: {budget}}}\n")
    assert "12.5% but at least 224 tokens" in str(error.value) + str(error.value.hint)


def test_the_exported_cache_keeps_as_many_tokens() -> None:
    budget = Budget(share=0.125).with_floor(FOUND)
    made = Transformers().export(document(budget), context_tokens=2 * FOUND)
    options = json.loads(made.files["kv_cache.json"])["options"].values()
    plain = {option["method"]["name"]: option["budget"] for option in options}
    assert plain == {"snapkv": [0.125, 112], "streaming_llm": 0.5}
    for tokens in lengths():
        assert exported_cache.resolve(plain["snapkv"], tokens) == budget.resolve(tokens)
