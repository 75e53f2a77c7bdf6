"""The search, first to last: on made-up packaged tables, and on a tiny model of its own."""

from __future__ import annotations

import importlib
import json
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtune.cli.card_forms import as_markdown
from kvtune.cli.card_of_study import card_of
from kvtune.cli.search_report import verdict
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import exact
from kvtune.common.lock import locked
from kvtune.common.progress import Silent
from kvtune.policies.export.compare import compared
from kvtune.policies.export.contract import find_exporter
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.head_scores import About, HeadScores, write_heads
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import read_policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.quality.tables import Tables
from kvtune.tests.made_up import Notes, little_workload, llama, of_own_weights, write_study
from kvtune.traces.calibration import Calibration, keep_calibration
from kvtune.traces.learned import keep_learned
from kvtune.tui.report.write import live_kinds
from kvtune.tuner import search, sources
from kvtune.tuner.baselines import FAMILIES
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.finished import finished
from kvtune.tuner.options import METHODS, Menu, alike, every_method
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import SearchResult
from kvtune.tuner.rounding import MEASURED
from kvtune.tuner.search import run_search
from kvtune.tuner.stored_result import read_result

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[..., Tables]
KEYS = {
    "kvtune", "model", "gpu", "policy", "budget", "front", "baselines", "quality",
    "predicted_quality", "memory", "latency", "prefill", "compression", "context_tokens",
    "sequences", "sequence_bytes", "full_cache_sequences", "prompt_bytes", "share",
    "full_cache_accuracy", "counters", "notes", "provenance", "on_stack",
    "other_lengths",
}  # fmt: skip


def files(run_dir: Path) -> tuple[Any, Policy, dict[str, int]]:
    """The result, the plan, and how many trials each journal holds."""
    result = json.loads((run_dir / "result.json").read_text())
    document = read_policy(run_dir / "policy.yaml")
    assert document.model is not None
    policy = document.bind(document.model.layers, document.model.kv_heads)
    journals = {p.name: p.read_text().count('"state":') for p in run_dir.glob("*.journal")}
    return result, policy, journals


def check_front(result: SearchResult, written: Any) -> None:
    front = result.front
    assert [p.sequences for p in front] == sorted(p.sequences for p in front)
    assert [p.chosen for p in front].count(True) == 1
    unchosen = [p for p in front if not p.chosen]
    assert [p.kl for p in unchosen] == sorted(p.kl for p in unchosen)
    for point, plain in zip(front, written["front"], strict=True):
        assert plain["prompt_bytes"] == point.prompt_bytes
        assert plain["time_per_token"]["tier"] == point.time_per_token.tier


def check_room(result: SearchResult) -> None:
    """The plan's sequences fit with all that they generate."""
    request, shape = result.request, result.request.shape
    generated = shape.kv_bytes(result.context_tokens + request.generated_tokens)
    each = result.prompt_bytes + generated - shape.kv_bytes(result.context_tokens)
    assert result.sequences * each <= result.budget.cache_bytes
    assert result.prompt_bytes == result.policy.footprint(result.context_tokens, shape.head_dim)


# The stand-in


def test_a_stand_in_search_leaves_a_plan_that_reads_back(packaged: Tables, tmp_path: Path) -> None:
    result = run_search(llama(tmp_path))
    written, policy, journals = files(tmp_path)
    assert written.keys() == KEYS
    assert policy.heads == result.policy.heads
    assert (policy.layers, policy.kv_heads) == (32, 8)
    assert not journals  # nothing is drawn: every option for all heads is tried
    assert len(set(policy.options())) == 1
    assert result.policy.name == policy.name == f"uniform {policy.heads[0][0].label}"
    assert "\npolicy: a\n" in (tmp_path / "policy.yaml").read_text()
    check_front(result, written)
    check_room(result)
    assert result.sequences > result.full_cache_sequences
    assert result.quality.source == "stand-in"
    assert written["quality"]["stand_in"] == "smollm2-135m"
    assert written["quality"]["tier"] == "stand-in band"
    document = read_policy(tmp_path / "policy.yaml")
    assert document.provenance is not None
    assert document.provenance.quality is not None
    assert document.provenance.quality.source == "stand-in"
    assert "smollm2-135m" in " ".join(result.notes)
    assert json.loads((tmp_path / "config.json").read_text())["shape"] == "llama-3.1-8b"


