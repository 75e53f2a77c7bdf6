"""Policies against slow, obvious versions of themselves."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.apply import apply
from kvtune.policies.attention import attend, merge
from kvtune.policies.format import Format, Role, formats
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Grouped, Int2, Int4, Int8
from kvtune.policies.formats.rotated import Rotated
from kvtune.policies.method import Method, methods
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.parts import entries_of
from kvtune.policies.policy import Policy, footprint
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.testing import Case, make_signals, uniform, variants

pytestmark = pytest.mark.usefixtures("one_thread")


# Signals


def naive_attention(signals: Signals) -> Tensor:
    """The whole causal attention matrix in float64, ``[H, G, P, P]``."""
    heads, tokens, _ = signals.keys.shape
    queries = signals.queries.double().reshape(heads, -1, tokens, signals.keys.shape[-1])
    logits = queries @ signals.keys.double()[:, None].transpose(-1, -2) * signals.scale
    future = torch.ones(tokens, tokens).triu(1).bool()
    attention: Tensor = logits.masked_fill(future, -torch.inf).softmax(-1)
    return attention


@pytest.mark.parametrize("case", [Case(1, 0), Case(256, 0, 2, 3), Case(257, 0), Case(601, 0, 1, 4)])
def test_tiled_column_sums_equal_the_whole_matrix(case: Case) -> None:
    signals = make_signals(case)
    expected = naive_attention(signals).sum(-2).float()
    torch.testing.assert_close(signals.column_sums(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 7, 32, 500])
def test_window_attention_is_the_last_rows(window: int) -> None:
    signals = make_signals(Case(83, 0, 2, 3))
    expected = naive_attention(signals)[:, :, -window:].float()
    torch.testing.assert_close(signals.window_attention(window), expected, rtol=1e-4, atol=1e-6)


def test_a_recorded_tail_serves_like_all_queries_and_a_short_one_is_refused() -> None:
    full = make_signals(Case(83, 0, 2, 3))
    tail = Signals(full.queries[:, -16:], full.keys, full.values, full.scale)
    torch.testing.assert_close(tail.window_attention(16), full.window_attention(16))
    with pytest.raises(ValueError, match="17 queries are needed, 16 were recorded"):
        tail.window_attention(17)


def test_needs_add_up() -> None:
    options = (Option(SnapKV(window=8)), Option(SnapKV(window=64)), Option(H2O()))
    assert Policy("mixed", (options,)).needs == Needs(window=64, column_sums=True)


# Methods


@pytest.mark.parametrize("budget", [0, 1, 6, 31, 70, 90])
@pytest.mark.parametrize(
    "method",
    [H2O(recent_share=1.0), StreamingLLM(sinks=0), SnapKV(window=90), SnapKV(recent=90), Full()],
    ids=str,
)
def test_degenerate_parameters_give_a_sliding_window(method: Method, budget: int) -> None:
    kept = method.keep(make_signals(Case(70, 0, 2, 3)), budget)
    count = min(budget, 70)
    assert kept.tolist() == [list(range(70 - count, 70))] * 2


def test_streaming_llm_keeps_sinks_and_window() -> None:
    kept = StreamingLLM(sinks=4).keep(make_signals(Case(50, 0, 1)), 10)
    assert kept.tolist() == [[0, 1, 2, 3, 44, 45, 46, 47, 48, 49]]


def test_snapkv_finds_what_the_window_looks_at() -> None:
    signals = make_signals(Case(60, 0, 1))
    signals.keys[0, 20] = 40 * signals.queries[0, -4:].mean(0)
    kept = SnapKV(window=4, kernel=3).keep(signals, 7)
    assert kept.tolist() == [[19, 20, 21, 56, 57, 58, 59]]


def test_h2o_finds_what_the_whole_prompt_looks_at() -> None:
    signals = make_signals(Case(60, 0, 1))
    signals.queries[0, :, 0], signals.keys[0, 20, 0] = 2.0, 40.0
    kept = H2O(recent_share=0.5).keep(signals, 2)
    assert kept.tolist() == [[20, 59]]


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(KvtuneError, match="odd"):
        SnapKV(kernel=4)


# Formats


def bits_of(codes: list[int], bits: int) -> bytes:
    """Codes packed one after the other, least significant bit first, filled up to a byte."""
    total = sum(code << (bits * place) for place, code in enumerate(codes))
    return total.to_bytes(-(-len(codes) * bits // 8), "little")


def raw(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def packed(form: Format, tensor: Tensor, role: Role) -> bytes:
    """What a simple writer would put into memory for one head's ``[n, D]``."""
    tokens = tensor.shape[0]
    if isinstance(form, Bf16):
        return raw(tensor.bfloat16())
    if isinstance(form, Fp8):
        scale = np.float32(1).tobytes() if tokens else b""
        return scale + raw(tensor.to(torch.float8_e4m3fn))
    if not isinstance(form, (Grouped, Rotated)):
        pytest.skip(f"no packer for {form.name}: add one here")
    exact, coded = tensor[: form.exact_first], tensor[form.exact_first :]
    rows = coded.T if role == "keys" and form.keys_by == "channel" else coded
    out = raw(exact.bfloat16())
    for row in rows:
        for start in range(0, len(row), form.group):
            group = row[start : start + form.group]
            out += np.array([0, 1], np.float16).tobytes()  # offset and scale
            out += bits_of([2**form.bits - 1] * len(group), form.bits)
    return out


