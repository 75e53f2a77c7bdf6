"""What ``kvtune search`` prints, on made-up results: the search itself is tested elsewhere.

Remake the golden texts with ``KVTUNE_REMAKE_GOLDEN=1 pytest tests/test_cli_search.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Group

from kvtune.__main__ import main
from kvtune.cli import search_report
from kvtune.cli.layout import Grid
from kvtune.common.estimate import BAND, Estimate
from kvtune.common.progress import Progress
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.llama_cpp import Q4
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    ModelFacts,
    PolicyDocument,
    Provenance,
    as_plain,
    read_policy,
    write_policy,
)
from kvtune.policies.policy_file.document import Quality as FileQuality
from kvtune.simulator.memory.plan import memory_plan
from kvtune.tests import made_up
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import Baseline, FrontPoint, Quality, SearchResult
from kvtune.tuner.search_options import SearchOptions, search_request

GOLDEN = Path(__file__).parent / "golden" / "cli"
WORDS = ["search", "--model", "llama-8b", "--gpu", "4090", "--mem", "16GB", "--run-dir", "run"]


def kl(value: float, tier: Any = "replay") -> Estimate:
    return Estimate(value, 0.75 * value, 1.4 * value, "nats/token", tier)


def seconds(value: float) -> Estimate:
    return Estimate(value, 0.8 * value, 1.25 * value, "s", "datasheet")


def baseline(name: str, family: str, loss: float, live: bool) -> Baseline:
    ratio = Estimate(0.9 - loss, 0.85 - loss, 0.93 - loss, "share", "live")
    change = Estimate(loss, loss / 2, 2 * loss, "ratio", "live")
    measured = (kl(1.2 * loss, "live"), 64_000_000, change, ratio)
    return Baseline(
        name,
        family,
        kl(loss, "replay" if live else BAND),
        *(measured if live else (None, 64_000_000)),
    )


def result_of(request: SearchRequest, live: bool) -> SearchResult:
    """Plain figures; ``live`` as if weights had been at hand."""
    option = Option(SnapKV(), Budget(share=0.25), Int4(), Int4())
    policy = Policy.uniform(option, request.shape.layers, request.shape.kv_heads, name="plan")
    source: Literal["own trace", "stand-in"] = "own trace" if live else "stand-in"
    stand_in = "" if live else "smollm2-135m"
    found = Quality(kl(0.0103, "live" if live else BAND), source, stand_in, samples=8)
    names = {
        "kvtune plan" if live else "uniform snapkv 25% int4": ("kvtune", 0.0086),
        **({"per layer": ("layers", 0.015), "greedy per head": ("greedy", 0.012)} if live else {}),
        "uniform h2o int4": ("uniform", 0.077), "pyramid snapkv int4": ("pyramid", 0.081),
        "adakv snapkv int4": ("adakv", 0.078),
    }  # fmt: skip
    budget = memory_plan(
        request.shape, request.gpu, request.memory_bytes, context_tokens=request.context_tokens
    )
    document = PolicyDocument(
        policy,
        ModelFacts(request.shape.name, policy.layers, policy.kv_heads, request.shape.head_dim),
        Provenance(FileQuality(source, stand_in, found.kl), kvtune="0.1.0"),
    )
    request.run_dir.mkdir(exist_ok=True)
    (request.run_dir / "policy.yaml").write_text(write_policy(document))
    return SearchResult(
        request=request,
        budget=budget,
        front=tuple(point(n, n == 48, live) for n in (4, 48, 96)),
        policy=policy,
        policies={"policy.yaml": policy},
        context_tokens=request.context_tokens,
        prompt_bytes=64_000_000,
        sequences=48,
        sequence_bytes=104_857_600,
        share=0.0596,
        quality=found,
        predicted_quality=dataclasses.replace(found, kl=kl(0.0086, "table" if live else BAND)),
        baselines=tuple(baseline(name, *figures, live) for name, figures in names.items()),
        memory=Estimate(15.1e9, 14.2e9, 15.8e9, "B", "assumed"),
        latency=seconds(0.0312),
        prefill=seconds(0.64),
        compression=seconds(0.05),
        full_cache_sequences=5,
        full_cache_accuracy=Estimate(0.94, 0.91, 0.96, "share", "live") if live else None,
        counters={"tokens_kept": 51200, "tokens_offered": 409600} if live else {},
        notes=("fp8 weights: the widest that leave room for a cache",),
        provenance={"seed": request.seed, "kvtune": "0.1.0"},
    )


def point(sequences: int, chosen: bool, live: bool) -> FrontPoint:
    rate = Estimate(1540.0, 1230.0, 1920.0, "tokens/s", "datasheet")
    loss, share = 2e-4 * sequences, 2.86 / sequences
    parameters: dict[str, Any] = {"split": "heads"}
    band = None
    if not live:
        parameters, band = {"uniform": "snapkv 25% int4"}, kl(loss, BAND)
    return FrontPoint(
        *(loss, 8192, sequences, 64_000_000, share, seconds(0.0312), rate, parameters, "fp8"),
        chosen=chosen,
        band=band,
        unseen=kl(1.2 * loss) if live else None,
    )


@pytest.fixture(params=[False, True], ids=["stand-in", "live"])
def live(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    """Puts a made-up search in the place of the real one."""
    stub = types.ModuleType("kvtune.tuner.search")

    def run_search(asked: SearchRequest, progress: Progress) -> SearchResult:
        print("a library chatters on stdout")
        list(progress.track(range(2), "searching", 2))
        return result_of(asked, request.param)

    stub.run_search = run_search  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvtune.tuner.search", stub)
    monkeypatch.chdir(tmp_path)
    return bool(request.param)


def test_the_tables_are_the_golden_ones(
    live: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # processes of a parallel run have one
    assert main(WORDS) == 0
    text = capsys.readouterr().out.replace("a library chatters on stdout\n", "")
    path = GOLDEN / f"search-{'live' if live else 'stand-in'}.txt"
    if os.environ.get("KVTUNE_REMAKE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_losses_of_different_estimators_never_share_a_column(tmp_path: Path) -> None:
    """The plan is predicted from tables and ran; of the others one is replayed, one is a band."""
    request = search_request("llama-8b", "4090", mem="16GB", run_dir=tmp_path / "run")
    rows = (
        Baseline("plan", "kvtune", kl(0.0111, "table"), kl(0.0222, "live"), 64_000_000),
        Baseline("first", "uniform", kl(0.0333), None, 64_000_000),
        Baseline("second", "pyramid", kl(0.0444, BAND), None, 64_000_000),
    )
    result = dataclasses.replace(result_of(request, live=True), baselines=rows)
    shown = next(
        part
        for each in search_report.tables(result) if isinstance(each, Group)
        for part in each.renderables if isinstance(part, Grid) and "plan" in str(part.rows)
    )  # fmt: skip
    rows_shown = [dict(zip(shown.columns, row, strict=True)) for row in shown.rows]
    losses = [{c: cell for c, cell in row.items() if c.startswith("KL")} for row in rows_shown]
    filled = [{column for column, cell in row.items() if cell != "-"} for row in losses]
    assert filled == [{"KL, live", "KL, table"}, {"KL, replay"}, {f"KL, {BAND}"}]
    assert losses[0]["KL, table"].startswith("0.0111")


def test_every_table_names_the_quality_and_fits_a_page(
    live: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    main(WORDS)
    lines = capsys.readouterr().out.splitlines()
    words = "own trace" if live else "stand-in (smollm2-135m)"
    quality = [line for line in lines if line.startswith("quality: ")]
    assert len(quality) == 4
    assert all(line.startswith(f"quality: {words}") for line in quality)
    assert max(map(len, lines)) <= 100


def test_what_is_left_for_the_cache_is_said_before_the_search(
    live: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    main(WORDS)
    err = capsys.readouterr().err
    assert err.index("are left for the cache") < err.index("searching ...")


def test_the_verdict_comes_first(live: bool, capsys: pytest.CaptureFixture[str]) -> None:
    main(WORDS)
    out = capsys.readouterr().out.replace("a library chatters on stdout\n", "")
    first, _, scale = " ".join(out.split("\n\n")[0].split()).partition(" Scale, ")
    assert "loses 0.36" in scale
    loss = "0.01" if live else "0.0077 to 0.014"
    assert first.startswith(
        "48 prompts of 8 192 tokens instead of 5 in 16 GB with fp8 weights, whose "
        f"own loss is not counted, at {loss} nats per token"
    )
    assert first.endswith(
        "(measured live); needles 95 % of the full cache's"
        if live
        else "(predicted from smollm2-135m, which stands in for the model)"
    )
    close = "The plan is not shown to be better than greedy per head"
    assert (close in out) == live  # without weights no plan of single heads is compared


@pytest.mark.parametrize("columns", [60, 72, 80, 100, 120])
def test_nothing_is_cut_at_any_width(
    live: bool, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every word of the widest form is there in a narrow one, and the command is one line."""
    monkeypatch.setenv("COLUMNS", "300")
    main(WORDS)
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(columns))
    main(WORDS)
    out = capsys.readouterr().out
    assert sorted(out.split()) == sorted(wide.split())
    (command,) = [line for line in out.splitlines() if line.startswith("next: ")]
    assert command in wide.splitlines()
    if columns >= 80:
        assert max(len(line) for line in out.splitlines() if line != command) <= columns