def test_baselines_take_the_same_bytes_and_the_plan_is_first(
    packaged: Tables, tmp_path: Path
) -> None:
    result = run_search(llama(tmp_path))
    assert [r.family for r in result.baselines][:1] == ["kvtune"]
    assert {r.family for r in result.baselines} == {"kvtune", "uniform", "pyramid", "adakv"}
    for baseline in result.baselines:
        assert baseline.prompt_bytes == result.prompt_bytes
        assert baseline.predicted.tier == "stand-in band"
        assert baseline.live is None
        assert baseline.predicted.low <= baseline.predicted.value <= baseline.predicted.high
    read = [r for r in result.baselines if r.family in FAMILIES]
    assert [r.name.split()[0] for r in read] == [r.family for r in read]
    curves = [r for r in result.baselines if r.family == "uniform"]
    share, interpolated = result.share, curves[0].predicted.value
    assert interpolated == pytest.approx(0.003 * (1 - share) / share, rel=0.5)


def test_searching_again_gives_the_same_plan(packaged: Tables, tmp_path: Path) -> None:
    first = run_search(llama(tmp_path))
    before = files(tmp_path)
    again = run_search(llama(tmp_path))
    assert files(tmp_path) == before
    assert again == first
    more = run_search(llama(tmp_path, trials=15))
    assert more.policy == first.policy  # without weights there are no trials


def test_asked_sequences_are_planned_for(packaged: Tables, tmp_path: Path) -> None:
    few = run_search(llama(tmp_path / "few", sequences=6))
    many = run_search(llama(tmp_path / "many", sequences=60))
    assert (few.sequences, many.sequences) == (6, 60)
    assert few.prompt_bytes > many.prompt_bytes
    assert few.predicted_quality.kl.value < many.predicted_quality.kl.value
    assert len(few.front) == len(many.front) == 1
    check_room(many)


def test_the_context_can_be_chosen_too(packaged: Tables, tmp_path: Path) -> None:
    """With four sequences fixed, looser quality buys longer prompts, never beyond the range."""
    found = [
        run_search(llama(tmp_path / f"{kl}", sequences=4, longest_context=65536, largest_kl=kl))
        for kl in (1e-4, 1.0)
    ]
    short, long = (result.context_tokens for result in found)
    assert 8192 <= short < long <= 65536
    for result in found:
        assert {point.context_tokens for point in result.front} <= set(result.request.contexts)
        assert result.budget.context_tokens == result.context_tokens
        check_room(result)


def test_what_cannot_fit_is_one_clear_error(packaged: Tables, tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match="no plan fits 9 sequences") as caught:
        run_search(llama(tmp_path, sequences=9, generated_tokens=100_000, trials=3))
    assert caught.value.hint is not None
    assert not (tmp_path / "policy.yaml").exists()


def test_a_search_that_finds_nothing_leaves_the_folder_as_it_was(
    packaged: Tables, tmp_path: Path
) -> None:
    run = write_study(tmp_path / "run", 5)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(KvtuneError, match="no plan fits 9 sequences"):
        run_search(llama(run, sequences=9, generated_tokens=100_000, trials=3))
    assert {path: path.read_bytes() for path in before} == before


def test_shapes_that_cannot_be_planned_are_refused_before_anything_is_written(
    packaged: Tables, tmp_path: Path
) -> None:
    shape = find_model("gemma3-27b")
    with pytest.raises(KvtuneError, match="sliding-window"):
        run_search(llama(tmp_path / "run", model=shape.name, shape=shape))
    assert not (tmp_path / "run").exists()


# A model of its own


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model's searches keep traces and tables for each other."""
    return tmp_path_factory.mktemp("cache")


class KilledError(BaseException):
    """Ends a search wherever it is, as a kill would: nothing catches it."""


WORK = (
    "kvtune.tuner.validate.run_live",
    "kvtune.tuner.validate.run_beside_full",
    "kvtune.simulator.quality.evaluate._replay_sample",
)


@dataclass
class Work:
    """Replays and live runs that a search does.

    Args:
        most: after so many the next one is the search's end; None for no end.
    """

    most: int | None = None
    done: int = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in WORK:
            module, function = name.rsplit(".", 1)
            original = getattr(importlib.import_module(module), function)
            monkeypatch.setattr(name, self._counted(original))

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            if self.done == self.most:
                raise KilledError
            found = original(*given, **more)
            self.done += 1
            return found

        return counted


