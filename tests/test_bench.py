"""The leaderboard on a tiny model: equal bytes, two settings, continued where it stopped."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtune.cli.inputs import read_shares
from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import methods
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.runtime.live import run_live
from kvtune.traces.calibration import Calibration, keep_calibration
from kvtune.tuner.bench import asked_before, bench
from kvtune.tuner.bench_entries import Entry, entries
from kvtune.tuner.bench_runs import RUNS, Run
from kvtune.tuner.leaderboard import full_cache, on_board, standings, too_large

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("streaming_llm", "kvzip", "future_attention")


@pytest.fixture
def samples(make_samples: Callable[..., list[Any]]) -> list[Any]:
    """Two samples; of each, rows 2 to 4 answer one question and rows 7 and 8 another."""
    from dataclasses import replace

    asked = tuple(0 if 2 <= row <= 4 else 1 if 7 <= row <= 8 else -1 for row in range(12))
    return [replace(s, needle_of_row=asked, kind="retrieval") for s in make_samples(2)]


def test_every_registered_method_is_on_the_board() -> None:
    names = [entry.name for entry in entries()]
    assert set(methods()) <= set(names)
    assert len(set(names)) == len(names)
    assert "kvzip + model_wide" in names


def test_a_name_picks_a_method_with_all_its_splits() -> None:
    assert [e.name for e in entries(["kvzip + adakv"])] == ["kvzip + adakv"]
    assert [e.name for e in entries(["kvzip"])] == ["kvzip", "kvzip + adakv", "kvzip + model_wide"]
    with pytest.raises(KvtuneError, match="'kvzap' is no policy"):
        entries(["kvzap"])


def test_the_first_question_moves_into_the_prompt(samples: list[Any]) -> None:
    twin = asked_before(samples[0])
    assert twin is not None
    assert twin.token_ids == samples[0].token_ids
    assert twin.prompt == samples[0].prompt + 2
    assert twin.needle_of_row[:3] == (0, 0, 0)
    assert twin.targets[0] == samples[0].targets[2]


def test_a_sample_that_asks_nothing_has_no_twin(make_samples: Callable[..., list[Any]]) -> None:
    from dataclasses import replace

    assert asked_before(replace(make_samples(1)[0], needle_of_row=(-1,) * 12)) is None


def test_everyone_gets_the_same_bytes_and_evicts(
    tiny_model: Any, samples: list[Any], tmp_path: Path
) -> None:
    runs = bench(tiny_model, samples, entries(NAMES), (0.25, 0.5), tmp_path)
    assert len(runs) == 5 * 2 * 4  # five entries, two shares, two samples and their twins
    a_token = 1 / (36 * 3 * 2)  # of one head, of the shortest prompt
    for run in runs:
        assert run.share - a_token < run.taken <= run.share
        assert run.evicted > 0
    assert {run.setting for run in runs} == {"asked after", "asked before"}


def test_answers_are_counted_by_question(
    tiny_model: Any, samples: list[Any], tmp_path: Path
) -> None:
    runs = bench(tiny_model, samples[:1], entries(["streaming_llm"]), (0.5,), tmp_path)
    for run in runs:
        assert (run.first[1], run.later[1]) == (3, 2)
        assert run.needles == (1, 1)
    (standing,) = standings(runs)
    assert standing.after is not None
    assert standing.known is not None
    assert standing.samples == 2
    assert all(each is not None for each in full_cache(runs))


def test_what_was_run_is_not_run_again(
    tiny_model: Any, samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = entries(["streaming_llm", "snapkv"])
    first = bench(tiny_model, samples, chosen[:1], (0.5,), tmp_path)
    lines = (tmp_path / RUNS).read_text().splitlines(keepends=True)
    (tmp_path / RUNS).write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while writing
    asked: list[int] = []

    def counting(*given: Any) -> Any:
        asked.append(len(given[3]))
        return run_live(*given)

    monkeypatch.setattr("kvtune.tuner.bench.run_live", counting)
    again = bench(tiny_model, samples, chosen[:1], (0.5,), tmp_path)
    assert asked == [1]
    assert sorted(map(repr, again)) == sorted(map(repr, first))


def test_a_folder_of_another_format_is_refused(
    tiny_model: Any, samples: list[Any], tmp_path: Path
) -> None:
    chosen = entries(["streaming_llm"])
    bench(tiny_model, samples[:1], chosen, (0.5,), tmp_path)
    with pytest.raises(KvtuneError, match="another model or format"):
        bench(tiny_model, samples[:1], chosen, (0.5,), tmp_path, form=Int4())


def test_a_calibration_is_used_where_there_is_one(
    tiny_model: Any, samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    scores = ((0.1, 0.9, 0.2, 0.3),) * 3
    keep_calibration(tiny_model.fingerprint, Calibration(scores, (0.1, 0.2, 0.3), "made up"))
    runs = bench(tiny_model, samples[:1], entries(["compresskv"]), (0.5,), tmp_path / "out")
    assert {run.policy for run in runs} == {"compresskv", "compresskv + compresskv_layers"}


def run_of(policy: str, kl: float, share: float = 0.1, sample: str = "a") -> Run:
    answers: dict[str, Any] = dict.fromkeys(("first", "later", "full_first", "full_later"), (0, 0))
    return Run(
        policy, share, sample, "prose", "asked after", kl, share, 9, needles=(0, 0), **answers
    )


def test_standings_are_in_order_of_loss_within_a_share() -> None:
    runs = [
        run_of("snapkv", 0.3), run_of("kvzip", 0.1), run_of("snapkv", 0.2, 0.05),
        run_of("snapkv", 0.5, sample="b"), run_of("kvzip", 0.1, sample="b"),
        run_of("future_attention", 0.01),
    ]  # fmt: skip
    found = standings(runs)
    order = [(s.share, s.policy) for s in found]
    assert order == [
        (0.05, "snapkv"), (0.1, "future_attention"), (0.1, "kvzip"), (0.1, "snapkv"),
    ]  # fmt: skip
    assert found[-1].kl.value == pytest.approx(0.4)
    assert [s.looks_ahead for s in found] == [False, True, False, False]
    assert found[0].after is None


def test_shares_are_percentages() -> None:
    assert read_shares("5%, 12.5%") == [0.05, 0.125]
    for wrong in ("5", "0%", "150%", "x%", ""):
        with pytest.raises(KvtuneError, match="is no share"):
            read_shares(wrong)


def test_the_committed_page_is_the_committed_result() -> None:
    page, result = "leaderboard.md", "leaderboard-h200.json"
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root / "benchmarks"))
    try:
        leaderboard = importlib.import_module("leaderboard")
    finally:
        sys.path.remove(str(root / "benchmarks"))
    found = json.loads((root / "benchmarks/results" / result).read_text())
    written = (root / "docs" / page).read_text()
    assert written.split(leaderboard.MARK)[1].strip() == leaderboard.page(found).strip()
    assert {row["policy"] for row in found["standings"]} <= {entry.name for entry in entries()}
    rows = [leaderboard.standing(row) for row in found["standings"]]
    assert all(row.evicted > 0 or row.reads_less for row in rows)


def test_readers_are_filled_by_what_they_read(
    tiny_model: Any, samples: list[Any], tmp_path: Path
) -> None:
    chosen = [Entry(Quest(block=8)), Entry(StreamingLLM())]
    runs = bench(tiny_model, samples[:1], chosen, (0.5,), tmp_path)
    quest = [run for run in runs if run.policy == "quest"]
    assert quest
    for run in quest:
        assert run.taken > 1, "all of the prompt and an index"
        assert run.read is not None
        assert 0.3 < run.read <= 0.5
    assert all(run.read is None for run in runs if run.policy == "streaming_llm")
    found = {standing.policy: standing for standing in standings(runs)}
    assert found["quest"].reads_less
    assert not found["streaming_llm"].reads_less
    rows = standings([*runs, run_of("token_select", 0.1, share=0.7)])
    assert [row.policy for row in on_board("held", rows, 0.5)] == ["streaming_llm"]
    assert {row.policy for row in on_board("read", rows, 0.5)} == {"quest", "streaming_llm"}
    assert too_large(rows, 0.5) == ["token_select"]
