"""Signals of newer methods: the same from a fresh run and from a trace, and refused if missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.signals import Needs
from kvtune.runtime.calibrate import calibrate, needle_columns, summary
from kvtune.runtime.prompts import fresh_prompt, traced_prompt
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.traces.calibration import (
    Calibration,
    find_calibration,
    keep_calibration,
    require_calibration,
)
from kvtune.traces.capture import capture
from kvtune.traces.passes import prompt_cache, run_prompt
from kvtune.traces.probes import Probes
from kvtune.traces.reconstruction import reconstruction, repeat
from kvtune.traces.samples import Sample
from kvtune.traces.self_study import REQUESTS, study_queries
from kvtune.traces.signals import SIGNALS

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = Needs(
    window=9,
    column_sums=True,
    query_moments=True,
    reconstruction=True,
    calibration=True,
    future=True,
    probes=True,
    later_queries=True,
    repeat_queries=True,
    study_queries=True,
)
MADE_UP = Calibration(((0.1, 0.9, 0.2, 0.3),) * 3, (0.1, 0.2, 0.3), "made up")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))


def test_replay_and_live_are_given_the_same_signals(
    tiny_model: Any, make_samples: Callable[..., list[Any]], tmp_path: Path
) -> None:
    keep_calibration(tiny_model.fingerprint, MADE_UP)
    sample = make_samples(1)[0]
    trace = capture(tiny_model, [sample], tmp_path / "t", probes=3, signals=SIGNALS, queries=21)
    fresh = fresh_prompt(tiny_model, sample, ALL, probes=Probes(3))
    traced = traced_prompt(trace, trace.samples[0], "cpu")
    for layer in range(3):
        replayed = LayerReplay.of(trace.layer(sample.id, layer)).signals
        for other in (traced(layer), replayed):
            ours = fresh(layer)
            assert (ours.layer, other.layer) == (layer, layer)
            assert ours.layer_error == pytest.approx(other.layer_error)
            pairs = [
                *((ours.given(n), other.given(n)) for n in ("reconstruction", "head_scores")),
                *zip(ours.query_moments(), other.query_moments(), strict=True),
                (ours.later_queries(), other.later_queries()),
                *(
                    (ours.reference_queries(n), other.reference_queries(n))
                    for n in ("repeat_queries", "study_queries")
                ),
                (ours.window_attention(9), other.window_attention(9)),
                (ours.future_attention(), other.future_attention()),
                (ours.probes(), other.probes()),
            ]
            for mine, theirs in pairs:
                scale = float(mine.abs().max())
                torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * scale)


def test_a_trace_without_a_signal_names_it(tiny_trace: Any) -> None:
    signals = traced_prompt(tiny_trace, tiny_trace.samples[0], "cpu")(0)
    with pytest.raises(KvtuneError, match="'reconstruction' of layer 0 was not recorded"):
        signals.given("reconstruction")


def test_repeating_pays_no_more_than_all_and_less_in_chunks_of_others(
    tiny_model: Any, make_samples: Callable[..., list[Any]]
) -> None:
    ids = make_samples(1)[0].token_ids
    cache = prompt_cache(tiny_model, ids)
    whole, halves = (reconstruction(tiny_model, ids, cache, chunk) for chunk in (100, 24))
    for found in (*whole, *halves):
        assert found.shape == (2, 48)
        assert (found > 0).all()
        assert (found <= 1).all()
    assert not torch.equal(whole[0], halves[0])


def test_references_are_the_queries_of_one_long_pass(
    tiny_model: Any, make_samples: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(make_samples(1)[0].token_ids)
    cache = prompt_cache(tiny_model, ids)
    monkeypatch.setattr("kvtune.traces.reconstruction._QUERIES", 20)
    encode = tiny_model.tokenizer

    def queries_of(text: list[int]) -> list[Tensor]:
        found: list[Tensor] = []
        run_prompt(tiny_model, [*ids, *text], lambda layer, q, k, v: found.append(q[0].float()))
        return found

    ask = encode("\n\nRepeat the previous context exactly.\n", add_special_tokens=False).input_ids
    for ours, whole in zip(repeat(tiny_model, ids, cache), queries_of([*ask, *ids]), strict=True):
        expected = whole[:, len(ids) + len(ask) :][:, ::3]  # of 48 tokens 20 at most
        torch.testing.assert_close(ours.queries, expected, rtol=1e-3, atol=1e-3)

    studied = study_queries(tiny_model, ids, cache, answer=2)
    at = 0
    for request in REQUESTS:
        text = list(encode(request, add_special_tokens=False).input_ids)
        for _ in range(2):  # the likeliest answer, by the model itself
            logits = tiny_model.model(torch.tensor([[*ids, *text]])).logits
            text.append(int(logits[0, -1].argmax()))
        for asked, whole in zip(studied, queries_of(text), strict=True):
            some = asked[:, at : at + len(text)]
            torch.testing.assert_close(some, whole[:, len(ids) :], rtol=1e-3, atol=1e-3)
        at += len(text)
    assert studied[0].shape[1] == at


def needle_sample() -> Sample:
    """'ab12' hidden at 3, asked for at the end: the digits are 50 and 51."""
    prompt = (9, 8, 7, 40, 41, 50, 51, 6, 5, 4)
    observed = (3, 40, 41, 50)
    rows = (-1, -1, 0, 0)
    return Sample("needle", "search", "retrieval", (*prompt, *observed), 51, 4, rows)


def test_a_needle_is_found_where_it_was_hidden() -> None:
    columns = needle_columns(needle_sample())
    assert columns.nonzero().tolist() == [[row, at] for row in (2, 3) for at in (3, 4, 5, 6)]


def test_calibration_measures_every_head_and_layer(tiny_model: Any) -> None:
    found = calibrate(tiny_model, [needle_sample()])
    assert [len(row) for row in found.head_scores] == [4, 4, 4]
    assert all(0 <= score <= 1 for row in found.head_scores for score in row)
    assert found.layer_errors == (0.0, 0.0, 0.0)  # ten tokens fit into the tiny cache
    assert len(summary(found).splitlines()) == 3


def test_a_calibration_is_kept_by_fingerprint() -> None:
    keep_calibration("a" * 64, MADE_UP)
    assert find_calibration("a" * 64) == MADE_UP
    assert find_calibration("b" * 64) is None
    with pytest.raises(KvtuneError, match="not calibrated"):
        require_calibration("b" * 64)


def test_smollm2s_calibration_ships() -> None:
    found = require_calibration(SMOLLM2)
    assert [len(row) for row in found.head_scores] == [9] * 30
    assert max(map(max, found.head_scores)) > 0.5  # a head that does little but retrieve


SMOLLM2 = "5ac471542e599af8" + "0" * 48
