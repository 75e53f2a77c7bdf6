"""Keys in a few bits: what is packed comes back, and searches keep to what they may read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvtune.policies.code_index import CodeIndex, Pass

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS, WIDTH = 600, 16


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and queries that look at few of their directions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2, 0.1, WIDTH)
    keys = torch.randn(KEYS, WIDTH, generator=generator)
    return keys, torch.randn(300, WIDTH, generator=generator) * scale


@pytest.mark.parametrize("stored", [1, 2, 5])
def test_packed_keys_are_each_directions_nearest_level(stored: int) -> None:
    keys = drawn()[0] * torch.linspace(3, 0.3, WIDTH)
    found = Pass.of(keys, stored)
    assert found.packed.shape == (KEYS, stored)
    assert found.packed.dtype == torch.uint8
    read = found.read()
    bits = (found.fields > 0).sum(0).tolist()
    assert sum(bits) == 8 * stored
    for at, count in enumerate(bits):
        levels = found.levels[: 2**count, at]
        away = (keys[:, at, None] - levels).abs()
        torch.testing.assert_close((read[:, at] - keys[:, at]).abs(), away.min(1).values)


def test_a_few_bytes_of_a_direction_find_what_a_plain_ranking_finds() -> None:
    keys, queries = drawn()
    index = CodeIndex.build(keys, queries, 10, KEYS, [(4, 16)])
    best = (queries[:20] @ keys.T).topk(10).indices
    found = index.search(queries[:20], 10, KEYS)
    assert found.tolist() == best.tolist()


@pytest.mark.parametrize("compared", [60, 120, 300])
def test_a_search_reads_no_more_than_it_may(compared: int) -> None:
    keys, queries = drawn()
    index = CodeIndex.build(keys, queries, 10, compared, [(1, 4)])
    assert index.bytes_read(compared) <= compared * 2 * WIDTH
    counts = index.ranked(compared)
    assert counts[0] == KEYS
    assert counts == sorted(counts, reverse=True)
    found = index.search(queries[:5], KEYS, compared)
    assert found.shape == (5, counts[-1])
    assert all(len(set(row)) == len(row) for row in found.tolist())


def test_recall_grows_with_what_is_read_and_beats_as_many_drawn_keys() -> None:
    keys, queries = drawn()
    index = CodeIndex.build(keys, queries, 20, 150, [(1, 4)])
    best = (queries[:50] @ keys.T).topk(20).indices
    recalls = []
    for compared in (90, 150, 300):
        found = index.search(queries[:50], 20, compared)
        recalls.append(float((best[:, :, None] == found[:, None]).any(-1).float().mean()))
    assert recalls == sorted(recalls)
    assert recalls[0] > 2 * 90 / KEYS
    assert recalls[-1] > 0.95


def test_the_passes_that_find_most_for_the_prompts_queries_are_taken() -> None:
    keys, queries = drawn()
    choices = [(1,), (1, 4), (2, 4), (3,)]
    chosen = CodeIndex.build(keys, queries, 20, 120, choices)
    shares = [
        CodeIndex.build(keys, queries, 20, 120, [each]).share_found(queries[::2], 20, 120)
        for each in choices
    ]
    assert chosen.share_found(queries[::2], 20, 120) == max(shares) > min(shares)
