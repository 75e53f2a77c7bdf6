"""Capture: true probes, an unchanged model, and interruptions that cost one sample at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.tests.full_cache import observed_logits
from kvtune.traces import capture as room
from kvtune.traces.capture import capture
from kvtune.traces.passes import full_cache_handler, prompt_cache, run_observed
from kvtune.traces.probes import Probes
from kvtune.traces.writer import CaptureSettings, compact

Make = Callable[..., list[Any]]


@dataclass(frozen=True)
class SetUp:
    """Directions of the logits that a test has chosen, [S, C, vocabulary]."""

    directions: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        return self.directions

    def slopes(self, first: int, count: int) -> torch.Tensor:
        return self.directions[first : first + count]

    def before(self, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
        return self.slopes(first, count) @ weight


def hf_reference(
    loaded: Any, sample: Any, directions: torch.Tensor
) -> tuple[Any, list[torch.Tensor]]:
    """Log-probabilities and probes by plain autograd through transformers' own whole forward."""
    inputs: list[torch.Tensor] = []

    def keep(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        inputs.append(args[0].detach().requires_grad_() if not inputs else args[0])
        return (inputs[-1],)

    layers = loaded.model.model.layers
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in layers]
    try:
        loaded.model.set_attn_implementation("sdpa")
        logits = loaded.model(torch.tensor([sample.token_ids]), use_cache=False).logits
    finally:
        loaded.model.set_attn_implementation("kvtune")
        for hook in hooks:
            hook.remove()
    log_p = logits[0, sample.prompt :].float().log_softmax(-1)
    heads, size = loaded.geometry.query_heads, loaded.geometry.head_dim
    probes = []
    for row in directions:
        total = (logits[0, sample.prompt :] * row).sum()
        grads = torch.autograd.grad(total, inputs, retain_graph=True)
        probes.append([g[0, sample.prompt :].reshape(-1, heads, size) for g in grads])
    return log_p.detach(), [torch.stack(of_layer) for of_layer in zip(*probes, strict=True)]


@pytest.mark.parametrize("together", [1, 3, 4])
def test_probes_are_the_gradients_of_the_unmodified_model(
    tiny_model: Any,
    make_samples: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    together: int,
) -> None:
    sample = make_samples(1)[0]
    drawn = SetUp(torch.randn(4, 12, 258, generator=torch.Generator().manual_seed(5)))
    monkeypatch.setattr(Probes, "draw", lambda *_: drawn)
    monkeypatch.setattr(room, "_together", lambda *_: together)
    trace = capture(tiny_model, [sample], tmp_path, probes=4)
    log_p, expected = hf_reference(tiny_model, sample, drawn.directions)
    for layer, probes in enumerate(expected):
        found = trace.layer(sample.id, layer).probes
        assert found.shape == (4, 12, 4, 8)
        torch.testing.assert_close(found, probes, rtol=2e-3, atol=2e-3 * float(probes.abs().max()))
    targets = torch.tensor(sample.targets)[:, None]
    record = trace.samples[0]
    torch.testing.assert_close(
        torch.tensor(record.target_logprob), log_p.gather(1, targets)[:, 0], rtol=1e-4, atol=1e-4
    )
    assert record.predicted == tuple(log_p.argmax(-1).tolist())


def test_the_observed_pass_while_capturing_has_the_full_models_logits_to_the_bit(
    tiny_model: Any, make_samples: Make
) -> None:
    sample = make_samples(1)[0]
    plain = observed_logits(tiny_model, sample.token_ids, sample.observed)
    seen: list[torch.Tensor] = []
    attend = full_cache_handler(prompt_cache(tiny_model, sample.token_ids[: sample.prompt]))

    def recording(layer: int, *given: Any) -> torch.Tensor:
        seen.append(attend(layer, *given).requires_grad_())
        return seen[-1]

    observed = sample.token_ids[sample.prompt :]
    with torch.enable_grad():
        captured = run_observed(tiny_model, observed, sample.prompt, recording)[0]
    assert torch.equal(captured, plain)
    tiny_model.model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            whole = tiny_model.model(torch.tensor([sample.token_ids]), use_cache=False).logits
    finally:
        tiny_model.model.set_attn_implementation("kvtune")
    torch.testing.assert_close(plain, whole[0, sample.prompt :], rtol=1e-4, atol=1e-4)


