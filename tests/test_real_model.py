"""SmolLM2 itself, end to end: from the store through a workload to a trace that answers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.real_model


def test_smollm2_is_captured_and_finds_its_needles(tmp_path: Path) -> None:
    from kvtune.traces.capture import capture
    from kvtune.traces.models import load_model
    from kvtune.traces.trace import open_trace
    from kvtune.traces.workloads import Workload, build

    loaded = load_model("smollm2-135m")
    workload = Workload({"search": {"retrieval": 1, "prose": 1}}, tokens=288, observed=96)
    samples = build(workload, loaded.tokenizer)
    capture(loaded, samples, tmp_path, probes=1, workload_description=workload.describe())
    trace = open_trace(tmp_path)
    needles, prose = trace.samples
    assert needles.needles >= 4
    assert needles.answer_accuracy > 0.9
    assert -sum(prose.target_logprob) / prose.observed < 4.5  # nats a token; guessing is 10.8
    layer = trace.layer(needles.id, 29)
    assert layer.k.shape == (3, 288, 64)
    assert layer.probes.shape == (1, 96, 9, 64)
    assert float(layer.probes.std()) > 0
