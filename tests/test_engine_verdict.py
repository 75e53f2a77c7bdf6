"""Whether something fits is said by the engine that was asked for, also in the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtune.__main__ import main

LLAMA_CPP = ("--stack", "llama-cpp", "--model", "llama-70b", "--gpu", "4090")
VLLM = ("--stack", "vllm", "--gpu", "h100", "--model")


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int | None = 0) -> dict[str, Any]:
    found_code = main(["estimate", *words, "--json", "--quiet"])
    assert code in (None, found_code)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["estimate", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


def test_layers_on_the_host_make_room_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *LLAMA_CPP, "--engine-args", "-ngl 20")
    assert found["fits"]
    assert found["rows"][0]["fits"]
    assert found["engine"]["host_weights"]["value"] > 2 * found["engine"]["weights"]["value"]
    assert main(["estimate", *LLAMA_CPP, "--engine-args", "-ngl 20"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("fits: llama.cpp")
    assert "host weights" in captured.out
    assert "error" not in captured.err


def test_the_layers_that_would_fit_do_and_one_more_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = answer(capsys, *LLAMA_CPP, code=3)
    flags, option = found["would_fit"][0].split(" in ")
    assert option == "--engine-args"
    assert answer(capsys, *LLAMA_CPP, option, flags)["fits"]
    more = f"-ngl {int(flags.split()[1]) + 1}"
    assert not answer(capsys, *LLAMA_CPP, option, more, code=3)["fits"]


def test_a_cache_on_the_host_is_not_held_against_the_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--stack", "llama-cpp", "--model", "llama-8b", "--gpu", "4090", "--weights", "bf16")
    assert not answer(capsys, *words, "--context", "120k", code=3)["fits"]
    moved = answer(capsys, *words, "--context", "120k", "--engine-args", "-nkvo")
    assert moved["engine"]["cache"]["value"] == 0


def test_a_cache_without_a_token_in_the_engine_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = answer(capsys, *VLLM, "qwen3-next-80b-a3b", code=3)
    assert found["engine"]["tokens"]["value"] == 0
    assert not found["fits"]
    (mended,) = (words.split() for words in found["would_fit"] if "--weights" in words)
    assert answer(capsys, *VLLM, "qwen3-next-80b-a3b", *mended)["fits"]
    assert main(["estimate", *VLLM, "qwen3-next-80b-a3b"]) == 3
    assert capsys.readouterr().out.startswith("does not fit: vLLM's cache holds 0 tokens")


def test_memory_is_told_of_layers_that_no_table_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kvtune.profiles import elsewhere

    monkeypatch.setattr(elsewhere, "systems_folder", lambda: tmp_path)
    words = ("--stack", "vllm", "--gpu", "b200", "--model", "qwen3-next-80b-a3b")
    found = answer(capsys, *words, code=None)
    assert found["engine"]["tokens"]["value"] > 0
    assert any("kvtune's own" in note and "recurrent states" in note for note in found["notes"])


def test_as_many_fit_as_the_engines_tokens_hold(capsys: pytest.CaptureFixture[str]) -> None:
    held = answer(capsys, *VLLM, "llama-8b")["engine"]["tokens"]["value"]
    most = int(held // (8192 + 256))
    assert answer(capsys, *VLLM, "llama-8b", "--batch", str(most))["fits"]
    found = answer(capsys, *VLLM, "llama-8b", "--batch", str(most + 1), code=3)
    assert found["would_fit"][0] == f"--batch {most}"


def test_vllm_starts_only_where_one_longest_request_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--stack", "vllm", "--gpu", "4090", "--model", "llama-8b", "--weights", "bf16")
    assert main(["estimate", *words]) == 0
    assert "it starts with --max-model-len" in " ".join(capsys.readouterr().out.split())
    answer(capsys, *words, "--engine-args", "--max-model-len 128k", code=3)
    said = refusal(capsys, *words, "--engine-args", "--max-model-len 4k")
    assert "beyond --max-model-len 4096" in said


@pytest.mark.parametrize(
    ("stack", "flags"), [("llama-cpp", "-ngl 20"), ("vllm", "--max-num-seqs 8")]
)
def test_flags_beside_several_cases_are_refused_and_the_engine_is_told_to_be_left_out(
    stack: str, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--stack", stack, "--model", "llama-8b", "--gpu", "h100,h200")
    assert "one --gpu" in refusal(capsys, *words, "--engine-args", flags)
    assert any("by the engine's memory" in note for note in answer(capsys, *words)["notes"])


@pytest.mark.parametrize("stack", ["vllm", "llama-cpp"])
def test_what_fits_on_each_of_several_cards_is_the_engines_own(
    stack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--stack", stack, "--model", "llama-8b", "--weights", "bf16")
    cards = ("3090", "4090", "l4", "h100")
    together = answer(capsys, *words, "--gpu", ",".join(cards), "--context", "16k,100k")
    fits = {(row["gpu"], row["context_tokens"]): row["fits"] for row in together["rows"]}
    assert set(fits.values()) == {True, False}
    for card, context in (("4090", "16k"), ("4090", "100k"), ("h100", "100k")):
        alone = answer(capsys, *words, "--gpu", card, "--context", context, code=None)
        row = alone["rows"][0]
        assert fits[row["gpu"], row["context_tokens"]] == row["fits"]


def test_times_are_said_to_be_of_all_layers_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--stack", "llama-cpp", "--model", "llama-8b", "--gpu", "4090", "--engine-args")

    def told(flags: str) -> bool:
        notes = answer(capsys, *words, flags)["notes"]
        return any("as if all layers were on the GPU" in note for note in notes)

    assert told("-ngl 20")
    assert told("-nkvo")
    assert not told("-ngl 99")


def test_llama_cpps_context_may_be_longer_than_what_is_asked_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--stack", "llama-cpp", "--model", "llama-8b", "--gpu", "4090", "--engine-args")
    longer = answer(capsys, *words, "-c 32k", "--context", "8192")
    assert longer["rows"][0]["context_tokens"] == 8192
    assert longer["engine"]["ctx_size"] == 32768
    assert "room for 7936 tokens" in refusal(capsys, *words, "-c 8k", "--context", "8192")
    assert "room for 3840 tokens" in refusal(capsys, *words, "-c 4k", "--context", "4096")
    found = answer(capsys, *words, "-c 32k -np 2")
    assert found["rows"][0]["context_tokens"] == 32768 // 2 - 256
    assert found["engine"]["ctx_size"] == 32768
    assert "no room" in refusal(capsys, *words, "-c 256")


@pytest.mark.parametrize("stack", ["vllm", "sglang", "llama-cpp"])
def test_a_policy_is_not_answered_by_kvtunes_own_runtime_in_a_stacks_name(
    stack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", "llama-8b", "--gpu", "h200", "--stack", stack, "--policy", "snapkv 25%")
    said = refusal(capsys, *words)
    assert f"--stack {stack} runs its own cache" in said
    assert "kvtune export --compare" in said
    assert "leave out --stack; or leave out --policy, with" in said, "the cache's is not both's"
    assert ("kvtune serve-sim --stack vllm --policy" in said) == (stack == "vllm")


@pytest.mark.parametrize("stack", ["vllm", "llama-cpp"])
def test_one_memory_is_told_and_it_is_the_engines(
    stack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", "llama-8b", "--gpu", "h200", "--stack", stack, "--weights", "bf16")
    found = answer(capsys, *words, "--batch", "16")
    assert found["budget"] is None
    most = found["policies"][0]["sequences_that_fit"]
    assert most == found["rows"][0]["sequences_that_fit"]
    assert answer(capsys, *words, "--batch", str(most))["fits"]
    assert not answer(capsys, *words, "--batch", str(most + 1), code=3)["fits"]
    main(["estimate", *words])
    shown = capsys.readouterr().out
    assert shown.count("Memory of") == 1
    assert "left for the cache" not in shown


def test_vllms_flags_are_those_of_the_whole_answer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama-8b", "--gpu", "h200", "--stack", "vllm", "--batch", "16")
    wide = answer(capsys, *words)["policies"][0]
    assert wide["memory"]["tier"] == "assumed", "the share that it was told to take"
    for narrow in (
        answer(capsys, *words, "--engine-args", "--kv-cache-dtype fp8"),
        answer(capsys, *words, "--kv-cache-dtype", "fp8"),
    ):
        cost = narrow["policies"][0]
        assert cost["prompt_bytes"] == wide["prompt_bytes"] / 2
        assert cost["share"] == 0.5
        assert cost["latency"]["value"] < wide["latency"]["value"]
    few = answer(capsys, *words, "--engine-args", "--max-num-seqs 8", code=3)
    assert few["would_fit"][0] == "--batch 8"
    flags = ("--engine-args", "--max-num-batched-tokens 4096", "--chunk", "2048")
    assert "two things of one" in refusal(capsys, *words, *flags)
    assert "-ctk" in refusal(capsys, *words[:5], "llama-cpp", "--kv-cache-dtype", "fp8")
    assert "--policy" in refusal(capsys, *words[:4], "--kv-cache-dtype", "fp8")


def test_sequences_at_once_have_a_slot_each(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--stack", "llama-cpp", "--model", "llama-8b", "--gpu", "h200", "--batch", "4")
    assert answer(capsys, *words)["engine"]["ctx_size"] == 4 * (8192 + 256)
    said = refusal(capsys, *words, "--engine-args", "-np 2")
    assert "more than the slots of -np 2" in said


@pytest.mark.parametrize(
    ("stack", "flags", "said"),
    [
        ("llama-cpp", "--ngl 20", "'-ngl'?"),
        ("llama-cpp", "--ctx_size=8k", "'--ctx-size'?"),
        ("vllm", "--gpu-memory-utilisation 0.5", "'--gpu-memory-utilization'?"),
        ("vllm", "--tensor-parallel-size 2", "give --gpus of kvtune"),
        ("vllm", "-tp 2", "give --gpus of kvtune"),
    ],
)
def test_flags_that_are_not_read_are_told_with_what_was_meant(
    stack: str, flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--stack", stack, "--model", "llama-8b", "--gpu", "h100", "--engine-args", flags)
    (note,) = (note for note in answer(capsys, *words)["notes"] if "not read" in note)
    assert flags in note
    assert said in note


def test_beside_lines_of_figures_the_engines_verdict_goes_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("estimate", *LLAMA_CPP, "--engine-args", "-ngl 20", "--format", "csv")
    assert main([*words]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 2
    assert captured.err.startswith("fits: llama.cpp")
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stack", ["vllm", "llama-cpp"])
def test_the_most_at_once_has_the_interval_of_the_engines_memory(
    stack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--stack", stack, "--model", "llama-8b", "--gpu", "h200", "--weights", "bf16")
    found = answer(capsys, *words, "--context", "2k")
    (row,), engine = found["rows"], found["engine"]
    most = row["most_at_once"]
    low, high = most["interval"]
    assert low < most["value"] == row["sequences_that_fit"] < high
    if stack == "vllm":
        assert most["tier"] == engine["tokens"]["tier"] == "fitted"
        assert [low, high] == [int(end) // (2048 + 256) for end in engine["tokens"]["interval"]]
