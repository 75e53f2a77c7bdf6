"""A policy live: nothing lost where nothing is done, the same as replay where they must agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.apply import apply
from kvtune.policies.format import Role
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime import live as room
from kvtune.runtime.live import LiveRun, run_beside_full, run_live
from kvtune.runtime.prompts import at_once, fresh_prompt, layer_signals, traced_prompt
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.tests.full_cache import observed_logits
from kvtune.traces.capture import capture
from kvtune.traces.models import wrap
from kvtune.traces.passes import run_observed

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = Needs(window=48, column_sums=True)
SNAPKV = SnapKV(window=4, kernel=3)


def mixed() -> Policy:
    """Another method, budget and format on every head."""
    heads = (
        (Option(H2O(), Budget(tokens=5)), Option(SNAPKV, Budget(tokens=11), Int4(), Int2())),
        (Option(Full(), ALL, Int4(), Int4()), Option(StreamingLLM(), Budget(tokens=7))),
        (Option(), Option(H2O(), Budget(share=0.25), Bf16(), Int2())),
    )
    return Policy("mixed", heads)


POLICIES = (
    mixed(),
    Policy.uniform(Option(H2O(), Budget(tokens=8)), 3, 2, name="h2o"),
    Policy.uniform(Option(SNAPKV, Budget(tokens=8), Int4(), Int4()), 3, 2, allocator=AdaKV()),
    Policy.uniform(Option(SNAPKV, Budget(tokens=6)), 3, 2, name="pyramid", allocator=Pyramid()),
)


def names(policy: Policy) -> str:
    return f"{policy.allocator.name} {policy.name}"


@pytest.fixture(scope="module")
def sample(tiny_trace: Any) -> Any:
    return tiny_trace.samples[0]


@pytest.fixture(scope="module")
def fresh(tiny_model: Any, sample: Any) -> Any:
    return fresh_prompt(tiny_model, sample, EVERYTHING)


def equal(ours: LiveRun, theirs: LiveRun, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(ours.kl, theirs.kl, atol=tolerance, rtol=1e-3)
    np.testing.assert_allclose(ours.nll, theirs.nll, atol=tolerance, rtol=1e-3)
    np.testing.assert_array_equal(ours.kept, theirs.kept)
    np.testing.assert_array_equal(ours.correct, theirs.correct)
    assert ours.footprint_bytes == theirs.footprint_bytes


@pytest.mark.parametrize(("device", "batches"), [("cpu", [5]), ("cuda:0", [1, 4])])
def test_only_on_a_cpu_the_full_cache_is_a_row_among_others(
    tiny_model: Any, sample: Any, fresh: Any, monkeypatch: pytest.MonkeyPatch,
    device: str, batches: list[int],
) -> None:  # fmt: skip
    """Elsewhere it would make all of them as long as the prompt."""
    answered, sizes = room._answered, []

    def counted(_: Any, sample: Any, prompt: Any, policies: Any) -> Any:
        sizes.append(len(policies))
        return answered(tiny_model, sample, prompt, policies)

    monkeypatch.setattr(room, "_answered", counted)
    asked = replace(tiny_model, device=device)
    full, found = run_beside_full(asked, sample, fresh, POLICIES)
    assert sizes == batches
    alone = run_live(asked, sample, fresh, POLICIES, full)
    for ours, theirs in zip(found, alone, strict=True):
        equal(ours, theirs, tolerance=1e-4)


def test_the_full_cache_loses_nothing_and_takes_all_bytes(
    tiny_model: Any, sample: Any, fresh: Any
) -> None:
    policy = Policy.uniform(Option(), 3, 2)
    (found,) = run_live(tiny_model, sample, fresh, [policy])
    np.testing.assert_allclose(found.kl, 0, atol=1e-6)
    np.testing.assert_array_equal(found.nll, found.full_nll)
    np.testing.assert_array_equal(found.correct, found.full_correct)
    lengths = 4 * 3 * 2
    assert found.footprint_bytes == 2 * 2 * 36 * 8 * 3 * 2 + lengths
    assert (found.kept == 36).all()


def test_the_full_rows_are_the_unmodified_models(tiny_model: Any, sample: Any, fresh: Any) -> None:
    (found,) = run_live(tiny_model, sample, fresh, [mixed()])
    logits = observed_logits(tiny_model, sample.token_ids, sample.observed)
    log_p = logits.float().log_softmax(-1)
    targets = torch.tensor(sample.targets)
    expected = -log_p.gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(found.full_nll, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.full_correct, log_p.argmax(-1) == targets)


@pytest.mark.parametrize("policy", POLICIES, ids=names)
def test_a_loss_is_never_negative_and_seen_at_every_position(
    tiny_model: Any, sample: Any, fresh: Any, policy: Policy
) -> None:
    (found,) = run_live(tiny_model, sample, fresh, [policy])
    assert found.kl.shape == found.nll.shape == (12,)
    assert (found.kl > 0).all()
    assert found.kept.shape == (3, 2)


@pytest.mark.parametrize("policy", POLICIES, ids=names)
def test_a_fresh_prompt_and_a_traced_one_give_the_same(
    tiny_model: Any, tiny_trace: Any, sample: Any, policy: Policy
) -> None:
    """The trace holds 16-bit numbers; the choices must be the same, the losses nearly."""
    ours = run_live(tiny_model, sample, fresh_prompt(tiny_model, sample, policy.needs), [policy])[0]
    theirs = run_live(tiny_model, sample, traced_prompt(tiny_trace, sample, "cpu"), [policy])[0]
    np.testing.assert_array_equal(ours.kept, theirs.kept)
    assert ours.footprint_bytes == theirs.footprint_bytes
    np.testing.assert_allclose(ours.kl, theirs.kl, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("policy", POLICIES, ids=names)
def test_the_prompt_that_a_method_needs_is_enough(
    tiny_model: Any, sample: Any, fresh: Any, policy: Policy
) -> None:
    little = fresh_prompt(tiny_model, sample, policy.needs)
    assert little(0).queries.shape[1] <= max(policy.needs.window, 0)
    assert (little(0).recorded_column_sums is None) != policy.needs.column_sums
    ours = run_live(tiny_model, sample, little, [policy])[0]
    equal(ours, run_live(tiny_model, sample, fresh, [policy])[0])


def test_a_prompt_read_at_once_is_the_one_read_layer_by_layer(tiny_trace: Any, sample: Any) -> None:
    one_by_one, read = traced_prompt(tiny_trace, sample, "cpu"), list[int]()

    def noted(layer: int) -> Any:
        read.append(layer)
        return one_by_one(layer)

    prompt = at_once(noted, tiny_trace.geometry.layers)
    for layer in range(tiny_trace.geometry.layers):
        assert prompt(layer) is prompt(layer)
        torch.testing.assert_close(prompt(layer).keys, one_by_one(layer).keys, rtol=0, atol=0)
    assert sorted(read) == list(range(tiny_trace.geometry.layers))


@pytest.mark.parametrize("policy", POLICIES, ids=names)
def test_the_first_layers_output_is_replays(
    tiny_model: Any,
    tiny_trace: Any,
    sample: Any,
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Later layers see what the first has lost, which replay does not; the first one must agree."""
    outputs: list[Tensor] = []

    def spying(loaded: Any, ids: Any, start: int, handler: Any, copies: int) -> Tensor:
        def spy(*given: Any) -> Tensor:
            outputs.append(handler(*given))
            return outputs[-1]

        logits: Tensor = run_observed(loaded, ids, start, spy, copies=copies)
        return logits

    monkeypatch.setattr(room, "run_observed", spying)
    prompt = traced_prompt(tiny_trace, sample, "cpu")
    run_live(tiny_model, sample, prompt, [policy])
    layer = LayerReplay.of(tiny_trace.layer(sample.id, 0))
    part = apply(policy, 0, policy.budgets(36)[0].tolist(), layer.signals)
    replayed = layer.output(part).flatten(0, 1)
    scale = float(replayed.abs().max())
    uncompressed, ours = outputs[0]  # rows of one batch, whose first is the full cache
    torch.testing.assert_close(ours, replayed, rtol=5e-3, atol=5e-3 * scale)
    full = layer.full.flatten(0, 1)
    torch.testing.assert_close(uncompressed, full, rtol=5e-3, atol=5e-3 * scale)
    assert float((ours - uncompressed).abs().max()) > 0.02 * scale