def test_capturing_leaves_the_model_as_it_was(
    tiny_model: Any, make_samples: Make, tmp_path: Path
) -> None:
    sample = make_samples(1)[0]
    before = observed_logits(tiny_model, sample.token_ids, sample.observed)
    weights = {n: w.clone() for n, w in tiny_model.model.state_dict().items()}
    capture(tiny_model, [sample], tmp_path, probes=2)
    assert torch.equal(before, observed_logits(tiny_model, sample.token_ids, sample.observed))
    assert all(torch.equal(w, weights[n]) for n, w in tiny_model.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in tiny_model.model.parameters())


def test_stored_tensors_are_those_of_the_run(tiny_trace: Any, tiny_model: Any) -> None:
    sample = tiny_trace.samples[1]
    cache = prompt_cache(tiny_model, sample.token_ids)  # all N as if they were the prompt
    for layer, (k, v) in enumerate(cache):
        found = tiny_trace.layer(sample.id, layer)
        torch.testing.assert_close(found.k, k[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.v, v[0], rtol=2e-3, atol=2e-3)
        assert found.q.shape == (4, 48, 8)
        scores = (found.q[:, 36:] @ found.k.repeat_interleave(2, 0).mT) * found.scale
        hidden = torch.ones(12, 48, dtype=torch.bool).triu(37)
        mass = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        output = mass @ found.v.repeat_interleave(2, 0)
        torch.testing.assert_close(found.output, output, rtol=1e-2, atol=1e-2)


def test_column_sums_add_up_to_the_prompts_queries(tiny_trace: Any) -> None:
    sums = tiny_trace.layer(tiny_trace.samples[0].id, 0).column_sums
    assert sums.shape == (4, 36)
    torch.testing.assert_close(sums.sum(1), torch.full((4,), 36.0))


@pytest.mark.parametrize(("queries", "stored"), [("all", 48), ("observed", 12), (20, 20), (5, 12)])
def test_the_asked_queries_are_stored(
    tiny_model: Any, make_samples: Make, tmp_path: Path, queries: Any, stored: int
) -> None:
    sample = make_samples(1)[0]
    whole = capture(tiny_model, [sample], tmp_path / "all", probes=1).layer(sample.id, 2)
    part = capture(tiny_model, [sample], tmp_path / "part", probes=1, queries=queries)
    found = part.layer(sample.id, 2)
    assert torch.equal(found.q, whole.q[:, 48 - stored :])


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


class StopsAt:
    """Progress that is interrupted before item ``at``."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen = 0

    def track(self, items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == self.at:
                raise KeyboardInterrupt
            self.seen += 1
            yield item

    def note(self, message: str) -> None:
        self.said = message


def test_an_interrupted_capture_continues_and_repeats_nothing(
    tiny_model: Any, make_samples: Make, tmp_path: Path
) -> None:
    samples = make_samples(4)
    capture(tiny_model, samples, tmp_path / "whole", probes=2, seed=3)
    with pytest.raises(KeyboardInterrupt):
        capture(tiny_model, samples, tmp_path / "cut", probes=2, seed=3, progress=StopsAt(2))
    again = StopsAt(99)
    capture(tiny_model, samples, tmp_path / "cut", probes=2, seed=3, progress=again)
    assert again.seen == 2
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_what_a_killed_run_left_is_written_again(
    tiny_model: Any, make_samples: Make, tmp_path: Path
) -> None:
    samples = make_samples(2)
    capture(tiny_model, samples, tmp_path / "whole", probes=2)
    with pytest.raises(KeyboardInterrupt):
        capture(tiny_model, samples, tmp_path / "cut", probes=2, progress=StopsAt(1))
    left = tmp_path / "cut" / "sample-0001"  # a kill in the midst of writing leaves such things
    left.mkdir()
    (left / "layer-00.safetensors").write_bytes(b"half")
    (left / ".layer-01.safetensors.x").write_bytes(b"temporary")
    (left / "sample.json").write_text("{}")
    capture(tiny_model, samples, tmp_path / "cut", probes=2)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_finished_capture_runs_nothing(
    tiny_model: Any, make_samples: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(2)
    capture(tiny_model, samples, tmp_path, probes=2)
    monkeypatch.setattr(room, "run_prompt", lambda *_: pytest.fail("ran again"))
    assert len(capture(tiny_model, samples, tmp_path, probes=2).samples) == 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"probes": 3}, "probes"), ({"seed": 1}, "seed"), ({"queries": "observed"}, "queries")],
)
def test_another_capture_in_the_same_folder_is_refused(
    tiny_model: Any, make_samples: Make, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    samples = make_samples(1)
    capture(tiny_model, samples, tmp_path, probes=2, seed=0)
    before = tree(tmp_path)
    with pytest.raises(KvtuneError, match=f"another trace.*{named}"):
        capture(tiny_model, samples, tmp_path, **{"probes": 2, "seed": 0, **changed})
    assert tree(tmp_path) == before


def test_other_samples_in_the_same_folder_are_refused(
    tiny_model: Any, make_samples: Make, tmp_path: Path
) -> None:
    capture(tiny_model, make_samples(1), tmp_path, probes=1)
    with pytest.raises(KvtuneError, match="workload"):
        capture(tiny_model, make_samples(2), tmp_path, probes=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probes": 0}, "0 probes"),
        ({"probes": 1, "signals": ("column_sum",)}, "no signal"),
        ({"probes": 1, "queries": "some"}, "queries"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    tiny_model: Any, make_samples: Make, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(KvtuneError, match=message):
        capture(tiny_model, make_samples(1), tmp_path / "trace", **given)
    assert not (tmp_path / "trace").exists()


def test_samples_longer_than_the_models_context_are_refused(
    tiny_model: Any, make_samples: Make, tmp_path: Path
) -> None:
    with pytest.raises(KvtuneError, match="made for at most 1024"):
        capture(tiny_model, make_samples(1, tokens=1025), tmp_path, probes=1)


def test_a_folder_that_cannot_be_made_is_one_clear_error(
    tiny_model: Any, make_samples: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KvtuneError, match=r"cannot (be written|write)"):
        capture(tiny_model, make_samples(1), tmp_path / "file" / "trace", probes=1)


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [
        (3.0, torch.float32, torch.float16),
        (1e6, torch.float32, torch.float32),
        (1e-5, torch.float32, torch.float32),
        (0.0, torch.float32, torch.float16),
        (1e6, torch.bfloat16, torch.bfloat16),
    ],
)
def test_half_precision_is_used_only_where_it_can_hold_the_values(
    value: float, dtype: torch.dtype, stored: torch.dtype
) -> None:
    assert compact("k", torch.full((3,), value, dtype=dtype)).dtype == stored


def test_of_a_prompts_queries_only_those_that_are_stored_stay_in_memory(
    tiny_model: Any, make_samples: Make
) -> None:
    (sample,) = make_samples(1)
    settings = CaptureSettings.of(tiny_model, [sample], 1, 0, "", 20, ())
    prompt = room._run_prompt(tiny_model, sample, settings)
    tail = 20 - sample.observed
    for queries in prompt.queries:
        assert queries.shape == (4, tail, 8)
        assert queries.untyped_storage().nbytes() == 4 * tail * 8 * queries.element_size()
