"""What keeps a search quick changes nothing: rows that are not copied, bytes that are counted."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from kvtune.common.transformers_interface import gguf_read_once
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.allocators.cake_layers import CakeLayers
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Option
from kvtune.policies.signals import Signals
from kvtune.policies.testing import Case, make_signals
from kvtune.simulator.quality.tables import SampleFacts, Tables
from kvtune.tuner.baselines import fill

SPLITS = ("search", "search", "select", "evaluate", "select", "evaluate")
"""Rows that follow one another, and rows that do not."""


def tables() -> Tables:
    factor = np.random.default_rng(0).standard_normal((6, 4, 2, 8)).astype(np.float32)
    samples = tuple(SampleFacts(str(n), split, "prose") for n, split in enumerate(SPLITS))
    options = (Option(), Option(keys=Int4(), values=Int4()))
    loss = (factor**2).sum(-1)
    return Tables("m", 2, 2, 16, 64, options, samples, loss, factor, np.arange(6))


@pytest.mark.parametrize("split", ["search", "select", "evaluate"])
def test_a_split_says_what_its_rows_say(split: str) -> None:
    whole, choice = tables(), np.array([0, 1, 1, 0])
    rows = [n for n, each in enumerate(SPLITS) if each == split]
    np.testing.assert_array_equal(
        whole.of_split(split).by_sample(choice), whole.by_sample(choice)[rows]
    )


def test_rows_that_follow_one_another_are_not_copied() -> None:
    whole = tables()
    assert np.shares_memory(whole.of_split("search").factor, whole.factor)
    assert not np.shares_memory(whole.of_split("select").factor, whole.factor)
    assert whole.of_split("nobody's").loss.shape == (0, 4, 2)


def test_footprints_are_of_the_length_that_is_asked_for() -> None:
    whole = tables()
    for tokens in (64, 128, 64):
        expected = [option.footprint(tokens, tokens, 16) for option in whole.options]
        assert whole.footprints(tokens, 16).tolist() == expected


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("allocator", [AsGiven(), Pyramid()], ids=lambda a: a.name)
def test_one_more_token_of_a_head_would_not_have_fitted(allocator: Allocator, reads: bool) -> None:
    option = Option(Quest() if reads else SnapKV(), keys=Int4(), values=Int4())
    budget, figure = (20_000, "read_bytes") if reads else (9_000, "footprint")
    policy = fill(option, allocator, budget, 200, 4, 3, 16, reads=reads)
    assert policy is not None
    ledgers = [option.ledger(tokens, 200, 16) for tokens in range(201)]
    each = [ledger.read_bytes if reads else ledger.resident_bytes for ledger in ledgers]
    assert budget - 4 * max(np.diff(each)) < getattr(policy, figure)(200, 16) <= budget


def test_a_layers_preference_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    layers = [make_signals(Case(32, 8)) for _ in range(3)]
    computed = CakeLayers._entropy_and_shift

    def counted(self: CakeLayers, signals: Signals) -> Tensor:
        asked.append(id(signals))
        return computed(self, signals)

    monkeypatch.setattr(CakeLayers, "_entropy_and_shift", counted)
    allocator, methods = CakeLayers(window=4), [[SnapKV()] * 2] * 3
    budgets = np.full((3, layers[0].keys.shape[0]), 8)
    first = allocator.settle(budgets, methods, layers.__getitem__)
    again = allocator.settle(budgets, methods, layers.__getitem__)
    assert len(asked) == 3
    np.testing.assert_array_equal(first, again)


def test_gguf_is_as_before_once_it_has_been_read() -> None:
    gguf = pytest.importorskip("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with gguf_read_once():
        kind = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(kind, 2) is gguf.get_tensor_name_map(kind, 2)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