@pytest.mark.parametrize("policy", POLICIES, ids=names)
def test_kept_tokens_and_bytes_are_those_of_compressing(
    tiny_model: Any, sample: Any, fresh: Any, policy: Policy
) -> None:
    (found,) = run_live(tiny_model, sample, fresh, [policy])
    budgets = policy.budgets(36)
    parts = [apply(policy, n, budgets[n].tolist(), fresh(n)) for n in range(3)]
    np.testing.assert_array_equal(found.kept, [part.counts.tolist() for part in parts])
    lengths = 4 * 3 * 2
    assert found.footprint_bytes == sum(part.footprint_bytes[0] for part in parts) + lengths
    if not isinstance(policy.allocator, AdaKV):
        assert found.footprint_bytes == policy.footprint(36, 8)


def test_policies_in_one_batch_run_as_each_alone(tiny_model: Any, sample: Any, fresh: Any) -> None:
    together = run_live(tiny_model, sample, fresh, POLICIES)
    assert len(together) == len(POLICIES)
    for policy, found in zip(POLICIES, together, strict=True):
        equal(found, run_live(tiny_model, sample, fresh, [policy])[0], tolerance=1e-4)


@dataclass(frozen=True)
class Broken(Bf16):
    """A format that loses everything."""

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        return tensor * float("nan")


