"""A search with the menu of all methods, from capture to the live run of its plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtune.common.progress import Silent
from kvtune.policies.policy_file.document import read_policy
from kvtune.tests.made_up import little_workload, of_own_weights
from kvtune.tuner.options import METHODS, every_method
from kvtune.tuner.screening import MOST
from kvtune.tuner.search import run_search
from kvtune.tuner.sources import own_trace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.full
def test_a_search_among_all_methods_runs_to_its_end(
    make_network: Callable[..., Any],
    tiny_fields: dict[str, Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On four layers, so that pairs of them may be linked."""
    from transformers import LlamaConfig

    from kvtune.traces import workloads

    monkeypatch.setattr(workloads, "named_workload", lambda *_: little_workload())
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "tiny"
    make_network(LlamaConfig(**{**tiny_fields, "num_hidden_layers": 4})).save_pretrained(model)
    tokenizer.save_pretrained(model)
    request = of_own_weights(model, tmp_path / "run", 2, menu="all")
    result = run_search(request)

    offered = {option.method for option in own_trace(request, Silent()).tables.options}
    tried = set(every_method(calibrated=False, pairs=True))
    assert set(METHODS) <= offered & tried
    assert len(offered & tried) <= MOST
    assert {option.method for option in result.policy.options()} <= offered | tried  # or a rule
    assert result.sequences == 2
    assert result.prompt_bytes == result.policy.footprint(80, request.shape.head_dim)
    assert 2 * result.prompt_bytes <= result.budget.cache_bytes
    assert result.quality.kl.tier == "live"
    assert result.quality.kl.value > 0
    assert {baseline.live is not None for baseline in result.baselines} == {True}
    document = read_policy(request.run_dir / "policy.yaml")
    assert document.bind(4, 2).heads == result.policy.heads
