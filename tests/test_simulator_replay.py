"""Replay against loops in float64, and its predictions against the model really run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvtune.common.errors import KvtuneError
from kvtune.common.kept import Kept
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.apply import apply, apply_each, apply_options, apply_together
from kvtune.policies.compressed import Compressed
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int4, Int8
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.mikv import MiKV
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.parts import Part
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.policies.testing import uniform
from kvtune.runtime.live import run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.quality import build
from kvtune.simulator.quality.build import ahead, build_tables, layer_features, replayed
from kvtune.simulator.quality.evaluate import replay_policies
from kvtune.simulator.quality.replay import LayerReplay, replay_options
from kvtune.traces.capture import capture
from kvtune.traces.models import wrap

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, GROUP, PROMPT, OBSERVED, PROBES, SIZE = 2, 3, 20, 8, 3, 4
OPTIONS = (
    Option(),
    Option(Full(), ALL, Int8(), Int8()),
    Option(Full(), ALL, Int4(), Int2(exact_first=2)),
    Option(H2O(), Budget(tokens=6)),
    Option(H2O(), Budget(tokens=6), Int4(), Int4()),
    Option(StreamingLLM(sinks=2), Budget(tokens=6), Int4(), Int2()),
    Option(SnapKV(window=4, kernel=3), Budget(share=0.5)),
    Option(SnapKV(window=4, kernel=3), Budget(tokens=1), Bf16(), Int2()),
)


def make_layer(seed: int = 0) -> LayerReplay:
    shape = (PROMPT, SIZE)
    keys, values = uniform(seed, 2, HEADS, *shape)
    signals = Signals(uniform(seed + 1, HEADS * GROUP, *shape), keys, values, SIZE**-0.5)
    recent = uniform(seed + 2, 2, HEADS, OBSERVED, SIZE)
    queries = 2 * uniform(seed + 3, HEADS, GROUP, OBSERVED, SIZE)
    probes = uniform(seed + 4, PROBES, OBSERVED, HEADS, GROUP, SIZE)
    return LayerReplay(signals, queries, recent[0], recent[1], probes)


def naive_output(layer: LayerReplay, prompt: Compressed) -> Tensor:
    """One softmax over [kept prompt | causal observed], query by query, in float64."""
    output = torch.zeros(HEADS, GROUP, OBSERVED, SIZE, dtype=torch.float64)
    for h in range(HEADS):
        kept = int(prompt.counts[h])
        for g in range(GROUP):
            for t in range(OBSERVED):
                keys = torch.cat([prompt.keys[h, :kept], layer.keys[h, : t + 1]]).double()
                values = torch.cat([prompt.values[h, :kept], layer.values[h, : t + 1]]).double()
                logits = keys @ layer.queries[h, g, t].double() * layer.signals.scale
                output[h, g, t] = logits.softmax(0) @ values
    return output


def naive_response(layer: LayerReplay, prompt: Compressed, block: int) -> Tensor:
    whole = layer.signals
    full = Compressed(whole.keys, whole.values, torch.full((HEADS,), PROMPT), ())
    change = naive_output(layer, prompt) - naive_output(layer, full)
    response = torch.zeros(HEADS, PROBES, -(-OBSERVED // block), dtype=torch.float64)
    for s in range(PROBES):
        for t in range(OBSERVED):
            for h in range(HEADS):
                for g in range(GROUP):
                    product = change[h, g, t] @ layer.probes[s, t, h, g].double()
                    response[h, s, t // block] += product
    return response


def ragged(layer: LayerReplay, counts: list[int], padded: bool | None = None) -> Compressed:
    """Heads of different lengths; what lies beyond a head's length would ruin any softmax."""
    keys, values = layer.signals.keys[:, :7].clone(), layer.signals.values[:, :7].clone()
    for head, count in enumerate(counts):
        keys[head, count:], values[head, count:] = 1e4, -1e4
    return Compressed(keys, values, torch.tensor(counts), (), padded=padded)


