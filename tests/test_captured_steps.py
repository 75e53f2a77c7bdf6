"""Steps replayed as a graph are steps: what the host counts is not read, nor memory left behind.

Without a GPU, a graph is what a CUDA graph is of its operations: the same functions, on the same
tensors, with the same numbers as when it was recorded, whose results go to the same places.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvtune.common.captured_steps import Steps
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.formats.rotated import RotatedInt4
from kvtune.policies.methods.a2sf import A2SF
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.lazy_eviction import LazyEviction
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.testing.decode import decode_methods
from kvtune.runtime.generate import Generation, Generations
from kvtune.runtime.live_policies import LivePolicy
from kvtune.simulator.quality import decoding
from kvtune.simulator.quality.decoding import all_layers, decode_features

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, PROMPT, TOKENS = 3, 2, 33, 24
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.lift_fresh")
"""What waits for the device, or sends to it what the host holds."""


class Recorded(TorchDispatchMode):
    """A graph on a CPU; it has run when it is recorded, so that its first replay does nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(WAITS):
            raise RuntimeError(f"{func} while a graph is recorded")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, found in self.calls if self.replays > 1 else ():
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class OnCpu(Steps):
    """Steps that are recorded here as a GPU would."""

    def __init__(self, step: Any, *, captures: bool = True) -> None:
        super().__init__(step, captures=True)

    def _recorded(self) -> Recorded:
        graph = Recorded()
        with pytest.MonkeyPatch.context() as patch, graph:
            patch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
            patch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
            self._step()
        return graph


def captured(generation: Generations) -> Steps:
    """Let a generation replay its steps."""
    generation.steps = OnCpu(generation._step)
    return generation.steps


def uniform(option: Option, **kwargs: Any) -> LivePolicy:
    return LivePolicy(Policy.uniform(option, LAYERS, HEADS), **kwargs)


def prompts(count: int) -> list[list[int]]:
    drawn: list[list[int]] = np.random.default_rng(4).integers(2, 258, (count, PROMPT + 1)).tolist()
    return drawn


METHODS = [kind() for kind in decode_methods().values()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_replayed_step_is_a_step_unless_the_method_says_otherwise(
    tiny_model: Any, method: DecodeMethod
) -> None:
    method = LazyEviction(window=8) if isinstance(method, LazyEviction) else method
    policies = [uniform(Option(method, Budget(tokens=budget))) for budget in (9, 20)]
    plain, replayed = (
        Generation(tiny_model, prompts(1)[0], policies, room=TOKENS) for _ in range(2)
    )
    steps = captured(replayed)
    for generation in (plain, replayed):
        generation.advance(TOKENS)
    assert steps.replayed > TOKENS / 3
    assert not steps.fault
    alike = all(
        np.array_equal(one.kl, two.kl)
        for one, two in zip(plain.results(), replayed.results(), strict=True)
    )
    assert alike != method.reads_step_number


def test_several_texts_in_formats_with_budgets_that_fill_one_by_one(tiny_model: Any) -> None:
    """Each text is what it would be alone, replayed or not."""
    form = RotatedInt4()
    option = Option(A2SF(recent=2), Budget(tokens=40), form, form)
    heads = (
        (option, replace(option, budget=Budget(tokens=50))),
        (Option(Full(), ALL, form, form), option),
        (Option(Tova(unit="kv_head"), Budget(tokens=6)), Option(StreamingLLM(), Budget(tokens=8))),
    )
    policies = [
        LivePolicy(Policy("mixed", heads), residual=3),
        uniform(Option(H2O(), Budget(tokens=11), form, form)),
    ]
    texts = prompts(3)
    drawn: dict[str, Any] = {"room": TOKENS, "temperature": 1.0}
    together = Generations(tiny_model, texts, policies, seeds=[5, 6, 7], **drawn)
    steps = captured(together)
    together.advance(TOKENS)
    assert TOKENS / 3 < steps.replayed < TOKENS
    assert not steps.fault
    for number, text in enumerate(texts):
        alone = Generation(tiny_model, text, policies, seed=5 + number, **drawn)
        alone.advance(TOKENS)
        assert together.tokens_of(number)[1:].tolist() == alone.token_ids
        for one, two in zip(alone.results(), together.runs()[number], strict=True):
            np.testing.assert_allclose(one.kl, two.kl, rtol=1e-3)  # codes may round otherwise
            np.testing.assert_array_equal(one.evicted, two.evicted)
            assert (one.mean_bytes, one.peak_bytes) == (two.mean_bytes, two.peak_bytes)


def test_replayed_tables_are_those_of_plain_steps(
    tiny_trace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Steps] = []

    def recorded(step: Any, **options: Any) -> Steps:
        made.append(OnCpu(step))
        return made[-1]

    sample, form = tiny_trace.samples[0], RotatedInt4()
    budget = Budget(tokens=sample.prompt + 4)
    options = [
        Option(A2SF(recent=2), Budget(tokens=9)), Option(A2SF(recent=2), budget),
        Option(H2O(), budget, form, form), Option(Full(), ALL, form, form),
    ]  # fmt: skip
    layers = all_layers(tiny_trace, sample, "cpu")
    plain = decode_features(layers, options, 3, 4)
    monkeypatch.setattr(decoding, "Steps", recorded)
    np.testing.assert_array_equal(decode_features(layers, options, 3, 4), plain)
    assert all(steps.replayed > 0 and not steps.fault for steps in made)


def test_a_step_that_cannot_be_captured_is_run(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = (
        Generation(tiny_model, prompts(1)[0], [uniform(Option(H2O(), Budget(tokens=9)))], room=8)
        for _ in range(2)
    )

    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    other.steps.captures = True
    monkeypatch.setattr(other.steps, "_recorded", fails)
    for generation in (plain, other):
        generation.advance(8)
    np.testing.assert_array_equal(plain.results()[0].kl, other.results()[0].kl)
    assert other.steps.replayed == 0
    assert "not permitted" in other.steps.fault