def each_variant() -> list[Any]:
    """Every format; with other parameters than its own only under ``-m full``."""
    return [
        pytest.param(form, id=str(form), marks=[pytest.mark.full] if number else [])
        for kind in formats().values()
        for number, form in enumerate(variants(kind))
    ]


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("form", each_variant())
def test_footprint_is_what_a_packer_writes(form: Format, role: Role) -> None:
    for head_dim, tokens in product((32, 72, 128), (0, 1, 2, 5, 63, 64, 67, 130)):
        written = packed(form, uniform(0, tokens, head_dim), role)
        assert form.bound(tokens, head_dim, role) == len(written), (head_dim, tokens)


@pytest.mark.parametrize("role", ["keys", "values"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_grouped_errors_stay_within_half_a_step(role: Role, data: st.DataObject) -> None:
    bits_kind = data.draw(
        st.sampled_from([k for k in formats().values() if issubclass(k, Grouped)])
    )
    keys_by: Any = data.draw(st.sampled_from(["channel", "token"]))
    form = bits_kind(group=data.draw(st.sampled_from([2, 16, 48])), keys_by=keys_by)
    tensor = uniform(data.draw(st.integers(0, 999)), data.draw(st.integers(1, 50)), 24)
    tensor = tensor * data.draw(st.sampled_from([1e-3, 1.0, 300.0]))
    stored = form.roundtrip(tensor[None], torch.tensor([len(tensor)]), role)[0]
    along_tokens = role == "keys" and keys_by == "channel"
    rows, back = (tensor.T, stored.T) if along_tokens else (tensor, stored)
    for row, read in zip(rows.double(), back.double(), strict=True):
        for group, got in zip(row.split(form.group), read.split(form.group), strict=True):
            spread = float(group.max() - group.min())
            half_step = spread / (2**form.bits - 1) / 2
            smallest = 2**form.bits * 2**-25  # 16-bit scales are coarse near zero
            rounding = 2**-10 * (float(group.abs().max()) + spread) + smallest
            assert float((group - got).abs().max()) <= half_step + rounding


@pytest.mark.parametrize("kind", [k for k in formats().values() if issubclass(k, Grouped)])
def test_keys_by_token_are_stored_as_values_are(kind: type[Grouped]) -> None:
    tensor, counts = uniform(5, 2, 70, 48), torch.tensor([70, 33])
    by_token, by_channel = kind(keys_by="token"), kind()
    values = by_channel.roundtrip(tensor, counts, "values")
    assert torch.equal(by_token.roundtrip(tensor, counts, "keys"), values)
    assert torch.equal(by_token.roundtrip(tensor, counts, "values"), values)
    assert not torch.equal(by_channel.roundtrip(tensor, counts, "keys"), values)


def test_an_outlying_channel_widens_every_token_it_is_in() -> None:
    tensor, counts = uniform(6, 1, 64, 64), torch.tensor([64])
    tensor[..., 7] *= 50
    errors = [
        (Int4(keys_by=by).roundtrip(tensor, counts, "keys") - tensor)[..., :7].norm()
        for by in ("channel", "token")
    ]
    assert errors[1] > 10 * errors[0]


def test_fp8_errors_are_relative_to_each_value() -> None:
    tensor = uniform(1, 1, 40, 32)
    error = (Fp8().roundtrip(tensor, torch.tensor([40]), "keys") - tensor).abs()
    assert (error <= tensor.abs() * 2**-4 + 2 / 448 * 2**-10).all()
    assert (error > tensor.abs() * 2**-6).any()


def test_more_bits_err_less() -> None:
    tensor, counts = uniform(2, 3, 100, 64), torch.tensor([100] * 3)
    errors = [
        float((form.roundtrip(tensor, counts, "keys") - tensor).norm())
        for form in (Int2(), Int4(), Int8(), Bf16())
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@pytest.mark.parametrize("role", ["keys", "values"])
def test_first_tokens_are_exact_where_asked(role: Role) -> None:
    tensor = uniform(4, 2, 30, 32)
    tensor[:, :4] *= 100
    stored = Int2(exact_first=4).roundtrip(tensor, torch.tensor([30, 2]), role)
    assert torch.equal(stored[0, :4], tensor[0, :4])
    assert torch.equal(stored[1, :2], tensor[1, :2])
    assert (stored[0, 4:] - tensor[0, 4:]).abs().max() < 1


# Allocators


def test_pyramid_of_equal_ends_is_uniform() -> None:
    given_budgets = np.full((6, 3), 40)
    assert (Pyramid(beta=1.0).plan(given_budgets, 100) == 40).all()


def test_pyramid_falls_in_a_line_to_its_share() -> None:
    layers = Pyramid(beta=4.0).plan(np.full((5, 2), 40), 1000).sum(1)
    assert layers.tolist() == [140, 110, 80, 50, 20]


def test_adakv_with_full_safeguard_changes_nothing() -> None:
    budgets = [7, 19, 0, 30]
    split = AdaKV(safeguard=1.0).split(budgets, [SnapKV()] * 4, make_signals(Case(50, 0, 4)))
    assert split == budgets


def test_adakv_keeps_the_best_scores_of_the_layer() -> None:
    signals, method = make_signals(Case(50, 0, 3)), H2O(recent_share=0.0)
    split = AdaKV(safeguard=0.0).split([10, 10, 10], [method] * 3, signals)
    best = method.scores(signals).flatten().topk(30).indices // 50
    assert split == best.bincount(minlength=3).tolist()


def test_adakv_gives_the_peaked_head_less() -> None:
    signals, method = make_signals(Case(50, 0, 2)), H2O(recent_share=0.0)
    signals.keys[0, 0] = 0  # head 0: all mass on the first token
    signals.queries[0, :, 0], signals.keys[0, 0, 0] = 9.0, 90.0
    sure_first = AdaKV(rule="floor")  # 2 tokens are sure, and nothing more is won
    assert sure_first.split([10, 10], [method] * 2, signals) == [2, 18]
    assert AdaKV().split([10, 10], [method] * 2, signals) == [3, 17]  # 0.8 * 1 + 0.2 * 10


def test_adakv_refuses_mixed_methods() -> None:
    with pytest.raises(KvtuneError, match="one scoring method"):
        AdaKV().split([5, 5], [SnapKV(), H2O()], make_signals(Case(20, 0, 2)))


# Policies


def test_the_identity_policy_changes_nothing() -> None:
    signals = make_signals(Case(37, 0, 3))
    policy = Policy.uniform(Option(), 1, 3)
    stored = apply(policy, 0, policy.budgets(37)[0].tolist(), signals)
    assert torch.equal(stored.keys, signals.keys)
    assert torch.equal(stored.values, signals.values)
    assert stored.counts.tolist() == [37] * 3


option_strategy = st.builds(
    Option,
    st.sampled_from([kind() for kind in methods().values() if not kind().needs.linked]),
    st.sampled_from([ALL, Budget(0), Budget(1), Budget(13), Budget(500), Budget(share=0.3)]),
    st.sampled_from([Bf16(), Fp8(), Int4(), Int2(group=8, exact_first=4, keys_by="token")]),
    st.sampled_from([Bf16(), Fp8(), Int8(), Int4(group=16)]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(*[option_strategy] * 3), min_size=1, max_size=3), data=st.data())
def test_predicted_bytes_are_the_counted_ones(rows: list[Any], data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 60))
    policy = Policy("drawn", tuple(rows))
    budgets = policy.budgets(tokens)
    counted = 0
    for layer in range(policy.layers):
        signals = make_signals(Case(tokens, 0, 3, 2, seed=layer))
        stored = apply(policy, layer, budgets[layer].tolist(), signals)
        planned = zip(policy.heads[layer], budgets[layer].tolist(), strict=True)
        entries = [entries_of(o.method.plan(budget, tokens)) for o, budget in planned]
        assert stored.counts.tolist() == entries
        assert stored.keys.isfinite().all()
        counted += sum(stored.footprint_bytes)
    lengths = 4 * policy.layers * policy.kv_heads
    assert (
        policy.footprint(tokens, 16) == counted + lengths == footprint(policy, budgets, tokens, 16)
    )


@pytest.mark.parametrize("allocator", [AdaKV(), Pyramid()], ids=str)
def test_reallocated_policies_keep_the_sum_of_tokens(allocator: Allocator) -> None:
    policy = Policy.uniform(Option(SnapKV(window=4), Budget(share=0.25)), 4, 3, allocator=allocator)
    budgets = policy.budgets(64)
    kept = [
        apply(policy, layer, row.tolist(), make_signals(Case(64, 0, 3, seed=layer))).counts
        for layer, row in enumerate(budgets)
    ]
    assert int(torch.stack(kept).sum()) == 4 * 3 * 16


def test_heads_of_one_layer_may_differ_in_everything() -> None:
    options = (
        Option(StreamingLLM(sinks=1), Budget(3), Bf16(), Int8()),
        Option(),
        Option(Full(), Budget(5), Int4(), Bf16()),
    )
    signals = make_signals(Case(9, 0, 3))
    stored = apply(Policy("mixed", (options,)), 0, [3, 9, 5], signals)
    assert stored.counts.tolist() == [3, 9, 5]
    assert torch.equal(stored.keys[0, :3], signals.keys[0, [0, 7, 8]])
    assert torch.equal(stored.keys[1], signals.keys[1])
    assert torch.equal(stored.values[2, :5], signals.values[2, 4:])
    assert not torch.equal(stored.keys[2, :5], signals.keys[2, 4:])


def test_budgets_resolve_to_tokens() -> None:
    assert [Budget(share=0.125).resolve(n) for n in (0, 1, 8, 100, 1000)] == [0, 1, 1, 12, 125]
    assert [Budget(tokens=64).resolve(n) for n in (1, 64, 100)] == [1, 64, 64]
    assert ALL.resolve(77) == 77


# Attention over parts


@settings(max_examples=30, deadline=None, derandomize=True)
@given(first=st.integers(0, 20), second=st.integers(1, 12), seed=st.integers(0, 99))
def test_merged_parts_equal_one_softmax(first: int, second: int, seed: int) -> None:
    queries, scale = uniform(seed, 2, 3, 8) * 4, 0.35
    keys, values = uniform(seed + 1, 2, 2, first + second, 8)
    visible = torch.ones(3, second).tril(second - 3).bool()
    visible[:, 0] = True
    everything = torch.cat([torch.ones(3, first).bool(), visible], -1)
    logits = queries.double() @ keys.double().transpose(-1, -2) * scale
    weights = logits.masked_fill(~everything, -torch.inf).softmax(-1)
    prompt = attend(queries, keys[:, :first], values[:, :first], everything[:, :first], scale)
    recent = attend(queries, keys[:, first:], values[:, first:], visible, scale)
    merged = merge(prompt, recent).double()
    torch.testing.assert_close(merged, weights @ values.double(), rtol=1e-4, atol=1e-5)


def test_a_part_where_nothing_is_visible_weighs_nothing() -> None:
    queries, keys = uniform(0, 1, 2, 8), uniform(1, 1, 5, 8)
    hidden = attend(queries, keys, keys, torch.zeros(2, 5).bool(), 1.0)
    seen = attend(queries, keys, keys, torch.ones(2, 5).bool(), 1.0)
    assert (hidden[0] == 0).all()
    torch.testing.assert_close(merge(hidden, seen), seen[0])
