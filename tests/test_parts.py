"""The six systems of six kinds against straight-line float64 versions of their papers' formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.apply import apply, linked
from kvtune.policies.attention import attend, merge
from kvtune.policies.decode import DecodeMethod, DecodeState
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int2, Int4, Int8
from kvtune.policies.formats.packing import pack, unpack
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.knorm import KNorm
from kvtune.policies.methods.mikv import MiKV
from kvtune.policies.methods.minicache import MiniCache
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import read_policy
from kvtune.policies.signals import Signals
from kvtune.policies.slot_prompt import prompt_of
from kvtune.policies.slots import SlotCache
from kvtune.policies.testing import Case, make_signals, uniform

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, GROUP, TOKENS, SIZE = 2, 3, 75, 16
CASE = Case(TOKENS, 0, kv_heads=HEADS, group=GROUP, seed=4)


@pytest.fixture
def signals() -> Signals:
    return make_signals(CASE)


def answered(policy: Policy, signals: Signals, queries: Tensor) -> Tensor:
    """Output of queries ``[H, G, C, D]`` over one layer's compressed prompt."""
    budgets = policy.budgets(signals.prompt_tokens)[signals.layer].tolist()
    part = apply(policy, signals.layer, budgets, signals)
    keys, values = part.keys[:, None], part.values[:, None]
    return attend(queries, keys, values, part.visible(queries), signals.scale, part.weights)[0]


def one_layer(option: Option, layer: int, layers: int = 6) -> Policy:
    return Policy.uniform(option, layers, HEADS)


def slow_attention(
    query: Any, keys: Any, values: Any, scale: float, log_weight: Any = None
) -> np.ndarray[Any, Any]:
    logits = np.array([scale * float(np.dot(query, key)) for key in keys])
    logits = logits + (0 if log_weight is None else log_weight)
    weights = np.exp(logits - logits.max())
    return np.asarray((weights / weights.sum()) @ values)


def doubles(tensor: Tensor) -> Any:
    return tensor.double().numpy()


# RazorAttention: one entry stands for all that was dropped


@pytest.mark.parametrize("budget", [2, 9, 74])
def test_razor_answers_as_its_algorithm_does(signals: Signals, budget: int) -> None:
    queries = uniform(50, HEADS, GROUP, 5, SIZE)
    policy = one_layer(Option(Razor(sinks=3), Budget(tokens=budget)), signals.layer)
    ours = answered(policy, signals, queries)
    kept_ends = budget - 1
    sinks = min(3, kept_ends)
    kept = [*range(sinks), *range(TOKENS - (kept_ends - sinks), TOKENS)]
    dropped = [token for token in range(TOKENS) if token not in kept]
    for head in range(HEADS):
        keys, values = doubles(signals.keys[head]), doubles(signals.values[head])
        more_keys = np.vstack([keys[kept], keys[dropped].mean(0)])
        more_values = np.vstack([values[kept], values[dropped].mean(0)])
        weights = np.array([0.0] * len(kept) + [math.log(len(dropped))])
        for group in range(GROUP):
            for at in range(5):
                query = doubles(queries[head, group, at])
                theirs = slow_attention(query, more_keys, more_values, signals.scale, weights)
                assert np.abs(doubles(ours[head, group, at]) - theirs).max() < 1e-5


def test_the_compensation_token_is_exact_where_dropped_tokens_are_alike(signals: Signals) -> None:
    """Its identity: n equal tokens draw n times one's attention."""
    signals.keys[:, 2:60], signals.values[:, 2:60] = signals.keys[:, 2:3], signals.values[:, 2:3]
    queries = uniform(51, HEADS, GROUP, 4, SIZE)
    budget = Budget(tokens=2 + 15 + 1)
    ours = answered(one_layer(Option(Razor(sinks=2), budget), 0), signals, queries)
    whole = answered(one_layer(Option(Full(), ALL), 0), signals, queries)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


# Quest: everything is held, some is read


def test_the_bound_of_a_block_is_never_below_a_logit_in_it(signals: Signals) -> None:
    reader = Quest(block=8).reader(24)
    counts = torch.full((HEADS,), TOKENS)
    queries = uniform(52, HEADS, GROUP, 6, SIZE)
    bound = reader.score(reader.index(signals.keys, counts), queries)
    logits = queries @ signals.keys[:, None].transpose(-1, -2)  # [H, G, C, P]
    for block in range(bound.shape[-1]):
        highest = logits[..., 8 * block : 8 * block + 8].amax((1, -1))
        assert (bound[..., block] >= highest - 1e-4).all()