@dataclass(frozen=True)
class Searched:
    """A search on the tiny model that has ended: read only.

    Args:
        request: what was asked.
        result: what was found.
        work: replays and live runs that it took.
    """

    request: SearchRequest
    result: SearchResult
    work: int

    def copied(self, run_dir: Path) -> SearchRequest:
        """The same question, whose answer lies in a folder of one's own."""
        shutil.copytree(self.request.run_dir, run_dir)
        return replace(self.request, run_dir=run_dir)


@pytest.fixture(scope="module")
def searched(saved_model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """The one search of ``own`` that tests of what comes after a search begin with."""
    request = of_own_weights(saved_model, tmp_path_factory.mktemp("searched") / "run")
    work = Work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvtune.traces.workloads.named_workload", lambda *_: little_workload())
        patch.setenv("KVTUNE_CACHE", str(cache))
        work.watch(patch)
        result = run_search(request)
    return Searched(request, result, work.done)


@pytest.fixture
def own(
    saved_model: Path,
    cache: Path,
    packaged: Tables,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> SearchRequest:
    """A search on the tiny model, with room for not quite one uncompressed prompt in pages."""
    from kvtune.traces import workloads

    monkeypatch.setattr(workloads, "named_workload", lambda *_: little_workload())
    monkeypatch.setenv("KVTUNE_CACHE", str(cache))
    return of_own_weights(saved_model, tmp_path / "run")


def test_a_menu_of_all_methods_is_captured_for_and_replayed(
    own: SearchRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LAPTOP", Menu(METHODS, (0.25,), alike((Bf16(),))))
    monkeypatch.setattr(sources, "MOST", len(every_method()))  # none is left out
    source = sources.own_trace(replace(own, menu="all"), Silent())
    assert source.trace is not None
    assert "reconstruction" in source.trace.manifest["signals"]
    named = {option.method for option in source.tables.options}
    weighted = {WeightedKeys(by=by) for by in ("snapkv", "h2o", "full")}
    assert named == {*every_method(calibrated=False), *weighted, Full()}
    assert (source.tables.loss >= 0).all()


def test_the_plan_runs_at_other_lengths_that_are_asked_for(
    own: SearchRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shorter prompts it keeps no fewer tokens; a length without enough text loses no search."""
    monkeypatch.setattr(sources, "LAPTOP", Menu(METHODS, (0.25,), alike((Bf16(),))))
    request = replace(own, lengths=(40, 10**6), sequences=1, run_dir=own.run_dir / "lengths")
    result = run_search(request)
    (there,) = result.other_lengths
    assert (there.prompt_tokens, there.samples, there.kl.tier) == (40, 4, "live")
    assert any("on prompts of 40 tokens the plan loses" in note for note in result.notes)
    (failed,) = [note for note in result.notes if "was not run on prompts" in note]
    assert "1 000 000 tokens" in failed
    assert "--lengths 1000000 tries it again" in failed
    assert (result.policy.budgets(40) >= np.minimum(result.policy.budgets(80), 40)).all()
    stored = read_result(request.run_dir / "result.json")
    assert stored.other_lengths == result.other_lengths
    document = read_policy(request.run_dir / "policy.yaml")
    assert document.provenance is not None
    assert document.provenance.other_lengths == {"40": there.kl.as_dict()}
    study = StudyReader(request.run_dir).read()
    card = as_markdown(card_of(study))
    assert "| loss at 40 tokens |" in card
    assert "--lengths 40,1000000" in card


def test_a_length_that_failed_is_tried_again_on_the_study_that_there_is(
    own: SearchRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in our own code loses no search; the same search then runs what is missing alone."""
    monkeypatch.setattr(sources, "LAPTOP", Menu(METHODS, (0.25,), alike((Bf16(),))))
    request = replace(own, lengths=(40,), sequences=1, run_dir=own.run_dir / "again")
    without_lengths = run_search(replace(request, lengths=None))
    work = Work()
    with pytest.MonkeyPatch.context() as patch:
        work.watch(patch)
        patch.setattr("kvtune.tuner.answer.run_at", out_of_order)
        first = run_search(request)
    assert work.done == 0  # the study, its replays and live runs are there
    assert first.other_lengths == ()
    assert any("RuntimeError, out of order. The same search" in note for note in first.notes)
    second = run_search(request)
    assert [at.prompt_tokens for at in second.other_lengths] == [40]
    assert not any("was not run on prompts" in note for note in second.notes)
    assert second.policy == first.policy == without_lengths.policy
    assert second.provenance["study"] == without_lengths.provenance["study"]
    third = Notes()
    assert run_search(request, third).other_lengths == second.other_lengths
    assert any("has ended before" in note for note in third.said)


def out_of_order(*_: object, **__: object) -> None:
    raise RuntimeError("out of order")


def test_a_search_in_16_bits_says_what_rounding_makes_of_its_losses(
    own: SearchRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by one pass a held-out sample; in the notes, the result's file and on the card."""
    passes = []

    def found(_: Any, sample: Any, __: Any, full: Any) -> torch.Tensor:
        passes.append(sample.split)
        return torch.full((2, len(full)), 0.125)  # the tiny model rounds too few numbers to differ

    monkeypatch.setattr(sources, "LAPTOP", Menu(METHODS, (0.25,), alike((Bf16(),))))
    monkeypatch.setattr("kvtune.tuner.validate.kl_of_rounding", found)
    monkeypatch.setattr("kvtune.traces.models.choose_dtype", lambda *_: ("bfloat16", "asked for"))
    result = run_search(replace(own, run_dir=own.run_dir / "16"))
    assert passes == ["evaluate"] * 2
    assert read_result(own.run_dir / "16" / "result.json").provenance[MEASURED] == 0.125
    (said,) = (note for note in result.notes if note.startswith("rounding: "))
    assert "itself by 0.12 nats a token" in said
    assert result.baselines[0].name in said
    assert said in as_markdown(card_of(StudyReader(own.run_dir / "16").read())).replace("\\", "")


def test_a_menu_that_nobody_named_is_settled_once_said_and_recorded(
    own: SearchRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second search with the menu's own name, or with none, is answered from the folder."""
    settled: list[SearchRequest] = []

    def settle(request: SearchRequest) -> tuple[SearchRequest, str]:
        settled.append(request)
        return replace(request, menu="three"), "methods: three, as the test says"

    monkeypatch.setattr(search, "with_menu", settle)
    first, second, named = Notes(), Notes(), Notes()
    auto = replace(own, menu="auto")
    run_search(auto, first)
    assert settled == [auto]
    assert "methods: three, as the test says" in first.said
    assert json.loads((own.run_dir / "config.json").read_text())["menu"] == "three"
    run_search(auto, second)
    run_search(own, named)
    for again in (second, named):
        assert any("its answer is read from" in note for note in again.said)
        assert "methods: three, as the test says" not in again.said


def test_a_search_that_limits_reading_keeps_to_it(
    own: SearchRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads may then hold everything and read little of it."""
    full = own.shape.kv_bytes(80)
    monkeypatch.setattr(sources, "LAPTOP", Menu(METHODS, (0.25,), alike((Bf16(),))))
    monkeypatch.setattr(sources, "READERS", (Quest(block=4),))
    request = replace(own, read_bytes=full // 2, sequences=1, run_dir=own.run_dir / "read")
    result = run_search(request)
    assert result.policy.read_bytes(80, own.shape.head_dim) <= full // 2
    assert any(note.startswith("reading: ") for note in result.notes)


@pytest.mark.full
def test_a_search_may_place_heads_on_the_host_and_keeps_to_what_may_come_over(
    own: SearchRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    head_dim, full = own.shape.head_dim, own.shape.kv_bytes(80)
    monkeypatch.setattr(sources, "LAPTOP", Menu(METHODS[:1], (0.25,), alike((Bf16(),))))
    monkeypatch.setattr(sources, "READERS", (Quest(block=4),))
    where = own.run_dir / "host"
    request = replace(own, moved_bytes=full // 2, sequences=1, run_dir=where)
    result = run_search(request)
    policy = result.policy
    assert 0 < policy.moved_bytes(80, head_dim) <= full // 2
    assert policy.host_bytes(80, head_dim) >= policy.moved_bytes(80, head_dim)
    assert any(note.startswith("host: ") for note in result.notes)
    assert read_policy(where / "policy.yaml").policy.uses_host  # type: ignore[union-attr]
    plan, *others = result.baselines
    allocated = [each for each in others if each.family in ("layers", "greedy")]
    assert plan.host_bytes > 0
    assert len(allocated) == 2
    for each in allocated:  # the plan's bytes in both places, all of them on the device
        assert not result.policies[str(each.policy)].uses_host
        assert plan.prompt_bytes < each.prompt_bytes <= plan.prompt_bytes + plan.host_bytes


@pytest.mark.full
def test_plans_that_follow_head_scores_are_among_the_plans(
    own: SearchRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "LAPTOP", Menu(METHODS, (0.25,), alike((Bf16(),))))
    scores = np.arange(6, dtype=np.float32).reshape(3, 2)
    about = {"retrieval": About("KV heads", "a test")}
    write_heads(HeadScores("tiny", "", {"retrieval": scores}, about), tmp_path / "heads")
    request = replace(own, heads=tmp_path / "heads", sequences=1, run_dir=own.run_dir / "heads")
    result = run_search(request)
    lines = (request.run_dir / "plans.jsonl").read_text().splitlines()[1:]
    rules = {json.loads(line)["parameters"].get("heads") for line in lines}
    assert rules == {None, "full", "pool"}
    assert result.quality.source == "own trace"
    wrong = HeadScores("tiny", "", {"retrieval": scores[:2]}, about)
    write_heads(wrong, tmp_path / "heads")
    with pytest.raises(KvtuneError, match="2 layers"):
        run_search(replace(request, run_dir=own.run_dir / "wrong"))


def test_a_stand_in_says_that_it_knows_three_methods(packaged: Tables, tmp_path: Path) -> None:
    result = run_search(llama(tmp_path / "run", menu="all", trials=4))
    assert any("--menu three" in note for note in result.notes)


def test_a_stand_in_says_which_options_change_nothing(packaged: Tables, tmp_path: Path) -> None:
    given = llama(tmp_path / "run", trials=60, jobs=4, workload="mixed")
    plain = run_search(llama(tmp_path / "plain", trials=60))
    found = run_search(given)
    assert [note for note in found.notes if note not in plain.notes] == [
        "options: --workload and --jobs change nothing with a stand-in, which draws no trials and "
        "runs no samples."
    ]
    assert (found.policy, found.quality) == (plain.policy, plain.quality)


def test_a_stand_in_says_what_a_step_would_bring_over_where_no_head_is_on_the_host(
    packaged: Tables, tmp_path: Path
) -> None:
    few = run_search(llama(tmp_path / "few", moved_bytes=10**5, context_tokens=2048))
    assert not few.policy.uses_host
    assert any("bring over what they read" in note for note in few.notes)
    many = run_search(llama(tmp_path / "many", moved_bytes=10**9, context_tokens=2048))
    assert many.policy.uses_host
    plan, *rivals = many.baselines
    held = plan.prompt_bytes + plan.host_bytes
    assert plan.host_bytes == many.policy.host_bytes(2048, many.request.shape.head_dim) > 0
    assert rivals  # of as many bytes, all of them on the device
    assert all(rival.prompt_bytes == pytest.approx(held, rel=0.03) for rival in rivals[:1])
    assert not any("bring over what they read" in note for note in many.notes)


def test_a_file_that_only_makes_reading_faster_does_not_undo_a_search(
    packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: StudyReader) -> None:
        raise KvtuneError("cannot write here")

    monkeypatch.setattr(StudyReader, "keep_columns", full_disk)
    result = run_search(llama(tmp_path))
    again = finished(result.request)
    assert again is not None
    assert again.quality == result.quality


def test_live_runs_follow_from_what_was_measured_of_and_fitted_to_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path))
    loaded: Any = types.SimpleNamespace(fingerprint="f" * 64, dtype="float32", device="cpu")
    trace: Any = types.SimpleNamespace(content_sha256="c0ffee")
    found = [sources._follow_from(loaded, trace)]
    keep_learned(loaded.fingerprint, {"rotation": torch.zeros(1, 2)})
    found.append(sources._follow_from(loaded, trace))
    keep_calibration(loaded.fingerprint, Calibration(((0.5,),), (0.1,), "a test"))
    found.append(sources._follow_from(loaded, trace))
    monkeypatch.setattr(sources, "version", lambda name: f"another {name}")
    found.append(sources._follow_from(loaded, trace))
    assert len({*map(repr, found)}) == len(found)


def test_a_search_for_a_stack_that_stores_answers_runs_its_plans_so(
    own: SearchRequest,
) -> None:
    """The loss is the stack's, in the result, in the policy file and on the way back from it."""
    result = run_search(replace(own, stack="vllm"))
    assert result.quality.stack == result.predicted_quality.stack == "vllm"
    ours = result.baselines[0].live
    assert ours is not None
    assert result.quality.kl.tier == "live"
    assert result.quality.kl.value > 1.2 * ours.value > 0
    written = read_policy(own.run_dir / "policy.yaml")
    assert written.provenance is not None
    assert written.provenance.quality is not None
    assert written.provenance.quality.stack == "vllm"
    assert read_result(own.run_dir / "result.json").quality == result.quality
    there = find_exporter("vllm")().export(written)
    assert there.keeps_loss
    assert there.loss == result.quality.kl
    assert "is what the plan loses by its prompt" not in there.files["REPORT.txt"]
    elsewhere = find_exporter("transformers")().export(written)
    assert elsewhere.loss is None
    rows = {row.name: row.loss for row in compared(written)}
    assert rows["kvtune"].startswith("less than in vllm, ")
    again = run_search(replace(own, stack="vllm"))
    assert again.quality == result.quality


def test_a_plan_for_a_stack_is_told_by_what_ran_as_the_stack_does(own: SearchRequest) -> None:
    """Not by kvtune's own runtime, in which it runs beside others: these are told as such."""
    result = run_search(replace(own, stack="vllm"))
    there = result.on_stack
    assert there is not None
    assert run_search(replace(own, stack="vllm")).plan == result.plan == there
    assert (there.live, there.predicted) == (result.quality.kl, result.predicted_quality.kl)
    assert there.live_by_kind.keys() == there.by_kind.keys()
    assert there.live_by_kind != result.baselines[0].live_by_kind
    assert verdict(result).retrieval == there.retrieval_accuracy
    study = StudyReader(own.run_dir).read()
    card = card_of(study)
    assert (card.stack, card.kl, card.retrieval) == ("vllm", there.live, there.retrieval_accuracy)
    assert {task.name: task.live for task in card.tasks} == there.live_by_kind
    assert {task.name: task.predicted for task in card.tasks} == there.by_kind
    markdown = as_markdown(card)
    assert "as vllm stores prompts and answers" in markdown
    assert "Other policies at equal bytes, in kvtune's own runtime" in markdown
    assert study.chosen is not None
    drawn = [each for _, _, each in live_kinds(study, study.chosen)]
    assert drawn == [each.live_by_kind for each in result.baselines]


def test_a_models_own_search_runs_the_plan_and_its_baselines_live(searched: Searched) -> None:
    result, run_dir = searched.result, searched.request.run_dir
    written, policy, _ = files(run_dir)
    assert written.keys() == KEYS
    assert (policy.layers, policy.kv_heads) == (3, 2)
    assert result.quality.source == "own trace"
    assert (result.quality.kl.tier, result.predicted_quality.kl.tier) == ("live", "table")
    assert result.quality.samples == 2
    assert result.quality.kl == result.baselines[0].live
    check_front(result, written)
    check_room(result)
    families = [r.family for r in result.baselines]
    assert families[0] == "kvtune"
    assert set(families) >= {"uniform", "adakv", "pyramid", "greedy"}
    for baseline in result.baselines:
        # An allocator may leave groups that are not full, whose scales are whole all the same.
        assert baseline.prompt_bytes <= 1.03 * result.prompt_bytes
        assert baseline.live is not None
        assert baseline.live.tier == "live"
        assert baseline.live.value >= 0  # a plan that keeps all loses exactly nothing
        assert baseline.live_by_kind.keys() == baseline.by_kind.keys()
        assert {loss.tier for loss in baseline.live_by_kind.values()} == {"live"}
    read = read_result(run_dir / "result.json").baselines
    assert [row.live_by_kind for row in read] == [row.live_by_kind for row in result.baselines]
    assert [row.by_kind for row in read] == [row.by_kind for row in result.baselines]
    assert all(e.low <= e.value <= e.high for row in read for e in row.by_kind.values())
    assert (result.times, result.untimed) == (None, None)  # no GPU
    assert MEASURED not in result.provenance  # float32
    assert not any(note.startswith("rounding: ") for note in result.notes)
    assert result.counters["tokens_offered"] == 2 * 80 * 6
    assert 0 < result.counters["tokens_kept"] <= result.counters["tokens_offered"]
    assert result.quality.kl.value > 0 or result.counters["heads_that_evicted"] == 0
    assert written["provenance"]["trace"] == result.provenance["trace"]


def test_a_second_search_uses_trace_and_tables_again(
    own: SearchRequest, searched: Searched, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtune.simulator.quality import build
    from kvtune.traces import capture

    first, own = searched.result, searched.copied(own.run_dir)
    before = files(own.run_dir)
    monkeypatch.setattr(capture, "run_prompt", lambda *_: pytest.fail("captured again"))
    monkeypatch.setattr(build, "build_tables", lambda *_, **__: pytest.fail("built again"))
    again = run_search(own)
    assert again.policy.heads == first.policy.heads
    assert files(own.run_dir)[1:] == before[1:]
    shape = own.shape
    other = run_search(replace(own, memory_bytes=own.memory_bytes + shape.kv_bytes(80)))
    assert other.budget.cache_bytes > first.budget.cache_bytes


def test_weights_of_another_shape_are_refused(own: SearchRequest) -> None:
    with pytest.raises(KvtuneError, match="head_dim"):
        run_search(replace(own, shape=replace(own.shape, kv_heads=1, cache=())))


def test_a_stand_in_can_be_asked_for_where_weights_are_at_hand(own: SearchRequest) -> None:
    result = run_search(replace(own, stand_in=True))
    assert result.quality.source == "stand-in"
    assert "asked for" in " ".join(result.notes)


def test_texts_of_ones_own_that_are_too_short_are_told_and_no_stand_in_takes_their_place(
    packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_short(*_: Any) -> None:
        raise KvtuneError("the user text is enough for 1 samples of 1024 tokens, not 3")

    monkeypatch.setattr("kvtune.tuner.which_source.own_trace", too_short)
    known = {"model": "smollm2-135m", "shape": find_model("smollm2-135m")}
    with pytest.raises(KvtuneError, match="enough for 1 samples"):
        run_search(llama(tmp_path / "own", texts=(tmp_path / "mine.txt",), **known))
    assert not (tmp_path / "own" / "result.json").exists()
    assert run_search(llama(tmp_path / "built in", **known)).quality.source == "stand-in"


OTHER_CARD = "the GPU of this machine is no RTX 4090, which the plan is for"


@pytest.mark.parametrize(
    ("device", "here", "called", "untimed"),
    [
        ("cpu", "4090", 0, None),
        ("cuda:0", "h100", 0, OTHER_CARD),
        ("cuda:0", None, 0, OTHER_CARD),
        ("cuda:0", "4090", 1, "the runtime stores no kitty"),
    ],
)
def test_the_plan_is_timed_as_validate_would_on_the_card_it_is_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    here: str | None,
    called: int,
    untimed: str | None,
) -> None:
    from kvtune.tuner import answer, timing

    asked: list[Any] = []

    def time_plan(policy: Any, loaded: Any, shape: Any, samples: Any, **serving: Any) -> Any:
        asked.append((policy, shape, samples, serving))
        raise KvtuneError("the runtime stores no kitty")

    request = llama(tmp_path)
    monkeypatch.setattr(timing, "time_plan", time_plan)
    monkeypatch.setattr(timing, "detect_gpu", lambda: here and find_gpu(here))
    source: Any = types.SimpleNamespace(
        loaded=types.SimpleNamespace(device=device),
        trace=types.SimpleNamespace(of_split=lambda split: (split,)),
    )
    chosen: Any = types.SimpleNamespace(sequences=7, context=4096, place=("bf16", 4096))
    budget = types.SimpleNamespace(limit_bytes=10**9, weight_format="bf16")
    found: Any = types.SimpleNamespace(
        request=request, source=source, budgets={("bf16", 4096): budget}
    )
    cost: Any = types.SimpleNamespace(memory=exact(9e8, "B"))
    times, reason = answer._times(found, "the plan", chosen, cost, Silent())  # type: ignore[arg-type]
    assert (times, reason) == (None, untimed)
    printed = timing.Served(7, 4096, request.generated_tokens, 10**9, cost.memory)
    serving = {"batch": 7, "context_tokens": 4096, "largest": None, "served": printed}
    assert asked == called * [("the plan", request.shape, ("evaluate",), serving)]


@pytest.mark.parametrize(
    ("device", "here", "begun"), [("cpu", "4090", 0), ("cuda", "h100", 0), ("cuda", "4090", 1)]
)
def test_kernels_are_compiled_ahead_only_for_a_plan_that_will_be_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, here: str, begun: int
) -> None:
    from kvtune.tuner import answer, timing

    monkeypatch.setattr(timing, "detect_gpu", lambda: find_gpu(here))
    loaded, compiled = types.SimpleNamespace(device=device), []
    beside = types.SimpleNamespace(
        compiles_for=lambda device: device.startswith("cuda"),
        compile=lambda policies, model, progress: compiled.append(policies),
    )
    plan = Policy.uniform(Option(SnapKV(), Budget(share=0.25)), 2, 2)
    found: Any = types.SimpleNamespace(
        request=llama(tmp_path),
        source=types.SimpleNamespace(loaded=loaded, beside=beside, trace=object()),
        solver=types.SimpleNamespace(policy=lambda likely: plan),
    )
    answer.begin_compiling(found, types.SimpleNamespace(), Silent())  # type: ignore[arg-type]
    assert [each[0] for each in compiled] == begun * [plan]


def _as_files(folder: Path) -> dict[str, bytes]:
    """All that is answered, without what names the moment."""
    kept = ("result.json", "policy.yaml", "plans.jsonl", "plans.safetensors", "finished.json")
    return {name: (folder / name).read_bytes() for name in kept}


def test_a_finished_search_answers_from_its_folder(packaged: Tables, tmp_path: Path) -> None:
    request = llama(tmp_path / "run")
    first = run_search(request)
    written, plans = _as_files(request.run_dir), request.run_dir / "plans.jsonl"
    before = plans.stat().st_mtime_ns  # a second search would write it again
    again = run_search(request)
    assert again == first
    assert _as_files(request.run_dir) == written
    assert plans.stat().st_mtime_ns == before


def test_another_question_or_an_edited_plan_is_searched_again(
    packaged: Tables, tmp_path: Path
) -> None:
    request = llama(tmp_path / "run")
    run_search(request)
    written = _as_files(request.run_dir)
    (request.run_dir / "policy.yaml").write_text("edited")
    run_search(request)
    assert _as_files(request.run_dir) == written
    (request.run_dir / "finished.json").write_text("[]")
    run_search(request)
    assert _as_files(request.run_dir) == written
    run_search(replace(request, trials=request.trials + 1))
    assert _as_files(request.run_dir)["finished.json"] != written["finished.json"]


def test_a_search_stopped_before_its_end_is_the_uninterrupted_one(
    own: SearchRequest, searched: Searched
) -> None:
    """As a kill after the study leaves it, and one that leaves half a line of the journal."""
    own = searched.copied(own.run_dir)
    written = _as_files(own.run_dir)
    for name in ("finished.json", "result.json"):
        (own.run_dir / name).unlink()
    journal = next(own.run_dir.glob("*.journal"))
    journal.write_bytes(journal.read_bytes()[:-20])
    run_search(own)
    assert _as_files(own.run_dir) == written


def test_a_search_that_is_taken_up_again_replays_and_runs_nothing_twice(
    own: SearchRequest, searched: Searched, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert searched.work > 10
    for killed_after in (1, searched.work // 2, searched.work - 1):
        request = replace(own, run_dir=own.run_dir.with_name(f"killed-{killed_after}") / "run")
        begun, resumed = Work(killed_after), Work()
        with monkeypatch.context() as patch:
            begun.watch(patch)
            with pytest.raises(KilledError):
                run_search(request)
        with monkeypatch.context() as patch:
            resumed.watch(patch)
            run_search(request)
        assert resumed.done == searched.work - killed_after
        assert _as_files(request.run_dir) == _as_files(searched.request.run_dir)


def test_few_trials_are_never_worse_than_no_compression(packaged: Tables, tmp_path: Path) -> None:
    result = run_search(replace(llama(tmp_path), trials=1))
    assert result.sequences >= result.full_cache_sequences > 0
    assert any(point.kl == 0 for point in result.front)
    assert result.front[0].kl <= result.request.largest_kl


def test_two_searches_do_not_write_one_folder(packaged: Tables, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(KvtuneError, match="is writing here"):
        run_search(llama(tmp_path))


@pytest.mark.parametrize(
    ("stored", "mark"),
    [("h2o kitty+4", " (simulated only)"), ("full gear", " (simulated only)"), ("full int3", ""),
     ("h2o(recent_share=0.1) int4+4", ""), ("streaming_llm bf16", "")],
)  # fmt: skip
def test_a_rule_that_cannot_run_says_so(stored: str, mark: str) -> None:
    from kvtune.tuner.stand_in_baselines import _unless_it_runs

    assert _unless_it_runs(stored) == mark
