"""Which methods are replayed in full: an oracle by trying all sets, and what must not be lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.common.progress import Silent
from kvtune.policies.method import Method
from kvtune.tuner import screening
from kvtune.tuner.options import LAPTOP, METHODS, every_method
from kvtune.tuner.screening import covering, screened, within_bytes

ALL = every_method(calibrated=False)


def losses(rng: np.random.Generator, count: int = 8) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of so many methods at three budgets on twenty heads, each the best for some."""
    return rng.lognormal(-4, 1.5, (count, 3, 20)).astype(np.float32)


def together(every: Any, rows: Any) -> float:
    """What heads lose if each has the best of some methods, every budget over its least."""
    least = every.min(0).sum(-1)
    return float((every[list(rows)].min(0).sum(-1) / least).mean())


@pytest.mark.parametrize("seed", range(5))
def test_what_goes_on_loses_hardly_more_than_the_best_set_of_as_many(seed: int) -> None:
    every, methods = losses(np.random.default_rng(seed)), ALL[:8]
    chosen = [methods.index(each) for each in covering(every, methods, methods[:2], 4)]
    assert {0, 1} <= set(chosen)
    sets = [(0, 1, *rest) for rest in combinations(range(2, 8), 2)]
    best = min(together(every, rows) for rows in sets)
    worst = max(together(every, rows) for rows in sets)
    assert together(every, chosen) <= best + 0.15 * (worst - best)


def test_a_method_that_is_best_for_some_heads_goes_on_before_one_second_everywhere() -> None:
    every = np.full((4, 3, 10), 1.0, np.float32)
    every[1], every[2] = 0.9, 2.0
    every[2, :, :3] = 0.01
    chosen = covering(every, ALL[:4], ALL[:1], 2)
    assert chosen == (ALL[0], ALL[2])


def test_no_more_go_on_than_lower_anything() -> None:
    every = np.full((4, 3, 10), 2.0, np.float32)
    every[3] = 1.0
    assert covering(every, ALL[:4], ALL[3:4], 3) == (ALL[3],)
    every[1, 0, 0] = 0.5
    assert covering(every, ALL[:4], ALL[3:4], 3) == (ALL[1], ALL[3])
    assert covering(every, ALL[:4], (), 3) == (ALL[1], ALL[3])


def test_budgets_count_alike_however_much_is_lost_at_them() -> None:
    every = np.ones((3, 2, 4), np.float32)
    every[:, 0] *= 1000
    every[1, 0] *= 0.9
    every[2, 1] *= 0.1
    assert covering(every, ALL[:3], ALL[:1], 2) == (ALL[0], ALL[2])


def test_a_method_that_takes_more_bytes_is_compared_in_no_more_than_others() -> None:
    losses = np.array([[[8.0], [4.0], [1.0]], [[0.5], [0.4], [0.3]], [[9.0], [5.0], [2.0]]])
    taken = np.array([[10, 40, 160], [150, 190, 300], [10, 41, 160]])
    found = within_bytes(losses.astype(np.float32), taken)
    assert found[0].ravel().tolist() == [8.0, 4.0, 1.0]
    assert found[1].ravel().tolist() == [9.0, 5.0, 0.5], "the worst, until its least fits"
    assert found[2].ravel().tolist() == [9.0, 5.0, 2.0]


def test_what_was_found_is_kept_and_the_three_are_among_it(
    tiny_trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = set(tiny_trace.manifest["signals"])
    methods: tuple[Method, ...] = tuple(m for m in ALL if _reads_no_more_than(m, known))
    assert len(methods) > screening.MOST
    menu = replace(LAPTOP, methods=methods)
    first = screened(menu, tiny_trace, tmp_path / "tiny", "cpu", Silent())
    assert set(METHODS) & set(methods) <= set(first.methods)
    assert len(first.methods) <= screening.MOST
    assert set(first.methods) <= set(methods)
    monkeypatch.setattr(screening, "losses_of_methods", None)  # a second search tries nothing again
    assert screened(menu, tiny_trace, tmp_path / "tiny", "cpu", Silent()) == first
    assert first.formats == menu.formats


@pytest.mark.parametrize(
    "damaged", ["{", "[]", "{}", '{"methods": [], "of": 3}', '{"methods": ["snapkw"], "of": 3}']
)
def test_a_damaged_file_of_what_was_found_is_made_anew(
    damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    menu = replace(LAPTOP, methods=ALL[:9])
    every = losses(np.random.default_rng(0), 9)
    monkeypatch.setattr(screening, "losses_of_methods", lambda *_: every)
    first = screened(menu, None, tmp_path / "tiny", "cpu", Silent())  # type: ignore[arg-type]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_text(damaged)
    assert screened(menu, None, tmp_path / "tiny", "cpu", Silent()) == first  # type: ignore[arg-type]
    assert file.read_bytes() == whole


def _reads_no_more_than(method: Method, signals: set[str]) -> bool:
    from kvtune.tuner.sources import signals_of

    return set(signals_of(method.needs)) <= signals