def test_json_holds_the_plan_and_nothing_else_is_on_stdout(
    live: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*WORDS, "--json"])
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["plan"] == json.loads(json.dumps(as_plain(read_policy(Path("run/policy.yaml")))))
    for key in ("value", "interval", "unit", "tier"):
        assert key in answer["memory"]
        assert key in answer["latency"]
    assert answer["quality"]["kl_nats_per_token"] == 0.0103
    assert answer["quality"]["source"] == ("own trace" if live else "stand-in")
    assert answer["quality"]["stand_in"] == (None if live else "smollm2-135m")
    assert {each["family"] for each in answer["baselines"]} >= {"uniform", "pyramid", "adakv"}
    assert [point["chosen"] for point in answer["front"]] == [False, True, False]
    assert "searching ..." in captured.err
    assert "left for the cache" in captured.err
    assert answer["verdict"].startswith("48 prompts")


def test_quiet_json_talks_not_at_all(live: bool, capsys: pytest.CaptureFixture[str]) -> None:
    main([*WORDS, "--json", "--quiet"])
    captured = capsys.readouterr()
    assert captured.err == "a library chatters on stdout\n"
    assert json.loads(captured.out)["run_dir"] == "run"


def test_every_documented_key_is_there(live: bool, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    import kvtune

    page = (Path(kvtune.__file__).parent / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split("## kvtune search\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    main([*WORDS, "--json", "--quiet"])
    assert json.loads(capsys.readouterr().out).keys() == documented | {"command", "kvtune"}


def test_the_request_is_what_was_asked(
    live: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[SearchRequest] = []

    def run_search(request: SearchRequest, progress: Progress) -> SearchResult:
        asked.append(request)
        return result_of(request, live)

    monkeypatch.setattr(sys.modules["kvtune.tuner.search"], "run_search", run_search)
    text = tmp_path / "mine.txt"
    text.write_text("words")
    main([*WORDS[:7], "--context", "16k", "--batch", "4", "--max-kl", "0.1", "--text", str(text)])
    (request,) = asked
    assert (request.shape.name, request.gpu.slug) == ("llama-3.1-8b", "rtx-4090")
    assert request.memory_bytes == 16 * 10**9
    assert (request.context_tokens, request.sequences) == (16384, 4)
    assert request.largest_kl == 0.1
    assert request.texts == (text,)
    assert request.run_dir == Path("kvtune-runs/llama-3.1-8b-rtx-4090-16gb-16k-batch-4-kl-0.1")
    assert request.contexts == (16384,)
    main([*WORDS[:7], "--context", "3k-13k"])
    assert asked[1].contexts == (3072, 6144, 12288, 13312)


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ({}, "llama-3.1-8b-rtx-4090-16gb"),
        ({"context": "8k"}, "llama-3.1-8b-rtx-4090-16gb"),
        ({"context": "32k"}, "llama-3.1-8b-rtx-4090-16gb-32k"),
        ({"context": "8k-32k"}, "llama-3.1-8b-rtx-4090-16gb-8k-32k"),
        ({"moved_bytes": "1.5 GB"}, "llama-3.1-8b-rtx-4090-16gb-moved-1.5gb"),
        ({"batch": 60, "ttft": "2s"}, "llama-3.1-8b-rtx-4090-16gb-batch-60-ttft-2s"),
        ({"max_kl": 0.02, "weights": "auto"}, "llama-3.1-8b-rtx-4090-16gb"),
        (
            {"max_kl": 0.5, "weights": "bf16,int4"},
            "llama-3.1-8b-rtx-4090-16gb-weights-bf16-int4-kl-0.5",
        ),
        ({"read_bytes": "50MB"}, "llama-3.1-8b-rtx-4090-16gb-read-50mb"),
        ({"stack": "vllm"}, "llama-3.1-8b-rtx-4090-16gb-for-vllm"),
    ],
)
def test_searches_that_ask_for_something_else_do_not_share_a_folder(
    options: SearchOptions, folder: str
) -> None:
    request = search_request("llama-8b", "4090", "16GB", **options)
    assert request.run_dir == Path("kvtune-runs") / folder


@pytest.mark.parametrize(
    ("model", "generated", "context"),
    [("llama-8b", 256, 8192), ("smollm2-135m", 256, 7936), ("smollm2-135m", 8192, 8192)],
)
def test_prompts_that_are_not_asked_for_leave_room_for_what_is_generated(
    model: str, generated: int, context: int
) -> None:
    request = search_request(model, "4090", generated=generated, stand_in=True)
    assert request.context_tokens == context
    assert request.run_dir.name == f"{request.shape.name}-rtx-4090-all"


@pytest.mark.parametrize(
    ("context", "told"),
    [("64k-4k", "write --context 4k-64k"), ("4k-", "no number"), ("8k-999k", "is the most")],
)
def test_a_wrong_range_of_contexts_is_told(
    live: bool, capsys: pytest.CaptureFixture[str], context: str, told: str
) -> None:
    assert main([*WORDS[:7], "--context", context]) == 2
    assert told in capsys.readouterr().err


def test_times_of_the_plan_come_after_it_and_their_absence_is_told(
    live: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = sys.modules["kvtune.tuner.search"]
    original = stub.run_search

    def said(**changes: Any) -> str:
        def run_search(asked: SearchRequest, progress: Progress) -> SearchResult:
            found: SearchResult = original(asked, progress)
            return dataclasses.replace(found, **changes)

        monkeypatch.setattr(stub, "run_search", run_search)
        assert main(WORDS) == 0
        return capsys.readouterr().out

    timed, plain = said(times=made_up.times(largest=False)), said()
    plan, whole = timed.index("\n  decode step"), timed.rindex("\n  decode step")
    assert timed.index("prefill of a prompt") < plan < timed.index("\nuncompressed") < whole
    assert "decode step" not in plain
    assert "times:" not in plain
    assert "times: another card" in said(untimed="another card")


def test_other_texts_than_the_searchs_are_told_with_what_they_cost(tmp_path: Path) -> None:
    from kvtune.cli.validate_report import other_texts
    from kvtune.tuner.validate import Validation

    folder = made_up.write_study(tmp_path / "run", live=True)

    def run(**losses: float) -> Validation:
        by_kind = {kind: kl(loss, "live") for kind, loss in losses.items()}
        return Validation(kl(0.1, "live"), None, None, None, 1, 2, by_kind=by_kind)

    path = folder / "result.json"
    assert other_texts(path, run(code=0.1, prose=0.1)) is None
    told = other_texts(path, run(code=0.1, prose=0.1, user=0.3))
    assert told is not None
    assert "run here on user" in told
    assert "3 times as much" in told
    assert "0.3 nats a token" in str(other_texts(path, run(user=0.3)))
    assert other_texts(tmp_path / "none.json", run(user=0.3)) is None


def test_the_next_step_is_one_that_works(
    live: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the stack that was searched for; and no export where heads lie on the host."""

    def next_line(*more: str) -> str:
        main([*WORDS, *more])
        return capsys.readouterr().out.split("\nnext: ")[1]

    assert "--to llama-cpp --out run/llama-cpp" in next_line("--for", "llama-cpp")
    stub = sys.modules["kvtune.tuner.search"]
    option = Option(SnapKV(), Budget(share=0.25), Int4(), Int4(), tier="host")

    def run_search(asked: SearchRequest, progress: Progress) -> SearchResult:
        found = result_of(asked, live)
        policy = Policy.uniform(option, found.policy.layers, found.policy.kv_heads)
        return dataclasses.replace(found, policy=policy)

    monkeypatch.setattr(stub, "run_search", run_search)
    said = next_line()
    assert said.startswith("kvtune.load_cache('run/policy.yaml', model)")
    assert "kvtune export" not in said


def test_a_stack_that_stores_answers_likewise_has_a_loss_of_its_own(
    live: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Q4(rotation="hadamard")

    def run_search(asked: SearchRequest, progress: Progress) -> SearchResult:
        found = result_of(asked, live)
        policy = Policy.uniform(Option(keys=form, values=form), 32, 8)
        return dataclasses.replace(found, policy=policy)

    def rows(*more: str) -> list[str]:
        main([*WORDS, *more])
        return [x for x in capsys.readouterr().out.splitlines() if x.startswith("in llama.cpp")]

    assert rows("--for", "llama-cpp") == []  # integers of kvtune's own
    monkeypatch.setattr(sys.modules["kvtune.tuner.search"], "run_search", run_search)
    assert rows() == []
    assert len(rows("--for", "llama-cpp")) == 1
    main([*WORDS, "--for", "llama-cpp"])
    said = " ".join(capsys.readouterr().out.split())
    assert "; in llama.cpp, which stores answers likewise, at 0.031 to 0.11" in said