def test_quest_reads_the_blocks_of_highest_bound_and_the_last(signals: Signals) -> None:
    option = Option(Quest(block=8), Budget(tokens=24))
    queries = uniform(53, HEADS, GROUP, 6, SIZE)
    ours = answered(one_layer(option, signals.layer), signals, queries)
    for head in range(HEADS):
        keys, values = doubles(signals.keys[head]), doubles(signals.values[head])
        blocks = [range(start, min(start + 8, TOKENS)) for start in range(0, TOKENS, 8)]
        for at in range(6):
            group = doubles(queries[head, :, at])
            bounds = [
                max(
                    sum(
                        max(q[c] * keys[list(block), c].max(), q[c] * keys[list(block), c].min())
                        for c in range(SIZE)
                    )
                    for q in group
                )
                for block in blocks[:-1]
            ]
            best = sorted(range(len(bounds)), key=lambda n: -bounds[n])[:2]
            read = [token for n in sorted([*best, len(blocks) - 1]) for token in blocks[n]]
            for number, q in enumerate(group):
                theirs = slow_attention(q, keys[read], values[read], signals.scale)
                assert np.abs(doubles(ours[head, number, at]) - theirs).max() < 1e-5


def test_held_is_not_read() -> None:
    option = Option(Quest(block=64), Budget(tokens=128))
    ledger = option.ledger(128, 4096, 128)
    index = 4096 // 64 * 128 * 2 * 2
    assert ledger.resident_bytes == 4096 * 128 * 2 * 2 + index
    assert ledger.read_bytes == 128 * 128 * 2 * 2 + index
    dense = Option(Full(), ALL).ledger(4096, 4096, 128)
    assert dense.resident_bytes == dense.read_bytes


# MiKV: two precisions within a head


def test_mikv_quantises_the_balanced_keys_of_what_matters_less(signals: Signals) -> None:
    method = MiKV(window=20)
    option = Option(method, Budget(tokens=10), Int2(group=8, keys_by="token"), Int2(group=8))
    part = apply(one_layer(option, signals.layer), signals.layer, [10] * HEADS, signals)
    for head in range(HEADS):
        q = doubles(signals.queries[head * GROUP : (head + 1) * GROUP])
        keys = doubles(signals.keys[head])
        drawn = np.zeros(TOKENS)
        for query_head in q:
            for row in range(TOKENS):
                logits = signals.scale * keys[: row + 1] @ query_head[row]
                weights = np.exp(logits - logits.max())
                drawn[: row + 1] += weights / weights.sum()
        recent = list(range(TOKENS - 5, TOKENS))
        best = sorted(range(TOKENS - 5), key=lambda token: -drawn[token])[:5]
        important = sorted([*best, *recent])
        others = [token for token in range(TOKENS) if token not in important]
        balance = np.sqrt(np.abs(q[:, -20:]).max((0, 1)) / np.abs(keys).max(0))
        expected = [keys[token] for token in important]
        expected += [slow_rtn(keys[token] * balance, 8, 2) / balance for token in others]
        assert np.abs(doubles(part.keys[head]) - np.array(expected)).max() < 2e-3


def slow_rtn(row: Any, group: int, bits: int) -> Any:
    found = []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        low = float(np.float16(part.min()))
        step = float(np.float16((part.max() - low) / (2**bits - 1))) or 1.0
        found += [low + step * min(max(round((x - low) / step), 0), 2**bits - 1) for x in part]
    return np.array(found)


def test_keys_and_values_are_counted_in_their_own_formats() -> None:
    option = Option(Full(), ALL, Int4(), Bf16())
    assert option.bytes_by_format(64, 64, 32) == {
        Int4(): 64 * 32 // 2 + 4 * 32,  # half a byte an element, a scale and an offset a channel
        Bf16(): 2 * 64 * 32,
    }


def test_a_log_weight_takes_its_bytes() -> None:
    """19 tokens and one virtual entry, 16 elements of 16 bits twice each, and one float32."""
    assert Option(Razor(), Budget(tokens=20)).footprint(20, 100, 16) == 20 * 2 * 2 * 16 + 4