@pytest.mark.parametrize("padded", [True, None], ids=["by size", "masked"])
@pytest.mark.parametrize("counts", [[7, 7], [3, 7], [1, 5], [0, 4], [0, 0]], ids=str)
def test_output_is_one_softmax_over_what_is_kept_and_what_is_observed(
    counts: list[int], padded: bool | None
) -> None:
    layer = make_layer()
    prompt = ragged(layer, counts, padded)
    expected = naive_output(layer, prompt).float()
    torch.testing.assert_close(layer.output(prompt), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_several_policies_are_as_long_as_what_each_holds() -> None:
    """One prompt for queries of several policies, and the other way round."""
    layer, counts = make_layer(), [[3, 7], [0, 4], [7, 3]]
    parts = [ragged(layer, row, padded=True) for row in counts]
    queries = torch.stack([make_layer(seed).queries for seed in range(3)])
    keys, values = (torch.stack([getattr(x, name) for x in parts]) for name in ("keys", "values"))
    several = Compressed(keys, values, torch.tensor(counts), (), padded=True)
    for row, part in enumerate(parts):
        for output, expected in zip(
            several.attended(queries, 0.5), part.attended(queries[row], 0.5), strict=True
        ):
            torch.testing.assert_close(output[row], expected)
        shared = part.attended(queries, 0.5)[0]
        torch.testing.assert_close(shared[row], part.attended(queries[row], 0.5)[0])


@pytest.mark.parametrize("block", [1, 2, 3, 8, 100])
def test_response_is_the_change_times_the_probes_summed_over_heads_and_blocks(block: int) -> None:
    layer = make_layer(5)
    prompt = ragged(layer, [3, 6])
    expected = naive_response(layer, prompt, block).float()
    torch.testing.assert_close(layer.response(prompt, block), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", [1, 4])
def test_options_replayed_together_equal_each_alone(block: int) -> None:
    layer = make_layer(2)
    together = replay_options(layer, OPTIONS, block)
    assert together.shape == (HEADS, len(OPTIONS), PROBES, OBSERVED // block)
    for column, option in enumerate(OPTIONS):
        alone = apply(
            Policy.uniform(option, 1, HEADS),
            0,
            [option.budget.resolve(PROMPT)] * HEADS,
            layer.signals,
        )
        expected = layer.response(alone, block)
        torch.testing.assert_close(together[:, column], expected, rtol=1e-4, atol=1e-5)


def test_what_a_batch_of_options_stores_is_what_each_alone_stores() -> None:
    """Methods that only drop tokens are stored without telling heads apart; MiKV is none."""
    signals = make_layer(5).signals
    options = [*OPTIONS[3:6], Option(MiKV(), Budget(tokens=6), Int4(), Int2())]
    seen = []
    for rows, batch in apply_each(options, 6, signals):
        for at, row in enumerate(rows):
            alone = apply_options([options[row]], 6, signals)
            ours = batch.of_policy(at)
            assert torch.equal(ours.counts, alone.counts[0])
            assert ours.footprint_bytes == alone.footprint_bytes
            for mine, theirs in ((ours.keys, alone.keys[0]), (ours.values, alone.values[0])):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        seen += rows
    assert sorted(seen) == list(range(len(options)))


def test_the_uncompressed_option_responds_with_exactly_nothing() -> None:
    layer = make_layer(3)
    assert torch.count_nonzero(replay_options(layer, OPTIONS, 1)[:, 0]) == 0
    assert torch.count_nonzero(replay_options(layer, OPTIONS, 1)[:, 1]) > 0


def test_a_method_that_does_more_than_drop_tokens_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some fit what they store to the prompt, which takes most of a replay."""
    asked: list[int] = []
    parts = MiKV.parts

    def counted(method: MiKV, signals: Signals, budget: int) -> list[Part]:
        asked.append(budget)
        return parts(method, signals, budget)

    monkeypatch.setattr(MiKV, "parts", counted)
    keys, values = uniform(4, 2, 2, 9, 8)
    signals = Signals(uniform(3, 4, 9, 8), keys, values, 0.4)
    options = [Option(MiKV(), Budget(tokens=5)), Option(Full(), ALL, Int4(), Int4())]
    rows = [row for some, _ in apply_each(options, 5, signals) for row in some]
    assert sorted(rows) == [0, 1]
    assert asked == [5]


def test_a_batch_of_policies_responds_as_each_alone() -> None:
    layer = make_layer(4)
    policies = [Policy.uniform(option, 1, HEADS) for option in OPTIONS]
    planned = [[option.budget.resolve(PROMPT)] * HEADS for option in OPTIONS]
    together = layer.response(apply_together(policies, 0, planned, layer.signals), 4)
    for row, (policy, budget) in enumerate(zip(policies, planned, strict=True)):
        alone = layer.response(apply(policy, 0, budget, layer.signals), 4)
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_features_square_to_nats_a_token() -> None:
    layer = make_layer(6)
    features = layer_features(layer, OPTIONS, 4)
    responses = replay_options(layer, OPTIONS, 4).double()
    nats = (responses**2).sum(-1).mean(-1) / (2 * OBSERVED)  # [H, O], the mean over probes
    np.testing.assert_allclose((features**2).sum(-1), nats.numpy(), rtol=1e-4)


def test_the_full_output_is_the_one_that_was_captured(tiny_trace: Any) -> None:
    for index in range(3):
        layer = tiny_trace.layer(tiny_trace.samples[0].id, index)
        ours = LayerReplay.of(layer).full.flatten(0, 1)
        torch.testing.assert_close(ours, layer.output, rtol=1e-2, atol=5e-3)


def test_items_are_loaded_ahead_in_order_and_an_error_reaches_the_caller() -> None:
    for readers in (1, 4):
        assert list(ahead(lambda n: n * n, range(7), readers)) == [n * n for n in range(7)]

    def broken(n: int) -> int:
        if n == 3:
            raise KvtuneError("shard")
        return n

    found = ahead(broken, range(7))
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KvtuneError, match="shard"):
        next(found)


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_items_are_replayed_in_order_and_threads_are_given_back(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU of eight threads four work side by side with two each, also if one fails."""
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)

    def replay(n: int) -> int:
        if n == 36:
            raise KvtuneError("replay")
        return n + 1

    found = replayed(lambda n: n * n, replay, range(9), device)
    assert [next(found) for _ in range(6)] == [1, 2, 5, 10, 17, 26]
    with pytest.raises(KvtuneError, match="replay"):
        next(found)
    if device == "cpu":
        assert set(given[:-1]) == {2}
        assert given[-1] == 8
    else:
        assert not given


class Counted(TorchDispatchMode):
    """Counts what torch is asked for, and what of it waits for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.operations, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_replay_never_waits_for_the_device_and_more_heads_cost_no_more_operations() -> None:
    one = make_layer()
    with Counted() as alone:
        replay_options(one, OPTIONS, 4)
    with Counted() as together:
        replay_options(LayerReplay.side_by_side([make_layer(n) for n in range(5)]), OPTIONS, 4)
    assert alone.waits == together.waits == 0
    assert together.operations < 1.1 * alone.operations


@pytest.mark.parametrize("together", [2, 99])
def test_samples_replayed_side_by_side_have_the_tables_of_each_alone(
    tiny_trace: Any, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    alone = build_tables(tiny_trace, OPTIONS, block=4)
    monkeypatch.setattr(build, "_together", lambda *_: together)
    found = build_tables(tiny_trace, OPTIONS, block=4)
    assert found.samples == alone.samples
    np.testing.assert_allclose(found.factor, alone.factor, atol=1e-6)


def test_layers_that_were_replayed_before_are_not_replayed_again(
    tiny_trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that ends after four layers is taken up there, and has the same tables."""
    kept, whole = Kept(tmp_path), build_tables(tiny_trace, OPTIONS, block=4)
    replayed: list[int] = []

    most: int | None = 4

    def features(*given: Any) -> Any:
        if len(replayed) == most:
            raise KeyboardInterrupt
        replayed.append(given[0].signals.layer)
        return layer_features(*given)

    monkeypatch.setattr(build, "layer_features", features)
    with pytest.raises(KeyboardInterrupt):
        build_tables(tiny_trace, OPTIONS, block=4, kept=kept)
    most = None
    found = build_tables(tiny_trace, OPTIONS, block=4, kept=kept)
    assert len(replayed) == len(tiny_trace.samples) * tiny_trace.geometry.layers
    np.testing.assert_array_equal(found.factor, whole.factor)


# Whole policies


@pytest.mark.parametrize("block", [1, 4, 12])
def test_the_table_of_a_configuration_equals_its_replay(tiny_trace: Any, block: int) -> None:
    tables = build_tables(tiny_trace, OPTIONS, block=block)
    rng = np.random.default_rng(1)
    choices = rng.integers(0, len(OPTIONS), (3, tables.heads))
    policies = [
        Policy(str(row), tuple(tuple(OPTIONS[o] for o in layer) for layer in choice.reshape(3, 2)))
        for row, choice in enumerate(choices)
    ]
    replayed = replay_policies(tiny_trace, tiny_trace.samples, policies, block=block)
    looked_up = np.stack([tables.by_sample(choice) for choice in choices])
    np.testing.assert_allclose(looked_up, replayed, rtol=2e-3)


def test_policies_replayed_together_equal_each_alone(tiny_trace: Any) -> None:
    options = (*OPTIONS, *OPTIONS[3:6])
    policies = [Policy.uniform(option, 3, 2) for option in options]  # more than one batch of them
    policies.append(Policy.uniform(OPTIONS[3], 3, 2, allocator=AdaKV()))
    samples = tiny_trace.samples[:2]
    together = replay_policies(tiny_trace, samples, policies, block=4)
    for row, policy in enumerate(policies):
        alone = replay_policies(tiny_trace, samples, [policy], block=4)[0]
        np.testing.assert_allclose(together[row], alone, rtol=1e-3, atol=1e-9)


def test_a_policy_of_another_shape_is_refused(tiny_trace: Any) -> None:
    with pytest.raises(KvtuneError, match="4 layers"):
        replay_policies(tiny_trace, tiny_trace.samples, [Policy.uniform(Option(), 4, 2)])


def test_tables_know_their_samples_and_their_model(tiny_trace: Any) -> None:
    tables = build_tables(tiny_trace, OPTIONS[:3], samples=tiny_trace.of_split("evaluate"), block=4)
    assert [s.id for s in tables.samples] == [s.id for s in tiny_trace.of_split("evaluate")]
    assert {s.split for s in tables.samples} == {"evaluate"}
    assert (tables.layers, tables.kv_heads, tables.head_dim, tables.prompt_tokens) == (3, 2, 8, 36)
    assert tables.loss.shape == (2, 6, 3)


@pytest.fixture(scope="module")
def mild_model(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any], tokenizer: Any
) -> Any:
    """Weights so small that a loss is the quadratic form it is predicted by."""
    from transformers import LlamaConfig

    config = LlamaConfig(**{**tiny_fields, "initializer_range": 0.1})
    return wrap(make_network(config), tokenizer, name="mild-llama")


@pytest.mark.parametrize("keys", [Int4(), Bf16()], ids=["keys and values", "values"])
def test_a_small_perturbation_is_predicted_in_nats(
    mild_model: Any, make_samples: Callable[..., list[Any]], tmp_path: Path, keys: Any
) -> None:
    """Few positions, so that their whole sum can be squared, and many probes: little noise."""
    option = Option(Full(), ALL, keys, Int4())
    samples = make_samples(3, tokens=40, observed=6)
    trace = capture(mild_model, samples, tmp_path, probes=300)
    predicted = build_tables(trace, [option], block=6).by_sample(np.zeros(6, int))
    policy = Policy.uniform(option, 3, 2)
    live = []
    for sample in samples:
        prompt = fresh_prompt(mild_model, sample, policy.needs)
        live.append(run_live(mild_model, sample, prompt, [policy])[0].kl.mean())
    assert min(live) > 1e-5
    assert np.mean(predicted) == pytest.approx(np.mean(live), rel=0.1)
    np.testing.assert_allclose(predicted, live, rtol=0.25)
