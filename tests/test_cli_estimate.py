"""Estimates of several cards, contexts and batches: what fits, what would, and what it costs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from kvtune.__main__ import main
from kvtune.policies.policy import label_of
from kvtune.policies.policy_file.named import read_named

LLAMA = ["estimate", "--model", "llama-8b"]


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main([*LLAMA, *words, "--json", "--quiet"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_does_not_fit_is_told_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--gpu", "4090", "--context", "32k", "--batch", "20")
    found = answer(capsys, *asked, code=3)
    assert not found["fits"]
    would = dict(words.split(" ", 1) for words in found["would_fit"] if words.startswith("--"))
    assert set(would) == {"--batch", "--context", "--gpu"}
    for option, value in would.items():
        place = asked.index(option)
        mended = (*asked[:place], option, value, *asked[place + 2 :])
        assert answer(capsys, *mended)["fits"]
    more = (*asked[:-1], str(int(would["--batch"]) + 1))
    assert not answer(capsys, *more, code=3)["fits"]
    main([*LLAMA, *asked])
    assert capsys.readouterr().out.startswith("does not fit: 20 x 32 768 tokens")


def test_narrower_weights_are_named_where_they_would_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("--gpu", "l4", "--context", "32k", "--batch", "2")
    found = answer(capsys, *asked, code=3)
    (mended,) = [words.split() for words in found["would_fit"] if "--weights" in words]
    assert mended == ["--weights", "fp8"]
    assert answer(capsys, *asked, *mended)["fits"]

    main([*LLAMA, "--gpu", "l4,h100", *asked[2:]])
    assert "would fit with --weights fp8: l4\n" in capsys.readouterr().out
    main([*LLAMA, "--gpu", "l4,h100", *asked[2:], *mended])
    assert "would fit" not in capsys.readouterr().out


def test_memory_and_the_most_at_once_have_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpu", "4090,h100", "--context", "8k")
    row = answer(capsys, *words)["rows"][0]
    most, (low, high) = row["most_at_once"]["value"], row["most_at_once"]["interval"]
    assert low <= most == row["sequences_that_fit"] <= high
    assert low < high
    main([*LLAMA, *words])
    table = capsys.readouterr().out
    assert f"{most} [{low}, {high}]" in table
    peak = [row["memory"]["value"], *row["memory"]["interval"]]
    assert "{:.2f} [{:.2f}, {:.2f}]".format(*(size / 2**30 for size in peak)) in table


def test_a_batch_beyond_everything_names_the_largest_that_works(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*LLAMA, "--gpu", "4090", "--context", "1k", "--batch"]
    assert main([*words, "500"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    most = int(captured.err.split("--batch ")[1].split()[0])
    assert main([*words, str(most)]) in (0, 3)
    assert "error" not in capsys.readouterr().err
    assert main([*words, str(most + 1)]) == 3
    assert "error: llama-3.1-8b does not fit" in capsys.readouterr().err


def test_a_sweep_is_the_single_estimates_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "--gpu", "h100,4090", "--context", "8k,32k", "--batch", "1,8")["rows"]
    assert [row["gpu"] for row in rows] == ["rtx-4090"] * 4 + ["h100-sxm"] * 4
    assert [(r["context_tokens"], r["batch"]) for r in rows[:4]] == [
        (8192, 1), (8192, 8), (32768, 1), (32768, 8),
    ]  # fmt: skip
    row = rows[2]
    alone = answer(capsys, "--gpu", "4090", "--context", "32k", "--batch", "1")
    assert row == alone["rows"][0]
    assert row["latency"] == alone["policies"][0]["latency"]
    each = row["tokens_per_second_per_user"]["value"]
    assert each * row["latency"]["value"] == pytest.approx(1)


def test_any_card_is_every_card_those_that_fit_first_by_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from kvtune.profiles.gpus import list_gpus

    rows = answer(capsys, "--gpu", "any", "--context", "32k", "--batch", "8")["rows"]
    assert {row["gpu"] for row in rows} == {gpu.slug for gpu in list_gpus()}
    order = [(not row["fits"], row["limit_bytes"]) for row in rows]
    assert order == sorted(order)
    assert {row["fits"] for row in rows} == {False, True}
    for row in rows:
        taken = row["memory"] and row["memory"]["value"]  # none where not even weights fit
        assert row["fits"] == (taken is not None and taken <= row["limit_bytes"])


def test_the_cost_is_the_price_over_what_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "--gpu", "4090,h100", "--price-per-hour", "0.36,3.6")["rows"]
    for row, price in zip(rows, (0.36, 3.6), strict=True):
        cost, rate = row["cost_per_million_tokens"], row["tokens_per_second"]
        assert cost["value"] == pytest.approx(price / 3600 / rate["value"] * 1e6)
        assert cost["interval"][0] == pytest.approx(price / 3600 / rate["interval"][1] * 1e6)


def test_csv_holds_the_figures_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpu", "4090", "--batch", "1,500")
    rows = answer(capsys, *words)["rows"]
    assert main([*LLAMA, *words, "--format", "csv"]) == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(read[0]["memory_bytes"]) == pytest.approx(rows[0]["memory"]["value"], rel=1e-5)
    assert [line["fits"] for line in read] == ["True", "False"]
    assert read[1]["memory_bytes"] == ""
    assert "does not fit" in rows[1]["reason"]


def test_markdown_has_a_row_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LLAMA, "--gpu", "4090,h100", "--batch", "1,8", "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1


def test_prompt_and_generated_beyond_the_models_length_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (note,) = answer(capsys, "--gpu", "h100", "--context", "128k")["notes"]
    assert "--context 130816 leaves room" in note
    assert answer(capsys, "--gpu", "h100", "--context", "130816")["notes"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch", "1,,8"), "lists something empty"),
        (("--batch", "0"), "no number of sequences"),
        (("--batch", "1,x"), "no number of sequences"),
        (("--context", "8k,999k"), "is the most"),
        (("--gpu", "4090,h1000"), "h100"),
        (("--price-per-hour", "1,2"), "2 prices for 1 card"),
        (("--price-per-hour", "-1"), "no price"),
        (("--price-per-hour", "nan"), "no price"),
    ],
)
def test_mistakes_in_lists_are_told(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LLAMA, *(() if "--gpu" in words else ("--gpu", "4090")), *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err + captured.out
    assert captured.out == ""


def test_shells_complete_the_names_of_cards_and_models() -> None:
    from kvtune.cli.options import known_gpus, known_models

    assert "h100-sxm" in known_gpus("h1")
    assert known_gpus("4090,h200") == ["4090,h200"]
    assert "any" in known_gpus("an")
    assert "llama-3.1-8b" in known_models("llama")


def test_all_cards_together_are_copies_that_share_the_sequences(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--gpu", "h100", "--batch", "10", "--price", "2")
    rows = answer(capsys, *words, "--total-gpus", "4")["rows"]
    assert [(row["copies"], row["gpus"]) for row in rows] == [(4, 1), (2, 2), (1, 4)]
    alone = answer(capsys, "--gpu", "h100", "--batch", "3")["rows"][0]
    assert rows[0]["latency"] == alone["latency"]  # of ten, the fullest of four copies has three
    assert rows[0]["sequences_that_fit"] == 4 * alone["sequences_that_fit"]
    for row in rows:
        rate = row["tokens_per_second"]["value"]
        assert rate == pytest.approx(10 / row["latency"]["value"])
        paid = 4 * 2 / 3600 / rate * 1e6
        assert row["cost_per_million_tokens"]["value"] == pytest.approx(paid)
    shared = answer(capsys, *words, "--gpus", "2")["rows"][0]
    assert shared["cost_per_million_tokens"]["value"] == pytest.approx(
        2 * 2 / 3600 / shared["tokens_per_second"]["value"] * 1e6
    )


def test_cards_that_cannot_be_shared_evenly_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*LLAMA, "--gpu", "h100", "--gpus", "2", "--total-gpus", "3"]) == 2
    assert "no multiple of --gpus 2" in capsys.readouterr().err


def test_a_policy_in_words_is_the_same_as_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(
        "kvtune_policy: 1\nallocator: adakv\n"
        "policy: {method: snapkv, budget: 12.5%, keys: int4, values: int2}\n"
    )
    words = ("--gpu", "4090", "--context", "8k", "--policy")
    by_file = answer(capsys, *words, "p.yaml")["policies"][1]
    for said in ("snapkv+adakv 12.5% int4 int2", "SnapKV, AdaKV, 12.5%, int4, int2"):
        assert answer(capsys, *words, said)["policies"][1] == by_file


def test_a_name_says_which_allocator_splits_the_budgets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--gpu", "4090", "--policy", "snapkv+adakv 25% int4")
    assert answer(capsys, *words)["policies"][1]["name"] == "snapkv+adakv 25% int4"


def test_without_a_context_prompt_and_answer_are_what_the_model_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked(*words: str) -> dict[str, Any]:
        assert main(["estimate", "--gpu", "4090", *words, "--json", "--quiet"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    short = asked("--model", "smollm2-135m")
    assert {row["context_tokens"] for row in short["rows"]} == {8192 - 256}
    assert not [note for note in short["notes"] if note.startswith("length:")]
    more = asked("--model", "smollm2-135m", "--generated", "1k")
    assert {row["context_tokens"] for row in more["rows"]} == {8192 - 1024}
    assert {row["context_tokens"] for row in asked("--model", "llama-8b")["rows"]} == {8192}


PLANNED = """kvtune_policy: 1
policy: {method: snapkv, budget: 25%}
serving: {weights: int4, context_tokens: 4096, generated_tokens: 64, batch: 5}
"""


def test_a_policy_file_says_what_it_was_planned_for_and_options_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(PLANNED)
    planned = answer(capsys, "--gpu", "4090", "--policy", str(path))
    said = ("--weights", "int4", "--context", "4096", "--generated", "64", "--batch", "5")
    again = answer(capsys, "--gpu", "4090", "--policy", str(path), *said)
    assert again["notes"] == []
    (note,) = planned["notes"]
    assert all(word in note for word in said)
    assert {**planned, "notes": []} == again
    other = answer(capsys, "--gpu", "4090", "--policy", str(path), "--batch", "2")
    assert {row["batch"] for row in other["rows"]} == {2}
    assert other["budget"]["weight_format"] == "int4"


DEALT = ("--gpu", "h200", "--weights", "fp8", "--stack", "vllm")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "llama-8b", "--gpus", "2", "--ep", "2"), "no routed experts to deal to 2"),
        (("--model", "llama-8b", "--gpus", "2", "--engine-args", "--enable-expert-parallel"),
         "no routed experts to deal to 2"),
        (("--model", "deepseek-v3", "--gpus", "8", "--ep", "3"), "cannot be dealt to 3 groups"),
        (("--model", "deepseek-v3", "--gpus", "2", "--total-gpus", "8", "--ep", "4"),
         "256 experts on 2 GPUs cannot be dealt to 4 groups"),
        (("--model", "qwen3-30b-a3b", "--total-gpus", "64", "--ep", "64"), "any of 64 GPUs"),
    ],
)  # fmt: skip
def test_groups_that_experts_cannot_be_dealt_to_are_refused_without_tables_too(
    words: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from kvtune.profiles import elsewhere

    monkeypatch.setattr(elsewhere, "systems_folder", lambda: None)
    assert main(["estimate", *DEALT, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in " ".join(captured.err.split())


def test_only_uses_of_the_cards_are_tried_that_experts_can_be_dealt_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--model", "deepseek-v3", "--total-gpus", "8", "--ep", "4")
    assert main(["estimate", *DEALT, *words, "--json", "--quiet"]) in (0, 3)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["gpus"] for row in rows} == {4, 8}


@pytest.mark.parametrize(
    ("words", "told", "hint"),
    [
        (("--gpu", "any,4090"), "any stands alone", "give --gpu any, or --gpu 4090."),
        (("--gpu", "4090, ANY"), "any stands alone", "give --gpu any, or --gpu 4090."),
        (
            ("--gpu", "4090", "--weights", "int4,any"),
            "any stands",
            "--weights any, or --weights int4",
        ),
        (("--gpu", "4090", "--weights", "auto,int4"), "auto stands", "or --weights int4."),
        (("--gpu", "4090", "--weights", "any,auto"), "any stands", "give --weights any."),
        (("--gpu", "4090", "--format", "csv", "--json"), "two forms", "give one of them."),
        (("--gpu", "4090", "--format", "markdown", "--json"), "two forms", "give one of them."),
    ],
)
def test_what_excludes_another_word_is_refused_beside_it(
    words: tuple[str, ...], told: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LLAMA, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err
    assert hint in captured.err


def test_json_may_be_asked_for_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LLAMA, "--gpu", "4090", "--format", "json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_cards_that_fit_come_first_by_cost_then_by_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--gpu", "rtx-3060,h100,4090,l4", "--weights", "bf16")
    by_memory = [row["gpu"] for row in answer(capsys, *words)["rows"]]
    assert by_memory == ["l4", "rtx-4090", "h100-sxm", "rtx-3060"]
    priced = answer(capsys, *words, "--price-per-hour", "0.1,0.01,9,2")["rows"]
    assert [row["gpu"] for row in priced] == ["h100-sxm", "l4", "rtx-4090", "rtx-3060"]


def test_json_is_answered_without_a_word_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LLAMA, "--gpu", "4090", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits"]
    assert captured.err == ""


@pytest.mark.parametrize(
    "said",
    ["h2o 50% int4+4", "full all int8", "h2o 14.3% int4+4/int2+4", "kvzip+model_wide 31.3% int4+4"],
)
def test_what_tables_call_an_option_can_be_typed(said: str) -> None:
    policy = read_named(said).bind(2, 2)
    assert label_of(policy.heads[0][0], policy.allocator) == said


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("snapkv+adakv", "how many tokens"),
        ("snapkv 25% inf4", "'int4'"),
        ("snapkv h2o 25%", "each a method"),
        ("nothing.yaml", "no such file"),
    ],
)
def test_words_that_are_no_policy_are_told(
    capsys: pytest.CaptureFixture[str], said: str, told: str
) -> None:
    assert main([*LLAMA, "--gpu", "4090", "--policy", said]) == 2
    assert told in capsys.readouterr().err


def test_a_search_that_has_not_ended_is_no_policy_yet(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main([*LLAMA, "--gpu", "4090", "--policy", str(tmp_path)]) == 2
    assert "has not ended: run the same command again" in " ".join(capsys.readouterr().err.split())