def test_first_tokens_in_16_bits_take_16_bits() -> None:
    option = Option(Full(), ALL, Int8(exact_first=4), Int8(exact_first=4))
    exact, keys, values = 4 * 64 * 2, 64 * 64 + 64 * 4, 64 * 64 + 64 * 4
    assert option.footprint(68, 68, 64) == 2 * exact + keys + values


def test_mikv_takes_the_bytes_of_both_precisions() -> None:
    """The paper's Table 3 at 16 and 2 bits: 32.5 % of 16 bits, without the balancer."""
    two = Int2(group=64, keys_by="token"), Int2(group=64)
    option = Option(MiKV(balanced=False), Budget(share=0.2), *two)
    held = option.footprint(2000, 10_000, 128)
    assert held / (10_000 * 128 * 4) == pytest.approx(0.325, abs=1e-3)


# GEAR: quantised, low rank and sparse


@pytest.mark.parametrize("role", ["keys", "values"])
def test_gear_is_quantised_plus_low_rank_plus_sparse(role: Any) -> None:
    form = Gear(group=16, rank=3, outliers=0.1)
    tensor = uniform(7, 64, 32) ** 3
    back = form.decode(form.encode(tensor, role), 32, role)
    rows = doubles(tensor.T if role == "keys" else tensor)
    count = max(int(0.1 * rows.shape[1] / 2), 1)
    tame, exact = rows.copy(), np.zeros(rows.shape, bool)
    for row, flags in zip(tame, exact, strict=True):
        order = np.argsort(row)
        ends = [*order[:count], *order[len(order) - count :]]
        row[ends], flags[ends] = row.mean(), True
    coded = np.array([slow_rtn(row, 16, 2) for row in tame])
    error = np.where(exact, 0, rows - coded)
    best = np.linalg.svd(error)[1]
    left = np.where(exact, 0, doubles(back.T if role == "keys" else back) - rows)
    assert np.abs(left[exact]).max() == 0
    optimum = np.sqrt((best[3:] ** 2).sum())
    assert optimum * 0.9 < np.linalg.norm(left) < np.linalg.norm(error)


def test_gear_loses_less_than_its_parts_at_two_bits() -> None:
    """The paper's order: GEAR below GEAR-L below the backbone alone."""
    tensor = uniform(8, 128, 64) ** 5
    plain, low_rank, whole = (
        (form.roundtrip(tensor[None], torch.tensor([128]), "keys")[0] - tensor).norm()
        for form in (Int2(), Gear(outliers=0), Gear())
    )
    assert whole < low_rank < plain


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_packed_codes_come_back_from_as_few_bytes_as_they_need(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 13), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape == (5, -(-13 * bits // 8))
    assert torch.equal(unpack(packed, bits, 13), codes)


# MiniCache: one direction for two layers


def test_minicache_restores_lengths_along_a_direction_between_two_layers(
    signals: Signals,
) -> None:
    first, second = replace(signals, layer=2, _memo={}), make_signals(replace(CASE, seed=9))
    second = replace(second, layer=3)
    pair = {2: first, 3: second}
    option = Option(MiniCache(position=0.6), Budget(tokens=7))
    policy = one_layer(option, 2, 4)
    for layer, own in pair.items():
        whole = linked(own, policy.heads[layer], 4, pair.__getitem__)
        part = apply(policy, layer, [7] * HEADS, whole)
        for head in range(HEADS):
            one, two = doubles(first.keys[head]), doubles(second.keys[head])
            unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, two)]
            angle = np.arccos(np.clip((unit[0] * unit[1]).sum(1), -1, 1))
            worth = angle.copy()
            worth[0] = np.inf
            retained = sorted(np.argsort(-worth)[:7])
            mine = doubles(own.keys[head])
            expected = [mine[token] for token in retained]
            for token in (t for t in range(TOKENS) if t not in retained):
                a = angle[token]
                e = np.sin(0.4 * a) * unit[0][token] + np.sin(0.6 * a) * unit[1][token]
                e /= np.linalg.norm(e)
                expected.append(np.linalg.norm(mine[token]) * e)
            assert np.abs(doubles(part.keys[head]) - np.array(expected)).max() < 1e-4