def test_an_output_that_is_not_a_number_names_its_policy(
    tiny_model: Any, sample: Any, fresh: Any
) -> None:
    fine = Policy.uniform(Option(), 3, 2, name="fine")
    broken = Policy.uniform(Option(Full(), ALL, Bf16(), Broken()), 3, 2, name="broken one")
    with pytest.raises(KvtuneError, match=r"'broken one'.*NaN"):
        run_live(tiny_model, sample, fresh, [fine, broken])


def test_a_policy_of_another_shape_is_refused(tiny_model: Any, sample: Any, fresh: Any) -> None:
    with pytest.raises(KvtuneError, match="2 layers"):
        run_live(tiny_model, sample, fresh, [Policy.uniform(Option(), 2, 2)])


def test_sliding_window_layers_are_refused_where_they_would_forget(
    make_network: Callable[..., Any],
    tiny_fields: dict[str, Any],
    tokenizer: Any,
    make_samples: Callable[..., list[Any]],
    tmp_path: Any,
) -> None:
    from transformers import MistralConfig

    (sample,) = make_samples(1)
    for window, refused in ((16, "layer 0.*window of 16"), (40, "layer 0.*window of 40")):
        config = MistralConfig(**tiny_fields, sliding_window=window)
        loaded = wrap(make_network(config), tokenizer, name="windowed")
        with pytest.raises(KvtuneError, match=refused):
            # 36 prompt tokens fit into a window of 40; the observed ones after them do not
            run_live(loaded, sample, fresh_prompt(loaded, sample, Needs()), [mixed()])
    trace = capture(loaded, [sample], tmp_path, probes=1)
    assert layer_signals(trace.layer(sample.id, 0)).prompt_tokens == 36
    wide = wrap(
        make_network(MistralConfig(**tiny_fields, sliding_window=48)), tokenizer, name="wide"
    )
    (found,) = run_live(wide, sample, fresh_prompt(wide, sample, EVERYTHING), [mixed()])
    assert np.isfinite(found.kl).all()
