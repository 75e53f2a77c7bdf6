"""A policy live as a stack runs it that stores prompts and answers alike."""

from __future__ import annotations

from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune.cli.validate import OWN_RUNTIME, command
from kvtune.cli.validate import _stack as stack_of
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.export.contract import exporters
from kvtune.policies.format import Format, Role
from kvtune.policies.formats.openvino import OpenVINO4
from kvtune.policies.formats.token_head import Int4TokenHead, Int8TokenHead
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    PolicyDocument,
    Provenance,
    Quality,
    read_policy,
    write_policy,
)
from kvtune.policies.signals import Needs
from kvtune.runtime.live import full_cache
from kvtune.runtime.live_stored import run_stored
from kvtune.runtime.prompts import fresh_prompt
from kvtune.tuner.validate import validate_policy
from kvtune.tuner.within import stores_alike

pytestmark = pytest.mark.usefixtures("one_thread")
NARROW = Option(keys=Int4TokenHead(), values=Int4TokenHead())
LAYERS, HEADS = 3, 2


@pytest.fixture(scope="module")
def sample(tiny_trace: Any) -> Any:
    return tiny_trace.samples[0]


@pytest.fixture(scope="module")
def prompt(tiny_model: Any, sample: Any) -> Any:
    return fresh_prompt(tiny_model, sample, Needs())


@pytest.fixture(scope="module")
def full(tiny_model: Any, sample: Any, prompt: Any) -> Tensor:
    return full_cache(tiny_model, sample, prompt)


class Stored(DynamicCache):  # type: ignore[misc]
    """Keeps each token as it comes, as the format of its layer gives it back."""

    forms: tuple[Format | None, ...] = ()

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **named: Any) -> Any:
        if (form := self.forms[layer]) is not None:
            keys, values = self.back(keys, form, "keys"), self.back(values, form, "values")
        return super().update(keys, values, layer, *rest, **named)

    def back(self, tensor: Tensor, form: Format, role: Role) -> Tensor:
        rows = [form.decode(form.encode(x, role), x.shape[-1], role) for x in tensor[0]]
        return torch.stack(rows)[None].to(tensor.dtype)


def test_16_bits_lose_nothing(tiny_model: Any, sample: Any, full: Tensor) -> None:
    (found,) = run_stored(tiny_model, sample, [Policy.uniform(Option(), LAYERS, HEADS)], full)
    np.testing.assert_allclose(found.kl, 0, atol=1e-6)
    assert (found.kept == sample.prompt).all()


def test_one_pass_does_what_a_stack_does_token_by_token(
    tiny_model: Any, sample: Any, full: Tensor
) -> None:
    forms = Int4TokenHead(), None, Int8TokenHead()
    rows = [Option() if form is None else Option(keys=form, values=form) for form in forms]
    policy = Policy("by layer", tuple((option,) * HEADS for option in rows))
    (found,) = run_stored(tiny_model, sample, [policy], full)
    cache, logits = Stored(), []
    cache.forms = forms
    for token in sample.token_ids:
        with torch.no_grad():
            out = tiny_model.model(
                input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
            )
        logits.append(out.logits[0, -1])
    ours = torch.stack(logits[sample.prompt :]).float().log_softmax(-1)
    kl = (full.exp() * (full - ours)).sum(-1)
    np.testing.assert_allclose(found.kl, kl, rtol=2e-2, atol=1e-6)
    assert found.footprint_bytes == policy.footprint(sample.prompt, 8)


class Paged(Stored):
    """Stores the last page of keys anew with each token, from what was stored of it."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **named: Any) -> Any:
        if layer < len(self.layers) and (rows := self.layers[layer].keys.shape[2] % 32):
            held = self.layers[layer]
            keys = torch.cat([held.keys[:, :, -rows:], keys], 2)
            held.keys = held.keys[:, :, :-rows]
        return super().update(keys, values, layer, *rest, **named)


def test_a_page_that_is_not_full_is_stored_again_with_each_token(
    tiny_model: Any, sample: Any, full: Tensor
) -> None:
    form = OpenVINO4()
    policy = Policy.uniform(Option(keys=form, values=form), LAYERS, HEADS)
    (found,) = run_stored(tiny_model, sample, [policy], full)
    cache, logits = Paged(), []
    cache.forms = (form,) * LAYERS
    ids = torch.tensor([sample.token_ids])
    for part in (ids[:, : sample.prompt], *ids[:, sample.prompt :].split(1, 1)):
        with torch.no_grad():
            out = tiny_model.model(input_ids=part, past_key_values=cache, use_cache=True)
        logits.append(out.logits[0, -1])
    ours = torch.stack(logits[1:]).float().log_softmax(-1)
    kl = (full.exp() * (full - ours)).sum(-1)
    np.testing.assert_allclose(found.kl, kl, rtol=2e-2, atol=1e-6)


def test_validation_runs_a_policy_either_way(tiny_model: Any, sample: Any, full: Tensor) -> None:
    policy = Policy.uniform(NARROW, LAYERS, HEADS)
    (there,) = run_stored(tiny_model, sample, [policy], full)
    alike = validate_policy(policy, tiny_model, [sample], stored_alike=True)
    plain = validate_policy(policy, tiny_model, [sample])
    assert alike.live.value == pytest.approx(float(there.kl.mean()), rel=1e-5)
    assert alike.live.value != pytest.approx(plain.live.value, rel=1e-2)


def test_a_policy_that_drops_tokens_is_refused(tiny_model: Any, sample: Any, full: Tensor) -> None:
    policy = Policy.uniform(Option(SnapKV(window=4, kernel=3), Budget(8)), LAYERS, HEADS)
    with pytest.raises(KvtuneError, match="drops tokens") as error:
        run_stored(tiny_model, sample, [policy], full)
    assert "--for" in str(error.value.hint)


def test_a_policy_is_run_as_its_file_was_measured_unless_a_stack_is_named() -> None:
    loss = Estimate(0.04, 0.03, 0.05, "nats/token", "live")
    policy = Policy.uniform(NARROW, LAYERS, HEADS)
    made = PolicyDocument(policy, None, Provenance(Quality("own trace", "", loss, "vllm")))
    plain = PolicyDocument(policy, None, Provenance(Quality("own trace", "", loss)))
    assert [stack_of(made, None), stack_of(plain, None)] == ["vllm", ""]
    assert stack_of(plain, "llama-cpp") == "llama-cpp"
    assert stack_of(made, "kvtune") == "", "kvtune's own runtime, whatever the file was measured as"
    with pytest.raises(KvtuneError, match="how kvpress stores answers") as refused:
        stack_of(made, "kvpress")
    assert "--for takes llama-cpp, openvino, vllm, or kvtune" in str(refused.value.hint)
    assert read_policy(write_policy(made)) == made
    with pytest.raises(KvtuneError):
        stack_of(plain, "vlm")


def test_the_help_names_every_stack_that_a_policy_can_be_run_as() -> None:
    said = get_type_hints(command, include_extras=True)["stack"].__metadata__[0].help
    stacks = [name for name in exporters() if stores_alike(name)]
    assert f"({', '.join(stacks)})" in said
    assert OWN_RUNTIME in said
