"""SkipDecode's schedule, what it costs, and a model that really leaves out layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.policies.skip_decode import SkipDecode
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.runtime.skip_decode import generate_skipping
from kvtune.simulator.skip_decode import skip_cost

SCHEDULE = SkipDecode(layers=12, most=10, least=4, longest=20, warm=2)


def test_layers_fall_in_a_line_from_the_most_to_the_least() -> None:
    assert [SCHEDULE.count(p) for p in (0, 5, 10, 20, 500)] == [10, 8, 7, 4, 4]


def test_a_later_token_runs_layers_that_every_earlier_token_has_run() -> None:
    runs = [SCHEDULE.runs(position) for position in range(40)]
    for earlier, later in itertools.pairwise(runs):
        assert later <= earlier
    assert runs[0] == {0, 1, *range(4, 12)}
    assert runs[-1] == {0, 1, 10, 11}


@pytest.mark.parametrize(
    "numbers", [(12, 13, 4, 9, 1), (12, 10, 11, 9, 1), (12, 10, 4, 0, 1), (12, 10, 4, 9, 5)]
)
def test_a_schedule_that_cannot_be_is_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(KvtuneError):
        SkipDecode(*numbers)


def test_bytes_are_those_of_the_layers_that_ran_and_time_falls_with_them() -> None:
    shape, gpu = find_model("llama-8b"), find_gpu("h200")
    schedule = SkipDecode(32, 32, 8, 64)
    cost = skip_cost(schedule, shape, gpu, 1000, 100)
    by_token = [1000 * 32, *(schedule.count(p) for p in range(100))]
    assert cost.cache_bytes == sum(by_token) * shape.kv_bytes_per_token() // 32
    assert cost.cache_bytes < cost.full_cache_bytes
    assert cost.step.value < 0.45 * cost.full_step.value  # 8 of 32 layers, and the output matrix
    nothing = skip_cost(SkipDecode(32, 32, 32, 1), shape, gpu, 1000, 100)
    assert nothing.cache_bytes == nothing.full_cache_bytes
    assert nothing.step == nothing.full_step
    with pytest.raises(KvtuneError, match="32 layers"):
        skip_cost(SCHEDULE, shape, gpu, 1000, 100)


def small(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**(tiny_fields | {"num_hidden_layers": 5}))).eval()


def test_a_schedule_of_all_layers_generates_what_the_model_does(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    network = small(make_network, tiny_fields)
    ids = torch.arange(1, 21).view(2, 10)
    found = generate_skipping(network, ids, SkipDecode(5, 5, 5, 1), 6)
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found.tokens, ids[:, 10:])
    assert found.cached == 5 * [15]


def test_what_is_left_out_is_neither_run_nor_cached(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    """Held against a model that is built of the remaining layers alone."""
    network = small(make_network, tiny_fields)
    ids = torch.arange(1, 21).view(2, 10)
    found = generate_skipping(network, ids, SkipDecode(5, 3, 3, 1), 6)
    assert found.cached == [15, 0, 0, 15, 15]
    layers = network.model.layers
    whole = torch.nn.ModuleList(list(layers))
    network.model.layers = torch.nn.ModuleList([layers[0], layers[3], layers[4]])
    network.config.num_hidden_layers = 3
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, network(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    network.model.layers, network.config.num_hidden_layers = whole, 5
    assert torch.equal(found.tokens, ids[:, 10:])


def test_the_model_is_as_before_when_it_is_done(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    network = small(make_network, tiny_fields)
    ids = torch.arange(1, 11)[None]
    with torch.no_grad():
        before = network(ids).logits
        generate_skipping(network, ids, SkipDecode(5, 4, 1, 3), 5)
        assert torch.equal(network(ids).logits, before)
    with pytest.raises(KvtuneError, match="5 layers"):
        generate_skipping(network, ids, SCHEDULE, 2)


def test_layers_that_fall_away_keep_what_they_had_cached(
    make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    network = small(make_network, tiny_fields)
    schedule = SkipDecode(5, 5, 2, 3)
    found = generate_skipping(network, torch.arange(1, 11)[None], schedule, 6)
    read = [schedule.runs(0), *(schedule.runs(position) for position in range(5))]
    counts = [10, *5 * [1]]
    wanted = [
        sum(n for n, runs in zip(counts, read, strict=True) if layer in runs) for layer in range(5)
    ]
    assert found.cached == wanted
    assert sum(wanted) == schedule.cached_tokens(10, 5)
