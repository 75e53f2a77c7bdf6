"""Tables: slices agree with what they were cut from, low rank with full rank, files with memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.simulator.quality.tables import Tables, compact, head_exchangeable, join, low_rank
from kvtune.simulator.quality.tables_file import load_tables, save_tables

Make = Callable[..., Tables]


def random_choices(tables: Tables, count: int = 5, seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    return rng.integers(0, len(tables.options), (count, tables.heads))


def products(factor: Any) -> Any:
    """Gram matrix of one factor ``[I, O, r]``."""
    flat = factor.reshape(-1, factor.shape[-1]).astype(np.float64)
    return flat @ flat.T


def test_a_configurations_loss_is_the_square_of_the_summed_features(make_tables: Make) -> None:
    tables = make_tables()
    for choice in random_choices(tables):
        for sample, loss in enumerate(tables.by_sample(choice)):
            total = sum(tables.factor[sample, head, o] for head, o in enumerate(choice))
            assert loss == pytest.approx(float((total**2).sum()), rel=1e-4)


def test_without_cross_terms_heads_simply_add_up(make_tables: Make) -> None:
    tables = make_tables()
    for choice in random_choices(tables):
        own = sum(tables.loss[:, head, o] for head, o in enumerate(choice))
        np.testing.assert_allclose(tables.by_sample(choice, cross=0), own, rtol=1e-5)
        half = (own + tables.by_sample(choice)) / 2
        np.testing.assert_allclose(tables.by_sample(choice, cross=0.5), half, rtol=1e-4)


def test_a_subset_holds_its_samples_numbers(make_tables: Make) -> None:
    tables = compact(make_tables(count=6), [0, 0, 1, 1, 2, 2], rank=99)
    part = tables.subset([5, 0, 1])
    assert [s.id for s in part.samples] == ["sample-5", "sample-0", "sample-1"]
    assert len(part.factor) == 2  # groups that no sample uses are dropped
    for choice in random_choices(tables):
        np.testing.assert_allclose(part.by_sample(choice), tables.by_sample(choice)[[5, 0, 1]])


def test_a_split_is_the_subset_of_its_samples(make_tables: Make) -> None:
    tables = make_tables()
    part = tables.of_split("select")
    assert [s.id for s in part.samples] == ["sample-1", "sample-4"]
    choice = random_choices(tables, 1)[0]
    np.testing.assert_array_equal(part.by_sample(choice), tables.by_sample(choice)[[1, 4]])


def test_fewer_options_keep_their_losses(make_tables: Make) -> None:
    tables = make_tables()
    columns = [2, 7, 25]
    part = tables.with_options(columns)
    assert part.options == tuple(tables.options[c] for c in columns)
    for choice in random_choices(part):
        np.testing.assert_array_equal(
            part.by_sample(choice), tables.by_sample(np.array(columns)[choice])
        )


@pytest.mark.parametrize("compacted", [False, True])
def test_joined_parts_are_the_whole_again(make_tables: Make, compacted: bool) -> None:
    whole = make_tables(count=6)
    if compacted:
        whole = compact(whole, [0, 0, 0, 1, 1, 1], rank=99)
    again = join([whole.subset([0, 1, 2]), whole.subset([3, 4, 5])])
    assert again.samples == whole.samples
    for choice in random_choices(whole):
        np.testing.assert_array_equal(again.by_sample(choice), whole.by_sample(choice))


def test_weights_sum_to_one_and_kinds_count_alike(make_tables: Make) -> None:
    tables = make_tables(count=7)  # 4 samples of prose, 3 of code
    weights = tables.sample_weights()
    kinds = np.array([s.kind for s in tables.samples])
    assert weights.sum() == pytest.approx(1)
    assert weights[kinds == "prose"].sum() == pytest.approx(0.5)
    assert len(set(weights[kinds == "prose"].tolist())) == 1


def test_emphasis_makes_a_kind_count_so_many_times_another(make_tables: Make) -> None:
    tables = make_tables(count=7)
    weights = tables.sample_weights({"code": 4.0, "a kind that is not there": 9.0})
    code = np.array([s.kind == "code" for s in tables.samples])
    assert weights.sum() == pytest.approx(1)
    assert weights[code].sum() == pytest.approx(4 * weights[~code].sum())


def test_footprints_are_the_options_own(make_tables: Make) -> None:
    tables = make_tables()
    found = tables.footprints(1000, 64)
    for option, size in zip(tables.options, found, strict=True):
        assert size == option.footprint(option.budget.resolve(1000), 1000, 64)
    assert found.max() == 2 * 2 * 1000 * 64


# Low rank


def test_a_factor_of_full_rank_reproduces_every_product(make_tables: Make) -> None:
    factors = make_tables(count=3, features=5).factor
    weights = np.array([0.5, 0.2, 0.3], np.float32)
    expected = sum(w * products(f) for w, f in zip(weights, factors, strict=True))
    found = low_rank(factors, 15, weights)
    np.testing.assert_allclose(products(found), expected, atol=1e-5 * expected.max())


def test_a_low_rank_factor_is_as_near_as_the_best_one(make_tables: Make) -> None:
    factors = make_tables(count=4, features=40).factor
    rank = 12
    exact = sum(products(f) for f in factors) / 4
    found = low_rank(factors, rank)
    assert found.shape[-1] == rank
    values = np.linalg.eigvalsh(exact)[::-1]
    best = np.sqrt((values[rank:] ** 2).sum())  # Eckart and Young
    assert np.linalg.norm(products(found) - exact) < 1.1 * best
    assert np.linalg.norm(products(found)) > 0.5 * np.linalg.norm(exact)


def test_compacting_to_all_features_changes_nothing(make_tables: Make) -> None:
    tables = make_tables(count=4, features=6)
    compacted = compact(tables, range(4), rank=6)
    for choice in random_choices(tables):
        np.testing.assert_allclose(compacted.by_sample(choice), tables.by_sample(choice), rtol=1e-4)


def test_a_groups_mean_survives_compacting(make_tables: Make) -> None:
    tables = make_tables(count=6, features=6)
    compacted = compact(tables, [0, 0, 0, 1, 1, 1], rank=18)
    np.testing.assert_array_equal(compacted.loss, tables.loss)
    for choice in random_choices(tables):
        ours, theirs = compacted.by_sample(choice), tables.by_sample(choice)
        assert ours[:3].mean() == pytest.approx(theirs[:3].mean(), rel=1e-3)
        assert ours[3:].mean() == pytest.approx(theirs[3:].mean(), rel=1e-3)


def test_an_option_without_loss_has_none_after_compacting(make_tables: Make) -> None:
    tables = compact(make_tables(count=6, features=40), [0] * 6, rank=8)
    full = [o.keys.name == "bf16" and o.method.name == "full" for o in tables.options].index(True)
    np.testing.assert_allclose(tables.by_sample(np.full(tables.heads, full)), 0, atol=1e-9)


# For a model with other heads


@pytest.mark.parametrize("target", [(3, 2), (1, 1), (5, 7), (32, 8)], ids=str)
def test_one_option_for_all_heads_loses_what_it_loses_on_the_source(
    make_tables: Make, target: tuple[int, int]
) -> None:
    tables = make_tables()
    other = head_exchangeable(tables, "other", *target, head_dim=128)
    assert (other.model, other.heads, other.head_dim) == ("other", target[0] * target[1], 128)
    for option in range(len(tables.options)):
        np.testing.assert_allclose(
            other.by_sample(np.full(other.heads, option)),
            tables.by_sample(np.full(tables.heads, option)),
            rtol=1e-4,
            atol=1e-9,
        )


def test_no_order_of_heads_or_layers_matters_to_another_model(make_tables: Make) -> None:
    """Neither that of the source's, nor that of the model's own."""
    tables, rng = make_tables(layers=4, kv_heads=3), np.random.default_rng(0)
    other = head_exchangeable(tables, "other", 5, 2, head_dim=64)
    choice = rng.integers(0, len(tables.options), other.heads)
    for _ in range(5):
        order = rng.permutation(tables.heads)
        moved = dataclasses.replace(
            tables, loss=tables.loss[:, order], factor=tables.factor[:, order]
        )
        same = head_exchangeable(moved, "other", 5, 2, head_dim=64)
        np.testing.assert_allclose(same.loss, other.loss, rtol=1e-4, atol=1e-9)
        losses = other.by_sample(rng.permutation(choice))
        np.testing.assert_allclose(losses, other.by_sample(choice), rtol=1e-5)


# Files


def test_tables_come_back_from_disk_within_rounding(make_tables: Make, tmp_path: Path) -> None:
    tables = compact(make_tables(features=20), [0, 0, 0, 1, 1, 1], rank=12)
    save_tables(tables, tmp_path / "t.safetensors", {"made": "here"})
    again, provenance = load_tables(tmp_path / "t.safetensors")
    assert provenance == {"made": "here"}
    for name in ("model", "layers", "kv_heads", "head_dim", "prompt_tokens", "options", "samples"):
        assert getattr(again, name) == getattr(tables, name), name
    np.testing.assert_array_equal(again.group, tables.group)
    np.testing.assert_allclose(again.loss, tables.loss, rtol=2e-3, atol=1e-7)
    largest = np.abs(tables.factor).max(-1, keepdims=True)
    assert (np.abs(again.factor - tables.factor) <= largest / 200 + 1e-9).all()
    for choice in random_choices(tables):
        np.testing.assert_allclose(again.by_sample(choice), tables.by_sample(choice), rtol=0.02)


@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "text", "bare", "newer"])
def test_a_damaged_file_is_one_clear_error(make_tables: Make, tmp_path: Path, harm: str) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "t.safetensors"
    save_tables(make_tables(), path, {})
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "bare":
        save_file({"loss_root": np.zeros(3, np.float16)}, path)
    else:
        damaged = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"words " * 99}
        damaged["newer"] = whole.replace(b'{\\"format\\": 1,', b'{\\"format\\": 2,')
        assert damaged[harm] != whole
        path.write_bytes(damaged[harm])
    with pytest.raises(KvtuneError) as caught:
        load_tables(path)
    assert caught.value.where == str(path)
