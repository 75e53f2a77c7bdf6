"""OSCAR's rotations, LoCoCo's kernels: fitted, kept in a file, used; and weighted keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.apply import apply_options
from kvtune.policies.attention import attend
from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.formats.grouped import Int2
from kvtune.policies.formats.rotated import RotatedInt2
from kvtune.policies.formats.turboquant import TurboQuant2
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.lococo import LoCoCo
from kvtune.policies.methods.oscar import Oscar
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.signals import Needs
from kvtune.policies.testing.cases import Case, make_signals, uniform
from kvtune.runtime.cache.beside import HeldPart, read_back
from kvtune.runtime.learn import _loss, _trained, kernels, rotations
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.learned import keep_learned, learned_layers
from kvtune.traces.passes import prompt_cache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))


def test_rotations_are_eigenvectors_of_what_attention_reads(
    tiny_model: Any, make_samples: Callable[..., list[Any]]
) -> None:
    sample = make_samples(1)[0]
    found = rotations(tiny_model, [sample])
    signals = fresh_prompt(tiny_model, sample, Needs(window=512))(1)
    queries, shape = signals.queries.double().numpy(), signals.keys.shape
    k, v = (x.double().numpy() for x in (signals.keys, signals.values))
    group, eye = len(queries) // shape[0], np.eye(shape[2])
    for head in range(shape[0]):
        squares, outputs = np.zeros((2, shape[2], shape[2]))
        for q in queries[head * group : (head + 1) * group]:
            squares += q.T @ q
            for row in range(shape[1]):
                paid = np.exp(k[head, : row + 1] @ q[row] * signals.scale)
                output = paid @ v[head, : row + 1] / paid.sum()
                outputs += np.outer(output, output)
        for name, whole in (("oscar_keys", squares), ("oscar_values", outputs)):
            basis = found[name][1, head].double().numpy()
            np.testing.assert_allclose(basis.T @ basis, eye, atol=1e-5)
            diagonal = basis.T @ whole @ basis
            assert abs(diagonal - np.diag(np.diag(diagonal))).max() < 1e-3 * diagonal.max()


def test_what_was_learned_is_kept_and_used(
    tiny_model: Any, make_samples: Callable[..., list[Any]]
) -> None:
    sample = make_samples(1)[0]
    prompt = fresh_prompt(tiny_model, sample, Oscar().needs)
    with pytest.raises(KvtuneError, match="the model has no 'oscar_keys' yet"):
        Oscar().parts(prompt(0), 20)
    found = rotations(tiny_model, [sample])
    keep_learned(tiny_model.fingerprint, found)
    keep_learned(tiny_model.fingerprint, {"other": torch.zeros(3)})  # beside the first
    layers = learned_layers(tiny_model.fingerprint, 3)
    assert torch.equal(layers[2]["oscar_values"], found["oscar_values"][2])
    signals = fresh_prompt(tiny_model, sample, Oscar().needs)(0)
    assert torch.equal(signals.matrices("oscar_keys"), found["oscar_keys"][0])
    with pytest.raises(KvtuneError, match="not of 4 layers"):
        learned_layers(tiny_model.fingerprint, 4)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = keep_learned("broken", {"x": torch.zeros(1)})
    path.write_bytes(b"nothing")
    with pytest.raises(KvtuneError, match="no safetensors file"):
        learned_layers("broken", 1)


@pytest.mark.parametrize(
    ("method", "formats"),
    [
        (Oscar(sinks=3, recent=5), (Int2(keys_by="token"), Int2())),
        (WeightedKeys(), (Allocated(mean_bits=2.0), TurboQuant2())),
    ],
)
def test_what_is_replayed_is_what_a_cache_holds(method: Any, formats: Any) -> None:
    case = Case(70, 70, group=2)
    signals = make_signals(case)
    option = Option(method, ALL, *formats)
    replayed = apply_options([option], 70, signals).of_policy(0)
    for head in range(case.kv_heads):
        keys, values = [], []
        own = signals.keys[head], signals.values[head]
        for part in method.parts(signals, 70):
            held = HeldPart.of(head, part.of_head(head), own, option)
            (read,) = read_back([held], case.head_dim)
            keys.append(read[0])
            values.append(read[1])
        torch.testing.assert_close(torch.cat(keys), replayed.keys[head], rtol=0.02, atol=0.02)
        torch.testing.assert_close(torch.cat(values), replayed.values[head], rtol=0.02, atol=0.02)


def test_a_rotation_leaves_exact_keys_as_they_are() -> None:
    signals = make_signals(Case(40, 40))
    stored = apply_options([Option(Oscar(sinks=0), ALL)], 40, signals).of_policy(0)
    torch.testing.assert_close(stored.keys, signals.keys, rtol=1e-3, atol=1e-3)
    option = Option(Oscar(sinks=4, recent=6), ALL, RotatedInt2(), RotatedInt2())
    stored = apply_options([option], 40, signals).of_policy(0)
    exact = [*range(4), *range(34, 40)]
    assert torch.equal(stored.keys[:, exact], signals.keys[:, exact])
    assert not torch.equal(stored.keys[:, 4:34], signals.keys[:, 4:34])


def test_bits_are_divided_as_no_other_division_could_better() -> None:
    rows = uniform(3, 4000, 3) * torch.tensor([4.0, 1.0, 0.3])
    form = Allocated(exact_first=0, mean_bits=2.0)
    widths = form.codes(rows, "keys")["widths"].tolist()
    errors = [1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104]  # even steps; Max, 1960
    square = rows.square().mean(0).tolist()
    divisions = {
        (a, b, 8 - a - b): sum(  # 8 signs: a token's fill a byte
            s * errors[w] for s, w in zip(square, (a, b, 8 - a - b), strict=True)
        )
        for a in range(7)
        for b in range(7)
        if 0 <= 8 - a - b <= 6
    }
    assert tuple(widths) == min(divisions, key=divisions.__getitem__)


def test_weighted_keys_lose_less_of_what_is_read() -> None:
    case = Case(200, 200, group=2, head_dim=16)
    plain = make_signals(case)
    read = torch.tensor([5.0] * 3 + [0.05] * 13)  # of each channel
    signals = replace(plain, queries=plain.queries * read, rope=None, _memo={})

    def error(method: Any) -> float:
        option = Option(method, ALL, Allocated(exact_first=0, mean_bits=1.0), TurboQuant2())
        keys = apply_options([option], 200, signals).of_policy(0).keys
        missing = (keys - signals.keys).repeat_interleave(2, 0)
        logits = signals.queries[:, -50:] @ missing.transpose(1, 2)
        return float(logits.square().mean())

    assert error(WeightedKeys()) < 0.3 * error(Option().method)


def fused_by_hand(
    keys: Tensor, values: Tensor, heavy: list[int], residual: list[int], kernels: list[Tensor]
) -> np.ndarray:
    """One head's fused keys and values in float64, entry by entry."""
    weight, bias, share = (x.double().numpy() for x in kernels)
    others = [t for t in range(len(keys)) if t not in heavy]
    both = torch.cat([keys, values], 1).double().numpy()[others]
    half, found = weight.shape[2] // 2, []
    for slot in range(len(weight)):
        drawn = np.zeros(len(others))
        for place in range(len(others)):
            total = bias[slot]
            for tap in range(weight.shape[2]):
                at = place + tap - half
                if 0 <= at < len(others):
                    total += weight[slot, :, tap] @ both[at]
            drawn[place] = max(total, 0)
        mass = np.exp(drawn) / np.exp(drawn).sum()
        one = both[others.index(residual[slot])]
        found.append((1 - share) * one + share * (mass @ both))
    return np.array(found)