def test_a_pair_of_layers_takes_the_bytes_of_the_published_formula() -> None:
    """(16 D + 2 * 16 + f * 32 D) / 32 D of both layers: 0.558 for 5 % retained of D = 128."""
    option, tokens, size = Option(MiniCache(), Budget(share=0.05)), 10_000, 128
    pair = 2 * option.footprint(500, tokens, size)
    assert pair / (2 * tokens * size * 4) == pytest.approx(0.508 * 0.95 + 0.05, abs=1e-3)


def test_a_link_needs_both_layers() -> None:
    one = Policy("odd", ((Option(MiniCache()),) * 2, (Option(),) * 2))
    with pytest.raises(KvtuneError, match="layer 0, KV head 0 to layer 1"):
        one.check_fits(2, 2)
    Policy("pair", ((Option(MiniCache()),) * 2,) * 2).check_fits(2, 2)
    with pytest.raises(KvtuneError, match="does not exist"):
        Policy("three", ((Option(MiniCache()),) * 2,) * 3).check_fits(3, 2)


# L2 norm: the newest token's key is seen


def test_knorm_evicts_the_longest_keys_at_the_prompt_and_while_decoding(signals: Signals) -> None:
    method, budget, steps = KNorm(), 20, 30
    budgets = np.full((1, HEADS), budget)
    prompt = prompt_of(method, signals, budgets)
    cache = SlotCache(method, prompt, signals, budgets, steps)
    keys = uniform(60, steps, 1, HEADS, SIZE)
    held = []
    for head in range(HEADS):
        norms = {n: float(doubles(signals.keys[head, n]) @ doubles(signals.keys[head, n]))
                 for n in range(TOKENS)}  # fmt: skip
        held.append({n: norms[n] for n in sorted(norms, key=lambda n: norms[n])[:budget]})
    assert cache.kept()[0] == [sorted(each) for each in held]
    for step in range(steps):
        cache.step(uniform(61, 1, HEADS, GROUP, SIZE), keys[step], keys[step])
        for head, each in enumerate(held):
            key = doubles(keys[step, 0, head])
            each[TOKENS + step] = float(key @ key)
            del each[max(each, key=lambda n: (each[n], -n))]
    assert cache.kept()[0] == [sorted(each) for each in held]


@dataclass(frozen=True)
class _Blind(KNorm):
    """A wrong one: the newest token's key never reaches its statistic."""

    name = "blind"

    def fresh(self, state: DecodeState, keys: Tensor, values: Tensor) -> dict[str, float | Tensor]:
        return {}


def test_a_method_that_never_gets_the_new_key_is_caught() -> None:
    from kvtune.policies.testing.decode import statistics_of_the_new_token_are_its_own

    statistics_of_the_new_token_are_its_own(KNorm(), Case(33, 6))
    with pytest.raises(AssertionError):
        statistics_of_the_new_token_are_its_own(_Blind(), Case(33, 6))


# What holds for all


def test_parts_attended_apart_and_merged_are_parts_attended_together(signals: Signals) -> None:
    queries = uniform(70, HEADS, GROUP, 4, SIZE)
    keys, values = signals.keys[:, None], signals.values[:, None]
    weight = uniform(71, HEADS, 1, 1, TOKENS)
    whole, _ = attend(queries, keys, values, None, signals.scale, weight)
    parts = [
        attend(queries, keys[:, :, at], values[:, :, at], None, signals.scale, weight[..., at])
        for at in (slice(0, 31), slice(31, None))
    ]
    torch.testing.assert_close(merge(*parts), whole, atol=1e-6, rtol=1e-5)


def test_all_six_are_written_in_yaml() -> None:
    text = """
kvtune_policy: 1
options:
  a: {method: razor, budget: 30}
  b: {method: {name: mikv, high: int8}, budget: 20%, keys: int2, values: int2}
  c: {method: {name: quest, block: 64}, budget: 128}
  d: {method: full, keys: gear, values: gear}
  e: {method: knorm, budget: 12.5%}
  f: {method: minicache, budget: 5%}
policy: a
"""
    policy = read_policy(text).bind(2, 2)
    assert policy.heads[0][0] == Option(Razor(), Budget(tokens=30), Bf16(), Bf16())
    assert issubclass(KNorm, DecodeMethod)
    assert Option(MiniCache(), ALL, Int4(), Int4()).footprint(10, 10, 64) > 0