def test_entries_are_fused_as_published() -> None:
    signals = make_signals(Case(50, 30, group=2))
    method = LoCoCo("convolution", slots=16, window=8)
    heavy, sums = method.parts(signals, 30)
    drawn = signals.window_attention(8).sum((1, 2))
    made = [signals.matrices(f"lococo_{name}") for name in ("weight", "bias", "share")]
    assert sums.keys is not None
    assert sums.values is not None
    for head in range(2):
        best = drawn[head].argsort(descending=True).tolist()
        assert heavy.tokens[head].tolist() == sorted(best[:14])
        expected = fused_by_hand(
            signals.keys[head], signals.values[head], best[:14], sorted(best[14:30]), made
        )
        ours = torch.cat([sums.keys[head], sums.values[head]], 1).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_without_a_share_the_convolution_is_left_out() -> None:
    signals = make_signals(Case(50, 30))
    none = {**signals.learned, "lococo_share": torch.tensor(0.0)}
    signals = replace(signals, learned=none, _memo={})
    option, plain = (
        Option(LoCoCo(fused), Budget(tokens=30)) for fused in ("convolution", "heaviest")
    )
    ours = apply_options([option], 30, signals).of_policy(0)
    theirs = apply_options([plain], 30, signals).of_policy(0)
    query = signals.queries[:, -1:]
    for head in range(2):
        outputs = [
            attend(query[head : head + 1], x.keys[head : head + 1], x.values[head : head + 1],
                   None, signals.scale)[0]
            for x in (ours, theirs)
        ]  # fmt: skip
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_kernels_of_another_size_are_refused() -> None:
    signals = make_signals(Case(50, 30))
    with pytest.raises(KvtuneError, match="fuse into 16 entries, slots is 8"):
        LoCoCo("convolution", slots=8).parts(signals, 30)


def test_training_lowers_the_loss_and_leaves_the_model_alone(
    tiny_model: Any, make_samples: Callable[..., list[Any]]
) -> None:
    samples = make_samples(2)
    before = prompt_cache(tiny_model, samples[0].token_ids)[-1][0].clone()
    method = LoCoCo("convolution", slots=4, window=8)
    prompts = [fresh_prompt(tiny_model, s, Needs(window=8, future=True)) for s in samples]

    def loss(steps: int) -> float:
        made = [x.float() for x in _trained(prompts, 1, method, steps, seed=0)]
        return float(_loss(prompts[0](1), method, 16, (made[0], made[1], made[2])))

    assert loss(40) < loss(0)
    found = kernels(tiny_model, samples, steps=1, slots=4)
    assert found["lococo_weight"].shape == (3, 4, 2 * tiny_model.geometry.head_dim, 21)
    assert torch.equal(prompt_cache(tiny_model, samples[0].token_ids)[-1][0], before)


def test_stacks_are_told_the_mean_bits_of_divided_ones() -> None:
    """Not the least that a channel may have, by which a type of too few bits would look enough."""
    from kvtune.policies.export.flatten import flatten

    pair = Allocated(mean_bits=2.25), Allocated(mean_bits=3.0)
    found = flatten([Option(Full(), ALL, *pair), Option()])
    assert (found.key_bits, found.value_bits) == ((2.25 + 16) / 2, (3 + 16) / 2)
